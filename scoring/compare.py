"""Existing answers: joined to the questions by id, scored, compared in pairs.

    eval.py --predictions FILE    scores anyone's answers
    eval.py --compare A B         two sets of answers to the same questions

Answers come as JSONL, or as eval.py --json wrote them; never joined by their order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from config import UserError, warn_once
from data import Sample
from metrics import (
    OPEN,
    STRICT,
    bootstrap,
    images_of,
    is_exact,
    mean,
    question_ids,
    recall,
    score,
    words,
)
from scoring import leaks
from scoring.protocols import LLAVA_MED, MED_MOE
from sources.records import Record, read_json, read_lines

PROTOCOLS = {"strict": STRICT, "med-moe": MED_MOE, "llava-med": LLAVA_MED}


def under_all(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, dict]:
    return {name: score(samples, answers, protocol) for name, protocol in PROTOCOLS.items()}


def read_predictions(file: Path, samples: Sequence[Sample]) -> list[str]:
    """JSONL of {"question_id", "text"} -> the answers in the samples' order.

    Raises UserError for an identifier that is missing, twice there or not among the questions.
    """
    questions = dict(zip(question_ids(samples), samples, strict=True))
    answers: dict[str, tuple[str, Record]] = {}
    n_other = 0
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
        question = " ".join(words(questions[name].turns[0][0]))
        n_other += isinstance(prompt, str) and question not in " ".join(words(prompt))
    if missing := [name for name in questions if name not in answers]:
        named = ", ".join(missing[:5])
        raise UserError(f"{file}: {len(missing)} of {len(questions)} answers are missing: {named}")
    if n_other:
        warn_once(f"{file}: {n_other} of {len(answers)} prompts do not hold the question of "
                  "their question_id")  # fmt: skip
    return [answers[name][0] for name in questions]


def answer_records(file: Path) -> Iterator[Record]:
    """The lines of a JSONL file, or the "answers" of what eval.py --json wrote."""
    if file.suffix != ".json":
        yield from read_lines(file)
        return
    values = read_json(file)
    answers = values.get("answers") if isinstance(values, dict) else None
    if not isinstance(answers, dict):
        raise UserError(f'{file}: no "answers" in it: not what eval.py --json wrote')
    for number, (name, text) in enumerate(answers.items()):
        yield Record(file, number, {"question_id": name, "text": text})


def read_answers(files: Sequence[str], samples: list[Sample]) -> list[list[str]]:
    """One list for each file. Raises UserError where eval.py wrote it for another split."""
    found = [read_predictions(Path(file), samples) for file in files]
    ours = leaks.fingerprint(samples)
    for file in files:
        result = read_json(Path(file)) if file.endswith(".json") else {}
        report = result.get("leaks")
        split = report.get("fingerprint") if isinstance(report, dict) else None
        if split not in (None, ours):
            raise UserError(f"{file}: answers to the split {split}, these questions are {ours}")
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of the questions that only one of two models got right.

    McNemar 1947, with the binomial distribution in place of chi squared.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    constant = math.lgamma(n + 1) - n * math.log(2)
    logs = (constant - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def compare(samples: Sequence[Sample], first: Sequence[str], second: Sequence[str]) -> dict:
    """Two sets of answers to the same questions: paired differences, second minus first.

    "closed" and "exact" are right or wrong, so McNemar's test is of them; "recall" and "overall"
    are fractions, with an interval only.
    """
    found, rows = {}, list(zip(samples, first, second, strict=True))
    closed = [row for row in rows if row[0].answer_type == "closed"]
    others = [row for row in rows if row[0].answer_type != "closed"]
    for name, part, judge in (("closed", closed, STRICT.closed), ("recall", others, recall),
                              ("overall", rows, None), ("exact", rows, is_exact)):  # fmt: skip
        pairs = [(value(s, a, judge), value(s, b, judge)) for s, a, b in part]
        difference = [after - before for before, after in pairs]
        interval = bootstrap(difference, images_of([s for s, _, _ in part]), least=-1.0)
        entry = {"n": len(part), "difference": mean(difference), "ci95": interval}
        if name in ("closed", "exact"):
            entry["only_first"] = sum(before > after for before, after in pairs)
            entry["only_second"] = sum(after > before for before, after in pairs)
            entry["mcnemar_p"] = mcnemar(entry["only_first"], entry["only_second"])
        found[name] = entry
    return found


def value(s: Sample, answer: str, judge: Callable | None) -> float:
    """One answer's score; without a judge right or wrong if closed, else its recall."""
    judge = judge or (STRICT.closed if s.answer_type == "closed" else recall)
    return float(judge(answer, s.turns[0][1]))


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
