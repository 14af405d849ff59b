"""Classification as questions: the class names are the answers there are (paper, Table 3).

A class's score is the likelihood of its name as the whole answer, end token included, given image
and question. Accuracy and AUC of the scores are MedMNIST's; beside them stands how often the
answer that is generated freely is the class's name.

Shapes: B batch, C options, n tokens of an option, V vocabulary, N images, L labels an image.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks import medmnist
from data import Batch
from decoder import Cache
from metrics import bootstrap, is_exact, wilson
from model import MedMoE
from records import Sample
from routers import Hints

AUC_DRAWS = 500  # bootstrap samples of its interval


@torch.no_grad()
def option_likelihoods(model: MedMoE, batch: Batch, options: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each option (token ids that end with the end token), (B, C) fp32.

    batch is padded on the left. The prompt is computed once; every option goes on from its cache.
    """
    cache = Cache(len(model.decoder.blocks))
    hints = Hints(prompt=batch.mask, modality=batch.modality)
    hidden, _ = model(batch.ids, batch.mask, batch.images, hints, cache)
    first = model.decoder.lm_head(hidden[:, -1]).float().log_softmax(dim=-1)  # (B, V)
    scores = []
    for option in options:
        ids = torch.tensor(option, device=first.device).expand(len(first), -1)  # (B, n)
        total = first.gather(1, ids[:, :1])  # (B, 1)
        if len(option) > 1:
            said, real = ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool)
            later = hints._replace(prompt=None)
            hidden, _ = model(said, real, batch.images[:0], later, cache.fork())
            logs = model.decoder.lm_head(hidden).float().log_softmax(dim=-1)  # (B, n - 1, V)
            total = total + logs.gather(2, ids[:, 1:, None]).sum(dim=1)
        scores.append(total)
    return torch.cat(scores, dim=1)


def judge_classes(samples: Sequence[Sample], answers: Sequence[str], likely: np.ndarray) -> dict:
    """Accuracy and AUC of one set's questions, with 95 % intervals.

    likely (n, C): probability of each option; one row a question, a label's yes-or-no included.
    {} where --limit leaves no image with all of its labels.
    """
    known = medmnist.SETS[samples[0].source]
    task, n_labels = known.task, len(known.classes)
    if task == "multi-label":  # L questions an image, in order; --limit may cut the last one's
        count = Counter(s.image for s in samples)
        whole = [i for i, s in enumerate(samples) if count[s.image] == n_labels]
        samples, answers = [samples[i] for i in whole], [answers[i] for i in whole]
        likely = likely[whole]
        if not samples:
            return {}
    right = [float(is_exact(a, s.turns[0][1])) for s, a in zip(samples, answers, strict=True)]
    images = [str(s.image) for s in samples]
    truth = np.array([s.options.index(s.turns[0][1]) for s in samples])
    if task == "multi-label":
        truth, likely = (x.reshape(-1, n_labels) for x in (truth, likely[:, 1]))  # (N, L)
    by_score = medmnist.accuracy(truth, likely, task)
    if task == "multi-label":
        hits = ((likely > 0.5) == truth).mean(axis=1)
        score_interval = bootstrap(hits, [str(i) for i in range(len(hits))])
        word_interval = bootstrap(right, images)
    else:
        score_interval = wilson(round(by_score * len(truth)), len(truth))
        word_interval = wilson(int(sum(right)), len(right))
    return {
        "n": len(truth),
        "task": task,
        "likelihood_accuracy": by_score,
        "generation_accuracy": sum(right) / len(right),
        "auc": medmnist.auc(truth, likely, task),
        "ci95": {"likelihood_accuracy": score_interval, "generation_accuracy": word_interval,
                 "auc": auc_interval(truth, likely, task)},
    }  # fmt: skip


def auc_interval(truth: np.ndarray, likely: np.ndarray, task: str) -> tuple[float, float]:
    """Bootstrap over images; draws that lack a class have no AUC and are left out."""
    rng, found = np.random.default_rng(0), []
    for _ in range(AUC_DRAWS):
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
