"""What "right" means: scores of answers and of routers, each with its definition and interval.

An answer is compared after `words`: lower case, no punctuation, no articles, but with signs, units
and comparisons. Closed questions are right or wrong; open ones get the recall of the true answer's
words, as LLaVA-Med reports them.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from config import MODALITIES, UserError, one_line
from data import Sample

ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"""
    [\u3400-\u9fff]                                       # a Chinese character
  | (?: (?<![\w)]) [-+±] (?=\d) )?                        # a sign, and
    (?: \d+\.\d+ | [^\W_\u3400-\u9fff]+ )                 # its number; or any word
  | [<>≤≥%°+] | \A-\Z
""", re.VERBOSE)  # fmt: skip


def words(text: str) -> list[str]:
    """'The left lung, lower.' -> ['left', 'lung', 'lower']; a Chinese character is a word.

    An article has a word behind it: the A of 'hepatitis A' and of 'type A lesion' is none.
    """
    text = text.strip().replace("\u2212", "-").replace("<=", "≤").replace(">=", "≥")
    found = WORD.findall(text)
    return [
        word.lower()
        for i, word in enumerate(found)
        if word.lower() not in ARTICLES or i == len(found) - 1 or (word == "A" and i > 0)
    ]


def is_exact(answer: str, truth: str) -> bool:
    """The same words in the same order."""
    return words(answer) == words(truth)


def is_right(answer: str, truth: str) -> bool:
    """A closed question: yes and no are searched for as words, any other answer must be exact.

    'No, it is normal' means no; 'yes and no' means neither; 'normal' does not contain no.
    """
    if words(truth) in (["yes"], ["no"]):
        return {"yes", "no"} & set(words(answer)) == set(words(truth))
    return is_exact(answer, truth)


def recall(answer: str, truth: str) -> float:
    """An open question: the share of the truth's different words that are in the answer."""
    wanted = set(words(truth))
    return len(wanted & set(words(answer))) / len(wanted) if wanted else float(not words(answer))


def precision(answer: str, truth: str) -> float:
    """The share of the answer's different words that are in the truth."""
    return recall(truth, answer) if words(answer) else float(not words(truth))


def token_f1(answer: str, truth: str) -> float:
    """2 * common words / all words of both (Rajpurkar et al. 2016, SQuAD)."""
    found, wanted = Counter(words(answer)), Counter(words(truth))
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def bleu1(answer: str, truth: str) -> float:
    """BLEU with single words, of one sentence, not smoothed."""
    return unigram_bleu(words(answer), words(truth)) if words(answer) else float(not words(truth))


def unigram_bleu(found: list[str], wanted: list[str]) -> float:
    """Share of the words found that are wanted, less for too few of them (Papineni et al. 2002)."""
    shared = (Counter(found) & Counter(wanted)).total()
    return shared / len(found) * min(1.0, math.exp(1 - len(wanted) / len(found)))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share right / n (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    share, extra = right / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z * np.sqrt(share * (1 - share) / n + extra / n / 4) / (1 + extra)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def images_of(samples: Sequence[Sample]) -> list[str]:
    """The groups of `bootstrap`; a question without an image is one of its own."""
    return [f"question {i}" if s.image is None else str(s.image) for i, s in enumerate(samples)]


def bootstrap(
    values: Sequence[float], groups: Sequence[str], least: float = 0.0, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean of values from `least` to 1, resampling whole groups (images).

    Their questions are related; those of a single image are resampled by themselves. Where all
    values are equal the interval is as wide as Wilson's, of none among as many groups. The seed is
    fixed: the same values give the same interval.
    """
    if len(values) == 0:
        return least, 1.0
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    if index.max() == 0:
        index = np.arange(len(values))
    if min(values) == max(values):
        half = wilson(0, int(index.max()) + 1)[1]
        return max(least, float(values[0]) - half), min(1.0, float(values[0]) + half)
    totals = np.bincount(index, weights=np.asarray(values, float))  # (G,) per group
    sizes = np.bincount(index)  # (G,)
    rng, means = np.random.default_rng(0), []
    for _ in range(draws):  # one at a time: all at once are gigabytes for a large split
        picks = rng.integers(len(totals), size=len(totals))
        means.append(totals[picks].sum() / sizes[picks].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def confusion(truth: Sequence[int], predicted: Sequence[int], n_classes: int) -> np.ndarray:
    """(n_classes, n_classes) counts, rows the truth, columns the prediction."""
    table = np.zeros((n_classes, n_classes), dtype=int)
    np.add.at(table, (np.asarray(truth, int), np.asarray(predicted, int)), 1)
    return table


def f1_scores(table: np.ndarray) -> list[float | None]:
    """Per class 2 * hits / (times true + times predicted); None for a class that never occurs."""
    hits, true, predicted = np.diag(table), table.sum(1), table.sum(0)
    rows = zip(hits, true, predicted, strict=True)
    return [float(2 * h / (t + p)) if t + p else None for h, t, p in rows]


def router_report(truth: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> dict:
    """Accuracy with its interval, the confusion table and F1 per class."""
    table = confusion(truth, predicted, len(names))
    n, right = len(truth), int(np.trace(table))
    return {
        "n": n,
        "accuracy": right / n if n else 0.0,
        "ci95": wilson(right, n),
        "confusion": table.tolist(),
        "f1": dict(zip(names, f1_scores(table), strict=True)),
        "labels": list(names),
    }


def expert_names(n_experts: int, router: str = "modality") -> list[str]:
    """The modality that each expert is for; numbers of further ones, and of other routers'."""
    named = MODALITIES[:n_experts] if router in ("modality", "oracle") else ()
    return [*named, *(f"expert {e}" for e in range(len(named), n_experts))]


def format_confusion(report: dict) -> str:
    """The confusion table as text, rows the truth."""
    names = report["labels"]
    lines = [" " * 14 + "".join(f"{name:>11}" for name in names) + "         F1"]
    for name, row in zip(names, report["confusion"], strict=True):
        f1 = report["f1"][name]
        cells = "".join(f"{count:>11}" for count in row)
        lines.append(f"  {name:<12}{cells}{'-' if f1 is None else format(f1, '.3f'):>11}")
    return "\n".join(lines)


class Protocol(NamedTuple):
    """How the answers to closed and open questions are scored; see also scoring/protocols.py."""

    closed: Callable[[str, str], float]
    opened: Callable[[str, str], dict[str, float]]


OPEN = {"recall": recall, "precision": precision, "f1": token_f1, "exact_match": is_exact,
        "bleu1": bleu1}  # fmt: skip
STRICT = Protocol(
    closed=lambda answer, truth: float(is_right(answer, truth)),
    opened=lambda answer, truth: {name: float(f(answer, truth)) for name, f in OPEN.items()},
)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def score(samples: Sequence[Sample], answers: Sequence[str], protocol: Protocol = STRICT) -> dict:
    """Fractions, counts and intervals. A question that is not closed counts as open.

    "overall" is the mean over all questions, closed right or wrong and open by recall; "accuracy"
    takes the open ones by exact match, as classifiers over answers report it.
    """
    pairs = list(zip(samples, answers, strict=True))
    closed = [(s, a) for s, a in pairs if s.answer_type == "closed"]
    others = [(s, a) for s, a in pairs if s.answer_type != "closed"]
    groups = images_of([s for s, _ in closed + others])
    right = [protocol.closed(a, s.turns[0][1]) for s, a in closed]
    opened = [protocol.opened(a, s.turns[0][1]) for s, a in others]
    result = {"n": len(samples), "n_closed": len(right), "n_open": len(opened)}
    result["closed_accuracy"] = mean(right)
    intervals = {"closed_accuracy": wilson(int(sum(right)), len(right))}
    for name in OPEN:
        values = [scores[name] for scores in opened]
        result[f"open_{name}"] = mean(values)
        intervals[f"open_{name}"] = bootstrap(values, groups[len(closed) :])
    for name, by in (("overall", "recall"), ("accuracy", "exact_match")):
        values = right + [scores[by] for scores in opened]
        result[name], intervals[name] = mean(values), bootstrap(values, groups)
    return result | {"ci95": intervals}


def majority(samples: Sequence[Sample], train: Sequence[Sample]) -> list[str]:
    """Majority baseline: the most frequent training answer to this kind of question."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for s in train:
        for key in ((s.kind, s.answer_type), (s.answer_type,)):
            counts[key][s.turns[0][1]] += 1
    best = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    return [best.get((s.kind, s.answer_type)) or best.get((s.answer_type,), "") for s in samples]


def split_by(
    samples: Sequence[Sample], answers: Sequence[str], key: Callable[[Sample], str]
) -> dict[str, dict]:
    """The scores of each group of samples with the same key."""
    groups: dict[str, list[tuple[Sample, str]]] = defaultdict(list)
    for s, answer in zip(samples, answers, strict=True):
        groups[key(s)].append((s, answer))
    return {name: score(*zip(*rows, strict=True)) for name, rows in sorted(groups.items())}


def question_ids(samples: Sequence[Sample]) -> list[str]:
    """The ids that predictions are joined by: the source's own; of several sources, "source/id"."""
    several = len({s.source for s in samples}) > 1
    ids = [f"{s.source}/{s.id}" if several else s.id for s in samples]
    twice = [name for name, n in Counter(ids).items() if n > 1]
    if twice:
        raise UserError(f"question {twice[0]} is in the data {ids.count(twice[0])} times")
    return ids


def show(name: str, s: dict) -> str:
    """One line of the table of scores."""

    def part(key: str, n: int) -> str:
        low, high = s["ci95"][key]
        cell = f"{s[key]:6.1%} [{low:.1%}, {high:.1%}] {n:>5}" if n else "-"
        return f"{cell:<30}"

    cells = part("closed_accuracy", s["n_closed"]) + part("open_recall", s["n_open"])
    return f"  {one_line(name, 40):<22}{cells}{part('overall', s['n'])}{s['accuracy']:6.1%}"


HEADER = (" " * 24 + "closed accuracy, 95 %, n".ljust(30) + "open recall, 95 %, n".ljust(30)
          + "together, 95 %, n".ljust(30) + " exact")  # fmt: skip
