"""One process, or as many as torchrun started: who takes which samples, and sums over all.

Everything here works alike for one process, where nothing is exchanged.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Processes:
    """This process's place among all of them."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """The part of a batch that this process computes; may be empty."""
        return list(rows[self.rank :: self.world])

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes, in fp64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Processes()


def start() -> Processes:
    """Join the processes that torchrun started, if it did."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return Processes(int(os.environ.get("RANK", "0")), world)
