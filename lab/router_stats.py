"""Statistics of a classifier and of its routing; each interval is a bootstrap over images.

Everything is over rows, one per image. Shapes: n images, M modalities, E experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metrics import confusion, f1_scores, wilson
from sources.medmnist import auc

DRAWS = 1000


class Estimate(NamedTuple):
    value: float
    low: float  # 95 % interval
    high: float


def bootstrapped(
    statistic: Callable[[np.ndarray], float | None], n: int, draws: int = DRAWS
) -> Estimate | None:
    """statistic(rows) of all n rows, with the percentile interval over resampled rows.

    Where all rows are equal it has no width, however few they are. Always the same samples; one
    for which the statistic is undefined is left out. None if it is undefined for all rows.
    """
    value = statistic(np.arange(n)) if n else None
    if value is None:
        return None
    rng = np.random.default_rng(0)
    found = (statistic(rng.integers(n, size=n)) for _ in range(draws))
    low, high = np.quantile([x for x in found if x is not None], [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def share(hits: Sequence[bool] | np.ndarray) -> Estimate | None:
    """Share of hits with Wilson's interval; None of nothing."""
    n, right = len(hits), int(np.sum(hits))
    return Estimate(right / n, *wilson(right, n)) if n else None


def macro_f1(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    """Mean F1 over the classes that occur as truth or as prediction."""
    scores = f1_scores(confusion(truth, predicted, n_classes))
    return float(np.mean([s for s in scores if s is not None]))


def reliability(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> list[dict]:
    """Bins of equal width over (0, 1]: mean confidence and accuracy; empty ones too."""
    place = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    rows = []
    for b in range(n_bins):
        inside = place == b
        n, hits = int(inside.sum()), int(right[inside].sum())
        rows.append({
            "low": b / n_bins, "high": (b + 1) / n_bins, "n": n,
            "confidence": float(confidence[inside].mean()) if n else None,
            "accuracy": hits / n if n else None, "ci95": wilson(hits, n),
        })  # fmt: skip
    return rows


def ece(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> float:
    """Expected calibration error: sum over bins of n_b / n * |accuracy_b - confidence_b|.

    Confidence is the largest probability, bins are those of `reliability` (Guo et al. 2017,
    equation 3). It is biased upwards, the more so the fewer images; so is its bootstrap.
    """
    rows = [row for row in reliability(confidence, right, n_bins) if row["n"]]
    gaps = [row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows]
    return sum(gaps) / len(confidence)


def detects(known: np.ndarray, unknown: np.ndarray) -> Estimate | None:
    """AUROC of confidence: the probability that a known image has more than an unknown one.

    0.5 is chance; below it the unknown images get more confidence than the known.
    """
    score = np.concatenate([known, unknown])
    truth = np.repeat([1, 0], [len(known), len(unknown)])

    def area(rows: np.ndarray) -> float | None:
        return auc(truth[rows], np.stack([-score, score], axis=1)[rows], "binary-class")

    return bootstrapped(area, len(score), draws=300)


def entropy(p: np.ndarray) -> np.ndarray:
    """Bits, over the last axis; 0 log 0 is 0."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)


def mutual_information(joint: np.ndarray) -> float:
    """I(row; column) in bits of a table of counts (M, E): H(row) + H(column) - H(both)."""
    p = joint / joint.sum()
    bits = entropy(p.sum(axis=0)) + entropy(p.sum(axis=1)) - entropy(p.ravel())
    return max(0.0, float(bits))


def information(load: np.ndarray, truth: np.ndarray, draws: int = 200) -> dict:
    """Mutual information of a position's expert and the modality.

    load (n, E) counts of an image's positions, truth (n,) its modality. Normalised by H(modality),
    weighted as the positions are: 1 if the expert determines the modality. Null: the same with the
    images' modalities permuted, its mean and its 95 % quantile; with few images it is well above
    0, because an image's positions are routed alike.
    """
    classes = np.eye(truth.max() + 1)[truth]  # (n, M) one-hot

    def bits(rows: np.ndarray) -> float:
        return mutual_information(classes[rows].T @ load[rows])

    rng = np.random.default_rng(0)
    null = [mutual_information(rng.permutation(classes).T @ load) for _ in range(draws)]
    per_class = classes.T @ load.sum(axis=1)  # (M,)
    most = float(entropy(per_class / per_class.sum()))
    found = bootstrapped(bits, len(truth), draws=500)
    return {
        "bits": found, "modality_bits": most,
        "normalised": found.value / most if most else None,
        "null_mean": float(np.mean(null)), "null_q95": float(np.quantile(null, 0.95)),
        "p": (1 + sum(x >= found.value for x in null)) / (1 + draws),
    }  # fmt: skip
