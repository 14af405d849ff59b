"""Scores of answers and of routes, each with its definition; intervals for all of them.

An answer is compared after `words`: lower case, no punctuation, no articles. Closed questions are
right or wrong; open ones get the recall of the true answer's words, as LLaVA-Med reports them.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


def words(text: str) -> list[str]:
    """'The left lung, lower.' -> ['left', 'lung', 'lower']; a Chinese character is a word."""
    return [w for w in WORD.findall(text.lower()) if w not in ARTICLES]


def is_exact(answer: str, truth: str) -> bool:
    """The same words in the same order."""
    return words(answer) == words(truth)


def is_right(answer: str, truth: str) -> bool:
    """A closed question: yes and no are looked for as words, any other answer must be exact.

    'No, it is normal' answers no; 'yes and no' answers nothing; 'normal' does not contain no.
    """
    if words(truth) in (["yes"], ["no"]):
        said = {"yes", "no"} & set(words(answer))
        return said == set(words(truth))
    return is_exact(answer, truth)


def recall(answer: str, truth: str) -> float:
    """An open question: the share of the truth's different words that the answer says."""
    wanted = set(words(truth))
    return len(wanted & set(words(answer))) / len(wanted) if wanted else float(not words(answer))


def precision(answer: str, truth: str) -> float:
    """The share of the answer's different words that the truth says."""
    return recall(truth, answer) if words(answer) else float(not words(truth))


def overlap(answer: str, truth: str) -> int:
    """Words in common, each as often as both say it."""
    return (Counter(words(answer)) & Counter(words(truth))).total()


def token_f1(answer: str, truth: str) -> float:
    """2 * common words / all words of both (Rajpurkar et al. 2016, SQuAD)."""
    total = len(words(answer)) + len(words(truth))
    return 2 * overlap(answer, truth) / total if total else 1.0


def bleu1(answer: str, truth: str) -> float:
    """Share of the answer's words that the truth has, less for answers that are too short.

    BLEU with single words (Papineni et al. 2002), one sentence, not smoothed.
    """
    said, wanted = len(words(answer)), len(words(truth))
    if said == 0:
        return float(wanted == 0)
    return overlap(answer, truth) / said * min(1.0, math.exp(1 - wanted / said))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share right / n (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    share, extra = right / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z * np.sqrt(share * (1 - share) / n + extra / n / 4) / (1 + extra)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def bootstrap(values: Sequence[float], groups: Sequence[str], draws: int = 2000) -> tuple:
    """95 % interval of the mean. Whole groups (images) are drawn: their questions are related.

    Always the same draws, so the same values give the same interval.
    """
    if len(values) == 0:
        return 0.0, 1.0
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    totals = np.bincount(index, weights=np.asarray(values, float))  # (G,) per group
    sizes = np.bincount(index)  # (G,)
    rng, means = np.random.default_rng(0), []
    for _ in range(draws):  # one at a time: all at once are gigabytes for a large split
        picks = rng.integers(len(totals), size=len(totals))
        means.append(totals[picks].sum() / sizes[picks].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of as uneven a split of the questions that only one of two got right.

    McNemar 1947, with the binomial distribution in place of chi squared.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    whole = math.lgamma(n + 1) - n * math.log(2)
    logs = (whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def confusion(truth: Sequence[int], said: Sequence[int], n_classes: int) -> np.ndarray:
    """(n_classes, n_classes) counts, rows the truth, columns what was said."""
    table = np.zeros((n_classes, n_classes), dtype=int)
    np.add.at(table, (np.asarray(truth, int), np.asarray(said, int)), 1)
    return table


def f1_scores(table: np.ndarray) -> list[float | None]:
    """Per class 2 * hits / (times true + times said); None for a class that never occurs."""
    hits, true, said = np.diag(table), table.sum(1), table.sum(0)
    return [
        float(2 * h / (t + s)) if t + s else None for h, t, s in zip(hits, true, said, strict=True)
    ]


def router_report(truth: Sequence[int], said: Sequence[int], names: Sequence[str]) -> dict:
    """Accuracy with its interval, the confusion table and F1 per class."""
    table = confusion(truth, said, len(names))
    n, right = len(truth), int(np.trace(table))
    return {
        "n": n,
        "accuracy": right / n if n else 0.0,
        "ci95": wilson(right, n),
        "confusion": table.tolist(),
        "f1": dict(zip(names, f1_scores(table), strict=True)),
        "labels": list(names),
    }


def format_confusion(report: dict) -> str:
    """The confusion table as text, rows the truth."""
    names = report["labels"]
    lines = [" " * 14 + "".join(f"{name:>11}" for name in names) + "         F1"]
    for name, row in zip(names, report["confusion"], strict=True):
        f1 = report["f1"][name]
        cells = "".join(f"{count:>11}" for count in row)
        lines.append(f"  {name:<12}{cells}{'-' if f1 is None else format(f1, '.3f'):>11}")
    return "\n".join(lines)
