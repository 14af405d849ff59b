"""What the routes are worth: do they know the modality, and what does a wrong expert know?

Shapes: B batch, T positions, L sparse layers, E experts, M modalities.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from config import MODALITIES
from data import Dataset, Sample
from engine.routes import replaced_routers
from metrics import is_exact
from model import MedMoE, autocast, make_router, sparse_layers
from routers import Hints
from sources import signs
from sources.records import read_json

MEASURED = Path(__file__).parent.parent / "results/ablations/facts.json"


def facts_by_expert(
    predictor: Any, samples: Sequence[Sample], answers: Sequence[str], blind: Sequence[str] = ()
) -> dict:
    """The share of open questions about signs that is right: of these answers, by single experts.

    majority     of what each sign means in most modalities
    blind        of the answers without the image; with them also, if the experts are modalities':
    true, wrong  all tokens to the expert of the modality, or to another one: the mean of the three
    {} without such questions.
    """
    model, n = predictor.model, len(MODALITIES)
    rows = [i for i, s in enumerate(samples) if s.kind == "sign" and s.answer_type == "open"]
    asked = [samples[i] for i in rows]
    if not asked:
        return {}

    def share(answers: Sequence[str]) -> float:
        right = [is_exact(a, s.turns[0][1]) for a, s in zip(answers, asked, strict=True)]
        return sum(right) / len(right)

    found: dict[str, Any] = {"n": len(asked), "own": share([answers[i] for i in rows])}
    found["majority"] = share([signs.majority(signs.find(s.turns[0][0])) for s in asked])
    if not blind:
        return found
    found["blind"] = share([blind[i] for i in rows])
    moe = model.config.moe
    if moe is None or moe.router not in ("modality", "oracle") or moe.n_experts != n:
        return found
    layers = sparse_layers(model.config, moe)
    device = next(model.parameters()).device
    routers = [make_router(model.config, replace(moe, router="oracle")).to(device) for _ in layers]
    alone = []
    with replaced_routers(model, routers):
        for shift in range(n):
            others = [MODALITIES[(MODALITIES.index(s.modality) + shift) % n] for s in asked]
            shifted = [replace(s, modality=m) for s, m in zip(asked, others, strict=True)]
            alone.append(share([p.answer for p in predictor.answer(shifted)]))
    return found | {"true": alone[0], "wrong": sum(alone[1:]) / (n - 1)}


def show_facts(facts: dict, flags: dict) -> str:
    """flags: the checkpoint's; what dense FFNs know was measured with those of the default run."""
    text = "facts: {own:.1%} of {n} questions about signs".format(**facts)
    if "blind" in facts:
        text += f" (without the image {facts['blind']:.1%})"
    text += f"; the commonest meaning of each sign: {facts['majority']:.1%}"
    if "true" in facts:
        text += f"\n  by the modality's expert alone {facts['true']:.1%}, "
        text += f"by a wrong one {facts['wrong']:.1%}"
    if flags["preset"] == "tiny" and list(flags["data"]) == ["phantoms"] and MEASURED.is_file():
        known = {row["row"]: row["facts"]["mean"] for row in read_json(MEASURED)["rows"]}
        text += ("\n  dense FFNs after the default run's steps: {dense-activated:.1%} with as many "
                 "activated parameters, {dense-total:.1%} with as many in all "
                 "(results/ablations/facts.md)").format(**known)  # fmt: skip
    return text


def mutual_information(joint: np.ndarray) -> float:
    """I(row; column) in bits of a table of counts (M, E)."""
    p = joint / joint.sum()
    apart = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    return float((p * np.log2(np.where(p > 0, p / np.maximum(apart, 1e-300), 1.0))).sum())


@torch.no_grad()
def information(
    model: MedMoE, data: Dataset, device: torch.device, dtype: torch.dtype, n: int = 200
) -> list[float]:
    """I(a position's first expert; modality) in bits, 2 at most, by sparse layer.

    Of the positions before the first answer, in the first n samples of known modality; [] if there
    are none, or if the model is dense.
    """
    rows = [i for i, s in enumerate(data.samples) if s.modality][:n]
    if model.config.moe is None or not rows:
        return []
    was_training, joint = model.training, 0
    model.eval()
    for part in torch.tensor(rows).split(64):
        batch = data.batch(part.tolist()).to(device)
        hints = Hints(prompt=batch.prompt(), modality=batch.modality)
        with autocast(device, dtype):
            _, routings = model(batch.ids, batch.mask, batch.images, hints)
        gates = torch.stack([r.gates for r in routings]).cpu()  # (L, B, T, E)
        first = F.one_hot(gates.argmax(dim=-1), gates.shape[-1]).double()
        routed = (gates.amax(dim=-1) > 0) & hints.prompt.cpu()  # (L, B, T)
        modality = F.one_hot(batch.modality.cpu(), len(MODALITIES)).double()  # (B, M)
        joint = joint + torch.einsum("lbte,lbt,bm->lme", first, routed.double(), modality)
    model.train(was_training)
    return [mutual_information(table) for table in joint.numpy()]


def show_information(bits: dict) -> str:
    before, after = (", ".join(f"{x:.2f}" for x in bits[name]) for name in ("before", "after"))
    return ("information of a position's first expert about the modality, in bits, in each sparse "
            f"block: {before} before phase 3, {after} after it")  # fmt: skip
