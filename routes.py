"""Routes on disk: what every router decided while questions were answered, to be taken again.

    python eval.py DIR --record-routes FILE.safetensors
    python eval.py DIR --replay-routes FILE.safetensors

Replayed, no router decides: the same command gives the same logits to the last bit, and another
model, router or precision is asked along the old routes.

The file: gates and logits (N, L, E) fp32, the positions of all questions one after the other, a
question's prompt and then its answer; ends (Q,), where each question's positions end; prompts
(Q,), how many of them are its prompt's; the questions' identifiers in the header, as JSON.

Shapes: B batch, T positions, L sparse layers, E experts, Q questions, N positions of all of them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import UserError
from routers import Routing


class Route(NamedTuple):
    """One question's: gates and logits (n, L, E) of its prompt's and its answer's positions."""

    gates: Tensor
    logits: Tensor
    n_prompt: int


def record(routings: Sequence[Sequence[Routing]], mask: Tensor) -> list[Route]:
    """Of each round of generate() its routings, and the prompts' mask (B, T) -> a Route a sample.

    Prompts are padded on the left. The first round is of the prompt, each other of one token.
    """
    each = []
    for kind in ("gates", "logits"):
        rounds = [torch.stack([getattr(r, kind) for r in rs], dim=2) for rs in routings]
        each.append(torch.cat(rounds, dim=1).cpu())  # (B, T + rounds - 1, L, E)
    n_prompt = mask.sum(dim=1).tolist()
    pad = [mask.shape[1] - n for n in n_prompt]
    rows = zip(*each, pad, n_prompt, strict=True)
    return [Route(gates[first:], logits[first:], n) for gates, logits, first, n in rows]


def replay(routes: Sequence[Route], mask: Tensor) -> Iterator[list[Routing]]:
    """The inverse: routes of a batch's samples -> the routings of each round, without an end.

    A sample that has ended goes on as it ended. Raises UserError for prompts of other lengths.
    """
    lengths = mask.sum(dim=1).tolist()
    for route, n in zip(routes, lengths, strict=True):
        if route.n_prompt != n:
            raise UserError(f"--replay-routes: a prompt has {n} positions, {route.n_prompt} "
                            "when its routes were recorded: other questions, or another "
                            "tokenizer")  # fmt: skip
    width = mask.shape[1]
    rounds = max(len(route.gates) - route.n_prompt for route in routes)
    wide = []
    for kind in (0, 1):
        rows = [torch.cat([route[kind].new_zeros(width - n, *route[kind].shape[1:]),
                           route[kind], route[kind][-1:].expand(rounds, -1, -1)])[: width + rounds]
                for route, n in zip(routes, lengths, strict=True)]  # fmt: skip
        wide.append(torch.stack(rows).to(mask.device))  # (B, T + rounds, L, E)
    start, end = 0, width
    while True:
        part = [t[:, start:end].unbind(dim=2) for t in wide]
        yield [Routing(*both) for both in zip(*part, strict=True)]
        start = min(end, width + rounds - 1)
        end = start + 1


def long_enough(routes: Sequence[Route], tokens: Tensor, eos_id: int) -> None:
    """Raise UserError if an answer of tokens (B, rounds) went on where its route had ended."""
    said = (tokens != eos_id).cumprod(dim=1).sum(dim=1).tolist()  # (B,)
    for route, n in zip(routes, said, strict=True):
        if min(n, tokens.shape[1] - 1) > len(route.gates) - route.n_prompt:
            raise UserError("--replay-routes: an answer became longer than the one whose routes "
                            "were recorded: another model or precision said more")  # fmt: skip


def save_routes(file: Path, ids: Sequence[str], routes: Sequence[Route]) -> None:
    """Raises UserError where it cannot be written."""
    tensors = {
        "gates": torch.cat([route.gates for route in routes]),
        "logits": torch.cat([route.logits for route in routes]),
        "ends": torch.tensor([len(route.gates) for route in routes]).cumsum(0),
        "prompts": torch.tensor([route.n_prompt for route in routes]),
    }
    try:
        save_file(tensors, file, {"questions": json.dumps(list(ids))})
    except (OSError, SafetensorError) as error:
        raise UserError(f"--record-routes {file}: could not be written: {error}") from error


def load_routes(file: Path, ids: Sequence[str], shape: tuple[int, int]) -> list[Route]:
    """The routes of these questions, in their order; shape (L, E) of the model that takes them.

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
    sound = isinstance(names, list) and len(names) == len(ends) == len(prompts) > 0
    if not (sound and gates.dim() == 3 and gates.shape == logits.shape == (ends[-1], *shape)):
        raise UserError(f"--replay-routes {file}: {tuple(gates.shape)} gates are not of {shape[0]} "
                        f"sparse layers and {shape[1]} experts")  # fmt: skip
    starts = [0, *ends.tolist()]
    place = {name: i for i, name in enumerate(names)}
    if missing := [name for name in ids if name not in place]:
        raise UserError(f"--replay-routes {file}: {len(missing)} of {len(ids)} questions are not "
                        f"in it: {', '.join(missing[:5])}")  # fmt: skip
    rows = [(starts[i], starts[i + 1], int(prompts[i])) for i in map(place.get, ids)]
    return [Route(gates[first:end], logits[first:end], n) for first, end, n in rows]
