"""Put questions to a model, in batches: answers, options, and which experts they visited.

Shapes: B batch, T positions, S image side, L sparse layers, E experts, C options.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from classify import option_likelihoods
from config import IGNORE, MODALITIES, UserError
from data import Batch, Text, collate, encode_prompt
from engine.processes import ALONE, Processes
from flags import reading
from metrics import router_report
from model import MedMoE, Step, generate, precision, sparse_layers
from pictures import Images
from records import Sample
from routes import Route, load_routes, long_enough, record, replay, save_routes
from scoring import question_ids
from sources import has_splits, load_samples
from vision import normalise


class Prediction(NamedTuple):
    answer: str
    votes: Tensor  # (E,) router logits, mean over prompt and sparse layers; (0,) if dense
    load: Tensor  # (L, E) visits of the prompt's and the answer's positions to each expert
    route: Route | None = None  # where it is asked for


def unpack(steps: list[Step], mask: Tensor, text: Text) -> list[Prediction]:
    """What generate() yielded for a batch, and its prompts' mask (B, T) -> one Prediction each."""
    tokens = torch.stack([step.tokens for step in steps], dim=1)  # (B, steps)
    alive = (tokens != text.eos_id).cumprod(dim=1).bool()  # (B, steps) part of the answer
    answers = [
        text.decode(row[keep].tolist()).strip() for row, keep in zip(tokens, alive, strict=True)
    ]
    if not steps[0].routings:
        return [Prediction(answer, torch.zeros(0), torch.zeros(0, 0)) for answer in answers]
    real = mask[:, None, :, None]  # (B, 1, T, 1)
    logits = torch.stack([r.logits for r in steps[0].routings], dim=1)  # (B, L, T, E)
    gates = torch.stack([r.gates for r in steps[0].routings], dim=1)
    votes = (logits * real).sum(dim=(1, 2)) / real.sum(dim=(1, 2))  # (B, E), times L: same argmax
    load = ((gates != 0) & real).sum(dim=2)  # (B, L, E)
    for i, step in enumerate(steps[1:]):  # its routings are of the token said in the step before
        gates = torch.stack([r.gates for r in step.routings], dim=1)[:, :, 0]  # (B, L, E)
        load += (gates != 0) & alive[:, i, None, None]
    return [Prediction(*row) for row in zip(answers, votes.cpu(), load.cpu(), strict=True)]


class Asker:
    """A loaded model, and what it takes to put questions to it."""

    def __init__(
        self,
        model: MedMoE,
        text: Text,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 64,
        max_new: int = 48,
        processes: Processes = ALONE,
    ):
        self.model, self.text, self.device, self.dtype = model, text, device, dtype
        self.batch_size, self.max_new, self.processes = batch_size, max_new, processes
        self.images = Images(model.config.vision.image_size, pad=True, workers=2)

    def batches(
        self, samples: Sequence[Sample], title: str, picture: Tensor | None = None
    ) -> Iterator[tuple[list[int], Batch]]:
        """Prompts of similar lengths together, with their places. picture: see answer.

        Of several processes, each is given its share of the batches.
        """
        config, text = self.model.config, self.text
        limits = config.vision.n_patches, config.system, config.decoder.max_len
        encoded = []
        for s in samples:
            ids = encode_prompt(s.turns[0][0], s.image is not None, text, *limits)
            encoded.append((ids, [IGNORE] * len(ids)))
        order = sorted(range(len(samples)), key=lambda i: len(encoded[i][0]))
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        groups = self.processes.share(groups)
        quiet = not self.processes.is_first
        bar = tqdm(groups, desc=title, file=sys.stderr, mininterval=1, disable=quiet)
        for rows, ahead in zip(bar, [*groups[1:], []], strict=True):
            self.images.prefetch(samples[i] for i in ahead)
            part = [samples[i] for i in rows], [encoded[i] for i in rows]
            batch = collate(*part, self.images, text.eos_id, side="left")
            if picture is not None:
                batch = batch._replace(images=picture.expand_as(batch.images))
            yield rows, batch.to(self.device)

    def answer(
        self, samples: Sequence[Sample], picture: Tensor | None = None,
        routes: Sequence[Route] | None = None, keep: bool = False,
    ) -> list[Prediction]:  # fmt: skip
        """Greedy answers to the first questions. picture (3, S, S): shown to all of them.

        routes: a sample's each, to be taken in place of deciding. keep: Predictions get theirs.
        """
        found: dict[int, Prediction] = {}
        for rows, batch in self.batches(samples, "answers", picture):
            given = replay([routes[i] for i in rows], batch.mask) if routes else None
            with precision(self.device, self.dtype):
                rounds = generate(self.model, batch, self.text.eos_id, self.max_new, routes=given)
                steps = list(rounds)
            if routes:
                tokens = torch.stack([step.tokens for step in steps], dim=1)
                long_enough([routes[i] for i in rows], tokens, self.text.eos_id)
            part = unpack(steps, batch.mask, self.text)
            if keep:
                taken = record([step.routings for step in steps], batch.mask)
                part = [p._replace(route=r) for p, r in zip(part, taken, strict=True)]
            found |= dict(zip(rows, part, strict=True))
        found = self.processes.join(found)
        return [found[i] for i in range(len(samples))]

    def on_routes(
        self, samples: Sequence[Sample], replayed: str | None, recorded: str | None
    ) -> list[Prediction]:
        """The answers along the routes of the file `replayed`; those taken go to `recorded`."""
        if not (replayed or recorded):
            return self.answer(samples)
        moe, ids, routes = self.model.config.moe, question_ids(samples), None
        if moe is None:
            raise UserError("--record-routes, --replay-routes: a dense model has no routes")
        if self.processes.world > 1:
            raise UserError("--record-routes, --replay-routes: for one process")
        if replayed:
            shape = len(sparse_layers(self.model.config, moe)), moe.n_experts
            routes = load_routes(Path(replayed), ids, shape)
        found = self.answer(samples, routes=routes, keep=recorded is not None)
        if recorded:
            save_routes(Path(recorded), ids, [p.route for p in found])
        return found

    def choose(self, samples: Sequence[Sample]) -> Tensor:
        """Probability of each of the options, which are the same for all samples, (n, C)."""
        text = self.text
        options = [[*text.encode(f" {name}"), text.eos_id] for name in samples[0].options]
        found: dict[int, Tensor] = {}
        for rows, batch in self.batches(samples, "options"):
            with precision(self.device, self.dtype):
                scores = option_likelihoods(self.model, batch, options)
            found |= dict(zip(rows, scores.softmax(dim=-1).cpu(), strict=True))
        found = self.processes.join(found)
        return torch.stack([found[i] for i in range(len(samples))])

    def mean_picture(self, samples: Sequence[Sample]) -> Tensor:
        """(3, S, S) CLIP-normalised mean of the samples' different images."""
        unique = {s.image: s for s in samples if s.image is not None}
        total = torch.zeros(3, self.images.size, self.images.size, dtype=torch.float64)
        for s in unique.values():
            total += self.images.get(s)
        mean = (total / max(1, len(unique))).round().to(torch.uint8)
        return normalise(mean[None])[0]


def load_questions(flags: Any, known: dict) -> tuple[Any, list[Sample]]:
    """The questions to ask. Without --data they are those of `known`, read as it says.

    flags: a Common with `split` and `limit`; those that `known` said are in what is returned.
    known: what flags.how_read found in a checkpoint or a result; {} if there is neither.
    """
    if not flags.data:
        data = tuple(spec for spec in known.get("data", ()) if has_splits(spec))
        if not data:
            raise UserError("--data SOURCE is needed: nothing says which questions these are")
        default = type(flags)  # a dataclass: its attributes are the defaults
        said = {n: v for n, v in known.items() if getattr(flags, n) == getattr(default, n)}
        flags = replace(flags, **said | {"data": data})  # flags that were given win
    samples = load_samples(flags.data, "vqa", flags.split, **reading(flags))[: flags.limit]
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: no questions in its {flags.split} split")
    question_ids(samples)  # doubles are found before anything is asked
    return flags, samples


def judge_router(samples: Sequence[Sample], found: Sequence[Prediction]) -> dict:
    """Does the likeliest expert, over an image's prompts and layers, carry the image's modality?"""
    votes: dict = {}
    for s, p in zip(samples, found, strict=True):
        if s.modality and s.image is not None and len(p.votes):
            votes[s.image] = (s.modality, votes.get(s.image, (None, 0))[1] + p.votes)
    n_experts = len(found[0].votes)
    truth = [MODALITIES.index(name) % max(1, n_experts) for name, _ in votes.values()]
    said = [int(vote.argmax()) for _, vote in votes.values()]
    names = [*MODALITIES, *(f"expert {e}" for e in range(len(MODALITIES), n_experts))]
    return router_report(truth, said, names[:n_experts] if n_experts else names)


def expert_load(samples: Sequence[Sample], found: Sequence[Prediction]) -> dict[str, list]:
    """Modality -> (L, E) share of the layer's visits that go to each expert."""
    total: dict[str, Tensor] = {}
    for s, p in zip(samples, found, strict=True):
        name = s.modality or "unknown"
        total[name] = total.get(name, 0) + p.load.double()
    return {name: (t / t.sum(1, keepdim=True)).tolist() for name, t in sorted(total.items())}


def show_load(load: dict[str, list], n_experts: int, blocks: Sequence[int]) -> str:
    """Expert load per sparse block and modality, in percent of the visits."""
    lines = [" " * 26 + "".join(f"expert {e}".rjust(10) for e in range(n_experts))]
    for layer, block in enumerate(blocks):
        for name, table in load.items():
            cells = "".join(f"{share:10.1%}" for share in table[layer])
            lines.append(f"  block {block:<4}{name:<14}{cells}")
    return "\n".join(lines)
