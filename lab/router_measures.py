"""The parts of lab.router's report, as numbers: accuracy, unknown images, answers, information.

Shapes: n questions, G images, L sparse layers, K kinds of token, M modalities, E experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import numpy as np

from config import MODALITIES, UserError
from data import Sample
from eval import Prediction, Predictor
from lab.forced_routers import Alone, ByModality, Without, forced
from lab.router_probe import KINDS, UNKNOWN, ByImage, Probe, describe, probabilities, probe
from lab.router_stats import (
    bootstrapped,
    ece,
    information,
    macro_f1,
    reliability,
    share,
)
from metrics import bootstrap, mean, router_report
from scoring.compare import value


def expert_names(n_experts: int) -> list[str]:
    """The modality of each expert, modality index % E as everywhere, or its number."""
    return [*MODALITIES, *(f"expert {e}" for e in range(len(MODALITIES), n_experts))][:n_experts]


def naming(images: ByImage, found: Probe, n_bins: int) -> dict | None:
    """Accuracy, F1 and calibration of the mean logits over prompts and layers as a classifier."""
    rows = images.truth >= 0
    if not rows.any():
        return None
    logits = images.mean(found.logits.mean(dim=1).numpy())[rows]  # (G, E)
    n_experts = logits.shape[1]
    truth, predicted = images.truth[rows] % n_experts, logits.argmax(axis=1)
    confidence, right = probabilities(logits)[1], predicted == truth
    report = router_report(truth.tolist(), predicted.tolist(), expert_names(n_experts))
    return report | {
        "macro_f1": bootstrapped(lambda i: macro_f1(truth[i], predicted[i], n_experts), len(truth)),
        "confidence": float(confidence.mean()),
        "ece": bootstrapped(lambda i: ece(confidence[i], right[i], n_bins), len(truth)),
        "bins": reliability(confidence, right, n_bins),
    }


def levels(images: ByImage, found: Probe, blocks: Sequence[int]) -> list[dict] | None:
    """By sparse block: accuracy of its own mean logits, and of single positions by kind.

    A kind's accuracy is an image's share of right positions, averaged over the images.
    """
    rows = images.truth >= 0
    if not rows.any():
        return None
    logits = images.mean(found.logits.numpy())[rows]  # (G, L, E)
    counts = images.sum(found.best.numpy())[rows]  # (G, L, K, E)
    truth = images.truth[rows] % logits.shape[-1]
    hits = counts[np.arange(len(truth)), :, :, truth]  # (G, L, K)
    table = []
    for layer, block in enumerate(blocks):
        entry = {"block": block, "pooled": share(logits[:, layer].argmax(axis=1) == truth)}
        for k, kind in enumerate(KINDS):
            total = counts[:, layer, k].sum(axis=1)
            shares = (hits[:, layer, k] / np.maximum(total, 1))[total > 0]
            entry[kind] = bootstrapped(lambda i, s=shares: float(s[i].mean()), len(shares))
        table.append(entry)
    return table


def informed(images: ByImage, found: Probe, blocks: Sequence[int]) -> list[dict] | None:
    """By sparse block: I(expert; modality) of the prompt positions' first choices."""
    rows = images.truth >= 0
    if not rows.any():
        return None
    load = images.sum(found.first.numpy())[rows]  # (G, L, E)
    return [
        {"block": block} | information(load[:, layer], images.truth[rows])
        for layer, block in enumerate(blocks)
    ]


def unknown(predictor: Predictor, samples: Sequence[Sample], others: Sequence[Sample]) -> dict:
    """One question per image, with the image replaced by each of UNKNOWN; and other sources'."""
    one = list({s.image: s for s in reversed(samples)}.values())[::-1]  # each image's first
    logits = probe(predictor, one).logits.mean(dim=1).numpy()
    known = probabilities(logits)[1]
    found = {"known": describe(logits, None)}
    for name, change in UNKNOWN.items():
        found[name] = describe(probe(predictor, one, change).logits.mean(dim=1).numpy(), known)
    for source in dict.fromkeys(s.source for s in others):
        part = list({s.image: s for s in others if s.source == source}.values())
        found[source] = describe(probe(predictor, part).logits.mean(dim=1).numpy(), known)
    return found


def scores(samples: Sequence[Sample], found: Sequence[Prediction]) -> list[float]:
    """A closed answer right or wrong, an open one's recall: eval.py's overall score."""
    return [value(s, p.answer, None) for s, p in zip(samples, found, strict=True)]


def averaged(values: Sequence[float], samples: Sequence[Sample]) -> dict:
    """Mean and its interval by image; None of nothing."""
    images = [str(s.image) for s in samples]
    return {"n": len(values), "mean": mean(values) if len(values) else None,
            "ci95": bootstrap(values, images) if len(values) else None}  # fmt: skip


def against(values: Sequence[float], own: Sequence[float], samples: Sequence[Sample]) -> dict:
    """Mean with a forced routing, and its paired difference from the checkpoint's own routing."""
    found = averaged(values, samples)
    difference = averaged([a - b for a, b in zip(values, own, strict=True)], samples)
    return found | {"difference": difference["mean"], "difference_ci95": difference["ci95"]}


def by_route(samples: Sequence[Sample], own: list[float], found: Sequence[Prediction]) -> dict:
    """Scores of the questions whose modality the router predicts rightly, and of the others.

    Not the effect of the routing: images of which the modality is hard to predict may be harder to
    answer about. The difference's interval is by image; None where either group is empty.
    """
    truth = np.array([MODALITIES.index(s.modality) for s in samples])
    votes = np.stack([p.votes.numpy() for p in found])  # (n, E)
    right, scored = votes.argmax(axis=1) == truth % votes.shape[1], np.array(own)
    images = ByImage(samples)
    sums, counts = ([images.sum(x * group) for group in (right, ~right)]
                    for x in (scored, np.ones(len(samples))))  # fmt: skip

    def gap(rows: np.ndarray) -> float | None:
        n = [c[rows].sum() for c in counts]
        return sums[0][rows].sum() / n[0] - sums[1][rows].sum() / n[1] if all(n) else None

    groups = {}
    for name, group in (("right", right), ("wrong", ~right)):
        part = [s for s, inside in zip(samples, group, strict=True) if inside]
        groups[name] = averaged(scored[group].tolist(), part)
    return groups | {"difference": bootstrapped(gap, len(images.images))}


def with_wrong_experts(
    predictor: Predictor, samples: Sequence[Sample], n_experts: int, seed: int
) -> list[float]:
    """Scores with a wrong expert forced, chosen at random for each image."""
    rng = Random(seed)
    shift = {
        image: rng.randrange(1, n_experts) for image in dict.fromkeys(s.image for s in samples)
    }
    result = [0.0] * len(samples)
    for by in range(1, n_experts):
        rows = [i for i, s in enumerate(samples) if shift[s.image] == by]
        part = [samples[i] for i in rows]
        with forced(predictor.model, partial(ByModality, shift=by)):
            found = predictor.answer(part) if part else []
        for i, scored in zip(rows, scores(part, found), strict=True):
            result[i] = scored
    return result


def answered(predictor: Predictor, samples: Sequence[Sample], seed: int) -> dict:
    """Scores with the checkpoint's own routing and with forced routing; of known modality."""
    routers = [b.mlp.router for b in predictor.model.decoder.blocks if b.is_sparse]
    if not all(router.causal for router in routers):
        raise UserError("a router that looks ahead (causal = False) cannot answer")
    n_experts = predictor.model.config.moe.n_experts
    found = predictor.answer(samples)
    own = scores(samples, found)
    truth = [MODALITIES.index(s.modality) for s in samples]

    def on(make: Callable) -> list[float]:
        with forced(predictor.model, make):
            return scores(samples, predictor.answer(samples))

    alone = [on(partial(Alone, expert=e)) for e in range(n_experts)]
    without = [on(partial(Without, expert=e)) for e in range(n_experts)]
    swap, ablated = {}, {}
    for m in sorted(set(truth)):
        rows = [i for i, t in enumerate(truth) if t == m]
        part, here = [samples[i] for i in rows], [own[i] for i in rows]
        swap[MODALITIES[m]] = [averaged([column[i] for i in rows], part) for column in alone]
        ablated[MODALITIES[m]] = [
            against([column[i] for i in rows], here, part) for column in without
        ]
    result = {
        "n_images": len({s.image for s in samples}),
        "own": averaged(own, samples),
        "by_route": by_route(samples, own, found),
        "true": against(on(ByModality), own, samples),
        "oracle": against([alone[t % n_experts][i] for i, t in enumerate(truth)], own, samples),
        "swap": swap,
        "without": [against(column, own, samples) for column in without],
        "without_by_modality": ablated,
    }
    if n_experts > 1:
        wrong = with_wrong_experts(predictor, samples, n_experts, seed)
        result["wrong"] = against(wrong, own, samples)
    return result
