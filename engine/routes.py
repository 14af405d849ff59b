"""Recorded routes: what every router decided while questions were answered, to be replayed.

    python eval.py DIR --record-routes FILE.safetensors
    python eval.py DIR --replay-routes FILE.safetensors

Replayed, no router decides: the same command gives the same logits to the last bit, and another
model, router or precision answers along the old routes.

The file: gates and logits (N, L, E) fp32, the positions of all questions one after the other, a
question's prompt and then its answer; ends (Q,), where each question's positions end; prompts
(Q,), how many of them are its prompt's; the questions' identifiers in the header, as JSON.

Shapes: B batch, T positions, L sparse layers, E experts, Q questions, N positions of all of them.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import UserError
from data import Batch
from model import MedMoE, Step, sparse_layers
from routers import Hints, Router, Routing


class Route(NamedTuple):
    """Of one question: gates and logits (n, L, E) of its prompt's and its answer's positions."""

    gates: Tensor
    logits: Tensor
    n_prompt: int


def record(routings: Sequence[Sequence[Routing]], mask: Tensor) -> list[Route]:
    """The routings of each Step of generate(), and the prompts' mask (B, T) -> a Route a sample."""
    steps = [torch.stack([torch.stack(r[:2]) for r in step], dim=3) for step in routings]
    both = torch.cat(steps, dim=2).cpu()  # (2, B, T + steps - 1, L, E) gates and logits
    pads = (~mask).sum(dim=1).tolist()  # on the left
    return [Route(*both[:, i, n:], mask.shape[1] - n) for i, n in enumerate(pads)]


def replay(routes: Sequence[Route], mask: Tensor) -> Iterator[list[Routing]]:
    """The inverse: routes of a batch's samples -> the routings of each step, endlessly.

    A sample that has ended repeats its last. Raises UserError for prompts of other lengths.
    """
    for route, n in zip(routes, mask.sum(dim=1).tolist(), strict=True):
        if route.n_prompt != n:
            raise UserError(f"--replay-routes: a prompt has {n} positions, {route.n_prompt} "
                            "when its routes were recorded: other questions, or another "
                            "tokenizer")  # fmt: skip
    for step in count():
        n_new, rows = 1 if step else mask.shape[1], []
        for route in routes:
            end = min(route.n_prompt + step, len(route.gates))
            both = torch.stack([t[max(0, end - n_new) : end] for t in route[:2]])
            rows.append(F.pad(both, (0, 0, 0, 0, n_new - both.shape[1], 0)))  # (2, n_new, L, E)
        layers = torch.stack(rows, dim=1).to(mask.device).unbind(dim=3)
        yield [Routing(*layer) for layer in layers]  # gates and logits (B, n_new, E)


class Replayed(Router):
    """In place of a router: the recorded routings, one a call."""

    def __init__(self, inner: Router, routings: Iterator[Routing]):
        super().__init__(inner.proj.in_features, inner.proj.out_features)
        self.routings = routings

    def forward(self, x: Tensor, mask: Tensor, hints: Hints = Hints()) -> Routing:
        return next(self.routings)


@contextmanager
def replaced_routers(model: MedMoE, routers: Sequence[Router]) -> Iterator[None]:
    """These routers, one a sparse layer, in place of the model's; undone at the end."""
    layers = [block.mlp for block in model.decoder.blocks if block.is_sparse]
    before = [mlp.router for mlp in layers]
    for mlp, router in zip(layers, routers, strict=True):
        mlp.router = router
    try:
        yield
    finally:
        for mlp, router in zip(layers, before, strict=True):
            mlp.router = router


class RouteRecorder:
    """Replays the routes of one file, or records those that are taken to another; or both."""

    def __init__(self, model: MedMoE, ids: list[str], replayed: str | None, recorded: str | None):
        if (moe := model.config.moe) is None:
            raise UserError("--record-routes, --replay-routes: a dense model has no routes")
        if torch.distributed.is_initialized():
            raise UserError("--record-routes, --replay-routes: for one process")
        shape = len(sparse_layers(model.config, moe)), moe.n_experts
        self.routes = load_routes(Path(replayed), ids, shape) if replayed else None
        self.ids, self.file, self.taken = ids, recorded, {}

    def replay(self, model: MedMoE, rows: Sequence[int], batch: Batch) -> AbstractContextManager:
        """A context for answering the questions `rows`, which this batch holds."""
        if self.routes is None:
            return nullcontext()
        routers = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
        # The layers are computed in order: each router takes the next one.
        routings = chain.from_iterable(replay([self.routes[i] for i in rows], batch.mask))
        return replaced_routers(model, [Replayed(router, routings) for router in routers])

    def record(self, steps: list[Step], rows: Sequence[int], batch: Batch, eos_id: int) -> None:
        """Keep what was taken. Raises UserError if an answer went on where its route had ended."""
        if self.routes is not None:
            tokens = torch.stack([step.tokens for step in steps], dim=1)[:, :-1]  # that had routes
            n_tokens = (tokens != eos_id).cumprod(dim=1).sum(dim=1).tolist()  # (B,)
            for i, n in zip(rows, n_tokens, strict=True):
                if n > len(self.routes[i].gates) - self.routes[i].n_prompt:
                    raise UserError("--replay-routes: an answer became longer than the one whose "
                                    "routes were recorded: another model or precision")  # fmt: skip
        if self.file:
            taken = record([step.routings for step in steps], batch.mask)
            self.taken |= dict(zip(rows, taken, strict=True))

    def save(self) -> None:
        if self.file:
            save_routes(Path(self.file), self.ids, [self.taken[i] for i in range(len(self.ids))])


def save_routes(file: Path, ids: Sequence[str], routes: Sequence[Route]) -> None:
    """Raises UserError where it cannot be written."""
    gates, logits, prompts = zip(*routes, strict=True)
    ends = torch.tensor([len(part) for part in gates]).cumsum(0)
    tensors = {"gates": torch.cat(gates), "logits": torch.cat(logits), "ends": ends,
               "prompts": torch.tensor(prompts)}  # fmt: skip
    try:
        save_file(tensors, file, {"questions": json.dumps(list(ids))})
    except (OSError, SafetensorError) as error:
        raise UserError(f"--record-routes {file}: could not be written: {error}") from error


def load_routes(file: Path, ids: Sequence[str], shape: tuple[int, int]) -> list[Route]:
    """The routes of these questions, in their order; shape (L, E) of the model.

    Raises UserError for a file that is damaged, of another shape, or lacks a question.
    """
    try:
        with safe_open(file, "pt") as opened:
            names = json.loads((opened.metadata() or {}).get("questions", "null"))
            gates, logits, ends, prompts = (
                opened.get_tensor(name) for name in ("gates", "logits", "ends", "prompts")
            )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"--replay-routes {file}: cannot be read: {error}") from error
    sound = isinstance(names, list) and (len(names),) == ends.shape == prompts.shape != (0,)
    sizes = ends.diff(prepend=ends.new_zeros(1)) if sound else ends
    if not (sound and sizes.min() > 0 and gates.shape == logits.shape == (ends[-1], *shape)):
        raise UserError(f"--replay-routes {file}: {tuple(gates.shape)} gates are not of {shape[0]} "
                        f"sparse layers and {shape[1]} experts")  # fmt: skip
    parts = (t.split(sizes.tolist()) for t in (gates, logits))
    routes = dict(zip(names, map(Route, *parts, prompts.tolist()), strict=True))
    if missing := [name for name in ids if name not in routes]:
        raise UserError(f"--replay-routes {file}: {len(missing)} of {len(ids)} questions are not "
                        f"in it: {', '.join(missing[:5])}")  # fmt: skip
    return [routes[name] for name in ids]
