"""Answers against the truth, under three protocols side by side, with 95 % intervals.

    strict     ours: normalised words; closed questions whole, yes and no as words (metrics.py)
    med-moe    the released scorers, quirks included (benchmarks/protocols.py)
    llava-med

Accuracies have Wilson's interval; means of recall and the like a bootstrap's, by image. Answers of
others come as JSONL and are joined to the questions by their identifiers, never by their order.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.protocols import LLAVA_MED, MED_MOE, Protocol
from config import UserError
from metrics import (
    bleu1,
    bootstrap,
    is_exact,
    is_right,
    mcnemar,
    precision,
    recall,
    token_f1,
    wilson,
    words,
)
from records import Record, Sample, one_line, read_json_file, read_lines, warn_once

OPEN = {"recall": recall, "precision": precision, "f1": token_f1, "exact_match": is_exact,
        "bleu1": bleu1}  # fmt: skip
STRICT = Protocol(
    closed=lambda answer, truth: float(is_right(answer, truth)),
    opened=lambda answer, truth: {name: float(f(answer, truth)) for name, f in OPEN.items()},
)
PROTOCOLS = {"strict": STRICT, "med-moe": MED_MOE, "llava-med": LLAVA_MED}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def score(samples: Sequence[Sample], answers: Sequence[str], protocol: Protocol = STRICT) -> dict:
    """Fractions, counts and intervals. A question that is not closed counts as open.

    "overall" is the mean over all questions, closed right or wrong and open by recall; "accuracy"
    takes the open ones by exact match, as classifiers over answers report it.
    """
    truths = [s.turns[0][1] for s in samples]
    is_closed = [s.answer_type == "closed" for s in samples]
    images = [str(s.image) for s in samples]
    shown_closed = [image for image, c in zip(images, is_closed, strict=True) if c]
    shown_open = [image for image, c in zip(images, is_closed, strict=True) if not c]
    right = [protocol.closed(a, t) for a, t, c in zip(answers, truths, is_closed, strict=True) if c]
    opened = [
        protocol.opened(a, t) for a, t, c in zip(answers, truths, is_closed, strict=True) if not c
    ]
    result = {"n": len(samples), "n_closed": len(right), "n_open": len(opened)}
    result["closed_accuracy"] = mean(right)
    intervals = {"closed_accuracy": wilson(int(sum(right)), len(right))}
    for name in OPEN:
        values = [scores[name] for scores in opened]
        result[f"open_{name}"] = mean(values)
        intervals[f"open_{name}"] = bootstrap(values, shown_open)
    for name, by in (("overall", "recall"), ("accuracy", "exact_match")):
        values = right + [scores[by] for scores in opened]
        result[name], intervals[name] = mean(values), bootstrap(values, shown_closed + shown_open)
    return result | {"ci95": intervals}


def under_all(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, dict]:
    return {name: score(samples, answers, protocol) for name, protocol in PROTOCOLS.items()}


def majority(samples: Sequence[Sample], train: Sequence[Sample]) -> list[str]:
    """A control that sees neither image nor question: the kind's commonest training answer."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for s in train:
        for key in ((s.kind, s.answer_type), (s.answer_type,)):
            counts[key][s.turns[0][1]] += 1
    best = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    return [best.get((s.kind, s.answer_type)) or best.get((s.answer_type,), "") for s in samples]


def split_by(
    samples: Sequence[Sample], answers: Sequence[str], key: Callable[[Sample], str]
) -> dict[str, dict]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        groups[key(s)].append(i)
    return {
        name: score([samples[i] for i in rows], [answers[i] for i in rows])
        for name, rows in sorted(groups.items())
    }


def question_ids(samples: Sequence[Sample]) -> list[str]:
    """What predictions are joined by: the source's own identifiers; of several, "source/id"."""
    several = len({s.source for s in samples}) > 1
    ids = [f"{s.source}/{s.id}" if several else s.id for s in samples]
    twice = [name for name, n in Counter(ids).items() if n > 1]
    if twice:
        raise UserError(f"question {twice[0]} is in the data {ids.count(twice[0])} times")
    return ids


def read_predictions(file: Path, samples: Sequence[Sample]) -> list[str]:
    """JSONL of {"question_id", "text"} -> the answers in the samples' order.

    Raises UserError for an identifier that is missing, twice there or not among the questions.
    """
    questions = dict(zip(question_ids(samples), samples, strict=True))
    answers: dict[str, tuple[str, Record]] = {}
    n_strange = 0
    for record in answer_records(file):
        name = record.text_or_number("question_id")
        if name not in questions:
            record.fail("question_id", f"one of the {len(samples)} questions' (another split?)")
        if name in answers:
            record.fail("question_id", f"another than that of line {answers[name][1].number}")
        if not isinstance(record.values.get("text"), str):
            record.fail("text", "a text")
        answers[name] = record.values["text"], record
        prompt = record.values.get("prompt")
        asked = " ".join(words(questions[name].turns[0][0]))
        n_strange += isinstance(prompt, str) and asked not in " ".join(words(prompt))
    if missing := [name for name in questions if name not in answers]:
        named = ", ".join(missing[:5])
        raise UserError(f"{file}: {len(missing)} of {len(questions)} answers are missing: {named}")
    if n_strange:
        warn_once(f"{file}: {n_strange} of {len(answers)} prompts do not hold the question of "
                  "their question_id")  # fmt: skip
    return [answers[name][0] for name in questions]


def answer_records(file: Path) -> Iterator[Record]:
    """The lines of a JSONL file, or the "answers" of what eval.py --json wrote."""
    if file.suffix != ".json":
        yield from read_lines(file)
        return
    values = read_json_file(file)
    answers = values.get("answers") if isinstance(values, dict) else None
    if not isinstance(answers, dict):
        raise UserError(f'{file}: no "answers" in it: not what eval.py --json wrote')
    for number, (name, text) in enumerate(answers.items()):
        yield Record(file, number, {"question_id": name, "text": text})


def compare(samples: Sequence[Sample], first: Sequence[str], second: Sequence[str]) -> dict:
    """Two sets of answers to the same questions: paired differences, second minus first.

    "closed" and "exact" are right or wrong, so McNemar's test is of them; "recall" and "overall"
    are fractions, with an interval only.
    """
    found = {}
    for name, rows, judge in (
        ("closed", [s.answer_type == "closed" for s in samples], STRICT.closed),
        ("recall", [s.answer_type != "closed" for s in samples], recall),
        ("overall", [True for _ in samples], None),
        ("exact", [True for _ in samples], is_exact),
    ):
        part = [row for row in zip(samples, first, second, rows, strict=True) if row[-1]]
        pairs = [tuple(value(s, a, judge) for a in (a1, a2)) for s, a1, a2, _ in part]
        difference = [after - before for before, after in pairs]
        entry = {"n": len(part), "difference": mean(difference),
                 "ci95": bootstrap(difference, [str(s.image) for s, *_ in part])
                 if part else (-1.0, 1.0)}  # fmt: skip
        if name in ("closed", "exact"):
            entry["only_first"] = sum(before > after for before, after in pairs)
            entry["only_second"] = sum(after > before for before, after in pairs)
            entry["mcnemar_p"] = mcnemar(entry["only_first"], entry["only_second"])
        found[name] = entry
    return found


def value(s: Sample, answer: str, judge: Callable | None) -> float:
    """One answer's score; without a judge a closed question's or a recall, as its type asks."""
    judge = judge or (STRICT.closed if s.answer_type == "closed" else recall)
    return float(judge(answer, s.turns[0][1]))


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


def show_protocols(found: dict[str, dict]) -> str:
    """The same answers under each protocol, all their numbers."""
    names = ["closed_accuracy", *(f"open_{name}" for name in OPEN)]
    lines = [" " * 24 + "".join(name.replace("_", " ").ljust(24) for name in names)]
    for protocol, s in found.items():
        cells = ""
        for name in names:
            low, high = s["ci95"][name]
            n = s["n_closed" if name.startswith("closed") else "n_open"]
            cells += (f"{s[name]:.1%} [{low:.1%}, {high:.1%}]" if n else "-").ljust(24)
        lines.append(f"  {protocol:<22}{cells}")
    return "\n".join(lines)


def show_comparison(found: dict[str, dict]) -> str:
    lines = ["second minus first, on the same questions"]
    for name, part in found.items():
        low, high = part["ci95"]
        test = ""
        if "mcnemar_p" in part:
            test = (f"  only first right {part['only_first']}, only second "
                    f"{part['only_second']}, McNemar p = {part['mcnemar_p']:.3g}")  # fmt: skip
        lines.append(f"  {name:<10}{part['difference']:+7.1%} [{low:+.1%}, {high:+.1%}]"
                     f" n {part['n']}{test}")  # fmt: skip
    return "\n".join(lines)
