"""Classification as questions: the class names are the possible answers (paper, Table 3).

A class's score is the likelihood of its name as the whole answer, end token included, after image
and question. Accuracy and AUC of the scores are MedMNIST's; next to them, how often the
generated answer is the class's name.

Shapes: C options, N images, L labels an image.
"""

from collections.abc import Sequence

import numpy as np

from data import Sample
from metrics import bootstrap, images_of, is_exact, wilson
from sources import medmnist


def judge_classes(samples: Sequence[Sample], answers: Sequence[str], likely: np.ndarray) -> dict:
    """Accuracy and AUC of one set's questions, with 95 % intervals.

    likely (n, C): probability of each option; one row a question, a label's yes-or-no included.
    {} where --limit leaves no image with all of its labels.
    """
    known = medmnist.SETS[samples[0].source]
    task, n_labels = known.task, len(known.classes)
    if task == "multi-label":  # L questions an image, in order; --limit may cut the last one's
        n = len(samples) // n_labels * n_labels
        if not n:
            return {}
        samples, answers, likely = samples[:n], answers[:n], likely[:n]
    right = [float(is_exact(a, s.turns[0][1])) for s, a in zip(samples, answers, strict=True)]
    truth = np.array([s.options.index(s.turns[0][1]) for s in samples])
    if task == "multi-label":
        truth, likely = (x.reshape(-1, n_labels) for x in (truth, likely[:, 1]))  # (N, L)
    by_score = medmnist.accuracy(truth, likely, task)
    if task == "multi-label":
        hits = ((likely > 0.5) == truth).mean(axis=1)
        score_interval = bootstrap(hits, [str(i) for i in range(len(hits))])
        answer_interval = bootstrap(right, images_of(samples))
    else:
        score_interval = wilson(round(by_score * len(truth)), len(truth))
        answer_interval = wilson(int(sum(right)), len(right))
    return {
        "n": len(truth),
        "task": task,
        "likelihood_accuracy": by_score,
        "generation_accuracy": sum(right) / len(right),
        "auc": medmnist.auc(truth, likely, task),
        "ci95": {"likelihood_accuracy": score_interval, "generation_accuracy": answer_interval,
                 "auc": auc_interval(truth, likely, task)},
    }  # fmt: skip


def auc_interval(truth: np.ndarray, likely: np.ndarray, task: str) -> tuple[float, float]:
    """Bootstrap over images; samples that lack a class have no AUC and are left out."""
    rng, found = np.random.default_rng(0), []
    for _ in range(500):
        picks = rng.integers(len(truth), size=len(truth))
        found.append(medmnist.auc(truth[picks], likely[picks], task))
    known = [value for value in found if value is not None]
    return tuple(float(x) for x in np.quantile(known, [0.025, 0.975])) if known else (0.0, 1.0)


def show_classes(name: str, found: dict) -> str:
    parts = []
    for key, title in (("likelihood_accuracy", "accuracy by likelihood"),
                       ("generation_accuracy", "by generation"), ("auc", "AUC")):  # fmt: skip
        low, high = found["ci95"][key]
        value = "undefined" if found[key] is None else f"{found[key]:.3f} [{low:.3f}, {high:.3f}]"
        parts.append(f"{title} {value}")
    return f"{name}, {found['n']} images: {', '.join(parts)}"
