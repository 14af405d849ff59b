"""One process, or as many as torchrun started: each one's samples and device, sums over all.

With one process everything here works too, and nothing is exchanged.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from config import UserError
from ops import local


class Processes:
    """This process's rank among all of them."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world, self.is_first = rank, world, rank == 0

    def share(self, rows: Sequence[Any]) -> list[Any]:
        """The part of a list that is this process's; may be empty."""
        return list(rows[self.rank :: self.world])

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes, in fp64."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def join(self, part: dict) -> dict:
        """The dicts of all processes in one, the same everywhere."""
        if self.world == 1:
            return part
        parts: list[dict] = [{}] * self.world
        dist.all_gather_object(parts, part)
        return {key: value for found in parts for key, value in found.items()}

    def end(self) -> None:
        """Wait for all, then leave the group."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


ALONE = Processes()


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started, if it did; the first alone prints.

    device: --device; with GPUs each process takes the one of its local rank.
    Raises UserError where there are fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    backend, n_gpus = "gloo", torch.cuda.device_count()
    if device != "cpu" and n_gpus:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= n_gpus:
            raise UserError(f"--nproc-per-node: this machine has {n_gpus} GPUs")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if rank := dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    return Processes(rank, world)


def like(place: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor on the device of `place`; this process's share of it if `place` is sharded."""
    tensor = tensor.to(place.device)
    if not hasattr(place, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # it takes half a second

    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def put(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, as read from a file, into a parameter that may be sharded."""
    local(place).copy_(local(like(place, tensor)))


def write_tensors(values: dict[str, Tensor], file: Path) -> None:
    """One safetensors file. Sharded tensors are gathered; the first process writes it."""
    whole, is_first = {}, not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in values.items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if is_first:
            whole[name] = tensor.cpu().contiguous()
    if is_first:
        save_file(whole, file)
