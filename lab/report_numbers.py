"""What lab.report shows of a checkpoint's routing, as numbers: load, calibration, examples.

Shapes: B batch, T positions, L sparse layers, E experts, S image side.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import IMAGE_ID, MODALITIES
from data import Sample
from eval import Prediction, Predictor, unpack
from lab.router_stats import ece, reliability
from model import autocast, generate
from scoring.compare import value

KINDS = ("image patches", "prompt text", "answer")  # of tokens
N_BINS = 10  # of confidence


class Trace(NamedTuple):
    """A question's prediction, and the load of the experts by kind of token."""

    prediction: Prediction
    load: Tensor  # (3, L, E) routed tokens, in the order of KINDS; (3, 0, 0) if dense


class Example(NamedTuple):
    """One question followed token by token."""

    sample: Sample
    answer: str
    is_right: bool
    image: Tensor | None  # (3, S, S) uint8 at the tower's size
    patches: Tensor  # (L, P, E) gates of the image's patches, row by row
    tokens: list[str]  # of the answer
    gates: list[Tensor | None]  # (L, E) of each token as the next input; None: it was the last


def follow(predictor: Predictor, samples: Sequence[Sample]) -> list[Trace]:
    """Answer every question greedily and count where its tokens are routed."""
    found: dict[int, Trace] = {}
    for rows, batch in predictor.batches(samples, "routes"):
        with autocast(predictor.device, predictor.dtype):
            steps = list(generate(predictor.model, batch, predictor.text.eos_id, predictor.max_new))
        predictions = unpack(steps, batch.mask, predictor.text)
        loads = [torch.zeros(3, *p.load.shape) for p in predictions]
        if steps[0].routings:
            routed = torch.stack([r.gates != 0 for r in steps[0].routings], dim=1)  # (B, L, T, E)
            is_patch = batch.ids == IMAGE_ID  # (B, T)
            for kind, which in enumerate((is_patch, batch.mask & ~is_patch)):
                counted = (routed & which[:, None, :, None]).sum(dim=2).cpu()  # (B, L, E)
                for row, part in zip(loads, counted, strict=True):
                    row[kind] = part
            for row, p in zip(loads, predictions, strict=True):
                row[2] = p.load - row[0] - row[1]
        found |= {i: Trace(*both) for i, *both in zip(rows, predictions, loads, strict=True)}
    return [found[i] for i in range(len(samples))]


def shares(load: Tensor) -> list[list[float]]:
    """Load (L, E) -> each expert's share of its layer's; zeros where no token was routed."""
    load = load.double()
    return (load / load.sum(dim=-1, keepdim=True).clamp(min=1)).tolist()


def load_tables(samples: Sequence[Sample], traces: Sequence[Trace]) -> dict[str, dict]:
    """By "modality" and by "kind" of token: name -> (L, E) "shares", (L,) "routed"."""
    groups: dict[str, dict[str, Tensor]] = {"modality": {}, "kind": {}}
    for s, trace in zip(samples, traces, strict=True):
        name, total = s.modality or "unknown", trace.load.double()
        by_modality, by_kind = groups.values()
        by_modality[name] = by_modality.get(name, 0) + total.sum(dim=0)
        for kind, load in zip(KINDS, total, strict=True):
            by_kind[kind] = by_kind.get(kind, 0) + load
    order = [*MODALITIES, "unknown", *KINDS]
    found: dict[str, dict] = {}
    for group, tables in groups.items():
        found[group] = {}
        for name in sorted(tables, key=order.index):
            if (table := tables[name]).sum() > 0:
                routed = table.sum(dim=-1).int().tolist()
                found[group][name] = {"shares": shares(table), "routed": routed}
    return found


def calibration(confidences: Sequence[float], right: Sequence[bool]) -> dict:
    """The expected calibration error over N_BINS bins, and those that are not empty."""
    confidence, hits = np.array(confidences, float), np.array(right, bool)
    bins = [row for row in reliability(confidence, hits, N_BINS) if row["n"]]
    error = ece(confidence, hits, N_BINS) if bins else 0.0
    return {"n": len(confidence), "ece": error, "bins": bins}


def router_confidence(
    samples: Sequence[Sample], found: Sequence[Prediction], n_layers: int
) -> tuple[list[float], list[bool]]:
    """Per labelled image: softmax of the likeliest expert, and whether it is the modality's.

    The softmax is of the logits' mean over the image's prompts and sparse layers: its largest is
    the prediction that scoring.router.judge_router counts.
    """
    votes: dict = {}
    for s, p in zip(samples, found, strict=True):
        if s.modality and s.image is not None and len(p.votes):
            votes.setdefault(s.image, (s.modality, []))[1].append(p.votes)
    confidences, right = [], []
    for modality, rows in votes.values():
        probs = (sum(rows) / len(rows) / n_layers).softmax(dim=0)  # (E,)
        confidences.append(float(probs.max()))
        right.append(int(probs.argmax()) == MODALITIES.index(modality) % len(probs))
    return confidences, right


def is_correct(sample: Sample, answer: str) -> bool:
    """A closed answer is right, or an open one has every word of the truth."""
    return value(sample, answer, None) == 1


def choose(samples: Sequence[Sample], answers: Sequence[str], n: int) -> list[int]:
    """Which questions to show: of each modality one right, one wrong, alternating.

    All of different images, and of different kinds of question as far as there are enough.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        groups[s.modality or "unknown"].append(i)
    names = [name for name in (*MODALITIES, "unknown") if name in groups]
    chosen: list[int] = []
    images, kinds = set(), set()
    for i_round in range(n):
        for name in names:
            free = [i for i in groups[name] if samples[i].image not in images or i not in chosen]
            free = [i for i in free if i not in chosen]
            wanted = [i for i in free if is_correct(samples[i], answers[i]) == (i_round % 2 == 0)]
            pool = wanted or free
            if not pool or len(chosen) == n:
                continue
            used = lambda i: (samples[i].image in images, samples[i].kind in kinds)  # noqa: E731
            best = min(pool, key=used)
            chosen.append(best)
            images.add(samples[best].image)
            kinds.add(samples[best].kind)
    return sorted(chosen, key=lambda i: names.index(samples[i].modality or "unknown"))


def explain(predictor: Predictor, sample: Sample) -> Example:
    """Answer one question again, by itself, and keep every gate."""
    ((_, batch),) = predictor.batches([sample], "example")
    with autocast(predictor.device, predictor.dtype):
        steps = list(generate(predictor.model, batch, predictor.text.eos_id, predictor.max_new))
    answer = unpack(steps, batch.mask, predictor.text)[0].answer
    n_layers = len(steps[0].routings)
    is_patch = (batch.ids[0] == IMAGE_ID).cpu()  # (T,)
    patches = torch.zeros(0, int(is_patch.sum()), 0)
    if n_layers:
        patches = torch.stack([r.gates[0].cpu()[is_patch] for r in steps[0].routings])
    tokens, gates = [], []
    for i, step in enumerate(steps):
        token = int(step.tokens[0])
        if token == predictor.text.eos_id:
            break
        tokens.append(predictor.text.decode([token]))
        # A step's routings are of the token generated in the step before.
        read = steps[i + 1].routings if i + 1 < len(steps) else []
        gates.append(torch.stack([r.gates[0, 0].cpu() for r in read]) if read else None)
    image = None if sample.image is None else predictor.images.get(sample)
    right = is_correct(sample, answer)
    return Example(sample, answer, right, image, patches, tokens, gates)
