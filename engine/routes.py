"""Routes that no router decides now: recorded ones, which are replayed, and forced ones.

    python eval.py DIR --record-routes FILE.safetensors
    python eval.py DIR --replay-routes FILE.safetensors
    python chat.py DIR --expert 1

Replayed, the same command gives the same logits to the last bit, and another model, router or
precision answers along the old routes. Forced ones change what the model's router decided.

The file: for each question, under its identifier, gates and logits (2, n, L, E) fp32 of the n
positions of its prompt and then of its answer; in the header, how many are its prompt's.

Shapes: B batch, T positions, L sparse layers, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
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
from model import Generated, MedMoE, sparse_layers
from routers import Hints, Router, Routing


class Route(NamedTuple):
    """Of one question."""

    values: Tensor  # (2, n, L, E) gates and logits of its prompt's and its answer's positions
    n_prompt: int


def record(routings: Sequence[Sequence[Routing]], mask: Tensor) -> list[Route]:
    """The routings of each step of generate(), and the prompts' mask (B, T) -> a Route a sample."""
    steps = [torch.stack([torch.stack(r[:2]) for r in step], dim=3) for step in routings]
    both = torch.cat(steps, dim=2).cpu()  # (2, B, T + steps - 1, L, E) gates and logits
    pads = (~mask).sum(dim=1).tolist()  # on the left
    return [Route(both[:, i, n:], mask.shape[1] - n) for i, n in enumerate(pads)]


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
            end = min(route.n_prompt + step, route.values.shape[1])
            both = route.values[:, max(0, end - n_new) : end]
            rows.append(F.pad(both, (0, 0, 0, 0, n_new - both.shape[1], 0)))  # (2, n_new, L, E)
        layers = torch.stack(rows, dim=1).to(mask.device).unbind(dim=3)
        yield [Routing(*layer) for layer in layers]  # gates and logits (B, n_new, E)


class Replayed(Router):
    """In place of a router: the recorded routings, one a call."""

    at_most_k = False  # top_k was another router's

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


class Forced(Router):
    """Wraps a router. Subclasses change(gates, logits, modality): twice must equal once."""

    frozen = True

    def __init__(self, inner: Router):
        n_experts, d_model = inner.proj.weight.shape
        super().__init__(d_model, n_experts, inner.top_k, inner.level)
        self.inner, self.proj = inner, inner.proj
        for name in ("causal", "batch_invariant", "at_most_k", "may_drop"):
            setattr(self, name, getattr(inner, name))

    def forward(self, x: Tensor, mask: Tensor, hints: Hints = Hints()) -> Routing:
        routing = self.inner(x, mask, hints)
        gates = self.change(routing.gates, routing.logits, hints.modality)
        return routing._replace(gates=gates.masked_fill(~mask[..., None], 0.0))


class Alone(Forced):
    """Every token is routed to this one expert, with gate 1."""

    def __init__(self, inner: Router, expert: int):
        super().__init__(inner)
        self.expert = expert

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        return torch.zeros_like(gates).index_fill(-1, torch.tensor(self.expert).to(gates.device), 1)


def routers_of(model: MedMoE) -> list[Router]:
    """One a sparse layer, in order."""
    return [block.mlp.router for block in model.decoder.blocks if block.is_sparse]


def forced(model: MedMoE, make: Callable[[Router], Router]) -> AbstractContextManager[None]:
    return replaced_routers(model, [make(router) for router in routers_of(model)])


def forced_routers(model: MedMoE, expert: int | None) -> list[Router]:
    """For --expert: Alone for each sparse layer; of None the model's own. Raises UserError."""
    routers, moe = routers_of(model), model.config.moe
    if expert is None:
        return routers
    if moe is None:
        raise UserError(f"--expert {expert}: a dense model has no experts")
    if expert >= moe.n_experts:
        raise UserError(f"--expert {expert}: must be from 0 to {moe.n_experts - 1}")
    return [Alone(router, expert) for router in routers]


class RouteRecorder:
    """Replays the routes of one file, or records those that are taken to another; or both."""

    def __init__(self, model: MedMoE, ids: list[str], replayed: str | None, recorded: str | None):
        if (moe := model.config.moe) is None or torch.distributed.is_initialized():
            raise UserError("--record-routes, --replay-routes: a dense model has no routes, and "
                            "several processes cannot record them")  # fmt: skip
        shape = len(sparse_layers(model.config, moe)), moe.n_experts
        self.routes = load_routes(Path(replayed), ids, shape) if replayed else None
        self.ids, self.file, self.taken = ids, recorded, {}

    def replay(self, model: MedMoE, rows: Sequence[int], batch: Batch) -> AbstractContextManager:
        """A context for answering the questions `rows`, which this batch holds."""
        if self.routes is None:
            return nullcontext()
        # The layers are computed in order: each router takes the next one.
        routings = chain.from_iterable(replay([self.routes[i] for i in rows], batch.mask))
        return replaced_routers(model, [Replayed(router, routings) for router in routers_of(model)])

    def record(
        self, steps: list[Generated], rows: Sequence[int], batch: Batch, eos_id: int
    ) -> None:
        """Keep what was taken. Raises UserError if an answer went on where its route had ended."""
        if self.routes is not None:
            tokens = torch.stack([step.tokens for step in steps], dim=1)[:, :-1]  # that had routes
            n_tokens = (tokens != eos_id).cumprod(dim=1).sum(dim=1).tolist()  # (B,)
            for i, n in zip(rows, n_tokens, strict=True):
                if n > self.routes[i].values.shape[1] - self.routes[i].n_prompt:
                    raise UserError(f"--replay-routes: the answer to {self.ids[i]} became longer "
                                    "than its route: another model or precision")  # fmt: skip
        if self.file:
            taken = record([step.routings for step in steps], batch.mask)
            self.taken |= dict(zip(rows, taken, strict=True))

    def save(self) -> None:
        if self.file:
            save_routes(Path(self.file), {n: self.taken[i] for i, n in enumerate(self.ids)})


def save_routes(file: Path, routes: dict[str, Route]) -> None:
    """Raises UserError where it cannot be written."""
    header = {name: str(route.n_prompt) for name, route in routes.items()}
    try:
        save_file({n: route.values.contiguous() for n, route in routes.items()}, file, header)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--record-routes {file}: could not be written: {error}") from error


def load_routes(file: Path, ids: Sequence[str], shape: tuple[int, int]) -> list[Route]:
    """The routes of these questions, in their order; shape (L, E) of the model.

    Raises UserError for a file that is damaged, of another shape, or lacks a question.
    """
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            if missing := [name for name in ids if name not in header]:
                raise UserError(f"--replay-routes {file}: {len(missing)} of {len(ids)} questions "
                                f"are not in it: {', '.join(missing[:5])}")  # fmt: skip
            routes = [Route(opened.get_tensor(name), int(header[name])) for name in ids]
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"--replay-routes {file}: cannot be read: {error}") from error
    for values, n_prompt in routes:
        n = values.numel() // (2 * shape[0] * shape[1])
        if values.shape != (2, n, *shape) or not 0 < n_prompt <= n:
            raise UserError(f"--replay-routes {file}: {tuple(values.shape)} values are not of "
                            f"{shape[0]} sparse layers and {shape[1]} experts")  # fmt: skip
    return routes
