"""Rows of answers to the same questions -> means over seeds, paired differences, table and plot.

Shapes: S seeds, Q questions.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import Sample
from lab.rows import Row
from metrics import bootstrap, question_ids
from scoring.compare import value
from sources.load import how_read, load_samples
from sources.records import read_json

PARTS = ("closed", "open", "together")
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


@functools.cache
def questions(data: tuple[str, ...], split: str) -> tuple[Sample, ...]:
    return tuple(load_samples(data, "vqa", split))


def questions_of(result: dict, file: Path) -> tuple[Sample, ...]:
    known = how_read(result, file)
    return questions(known["data"], known.get("split", "test"))


def values(paths: Sequence[Path]) -> tuple[tuple[Sample, ...], np.ndarray, dict]:
    """Results of one row -> its questions, each answer's score (S, Q), the first one's parameters.

    A closed answer is right or wrong, an open one scored by recall.
    """
    rows, results = [], [read_json(path) for path in paths]
    samples = questions_of(results[0], paths[0])
    for result in results:
        answers = [result["answers"][name] for name in question_ids(samples)]
        rows.append([value(s, answer, None) for s, answer in zip(samples, answers, strict=True)])
    return samples, np.array(rows), results[0]["params"]


def over_seeds(scores: np.ndarray) -> dict[str, float | None]:
    """(S, Q) -> mean and standard deviation of the seeds' means; no deviation of a single one."""
    means = scores.mean(axis=1)
    sd = float(means.std(ddof=1)) if len(means) > 1 else None
    return {"mean": float(means.mean()), "sd": sd}


def paired(scores: np.ndarray, others: np.ndarray, images: Sequence[str]) -> dict:
    """(S, Q) minus (S, Q), same seeds and questions -> the mean and its 95 % intervals.

    "ci95" is a bootstrap over images, with these seeds; "ci95_seeds" Student's over the seeds.
    """
    difference = scores - others
    each = difference.mean(axis=1)  # (S,)
    mean, n = float(each.mean()), len(each)
    found = {"difference": mean, "ci95": bootstrap(difference.mean(axis=0), images)}
    half = None
    if n > 1:
        t = T975[n - 2] if n - 2 < len(T975) else 1.96 + 2.5 / (n - 1)
        half = t * float(each.std(ddof=1)) / math.sqrt(n)
    return found | {"ci95_seeds": None if half is None else (mean - half, mean + half)}


def summarise(rows: dict[str, Row], found: dict[str, list[Path]]) -> list[dict]:
    """One entry a row: rates, parameters, and the difference to the row it is compared with."""
    scored = {name: values(found[name]) for name in rows}
    entries = []
    for name, row in rows.items():
        samples, scores, parameters = scored[name]
        is_closed = np.array([s.answer_type == "closed" for s in samples])
        part = {"closed": scores[:, is_closed], "open": scores[:, ~is_closed], "together": scores}
        entry = {"row": name, "title": row.title, "n_seeds": len(scores),
                 **{k: over_seeds(v) for k, v in part.items()},
                 "parameters": parameters, "against": None}  # fmt: skip
        if row.against != name:
            images = [str(s.image) for s in samples]
            entry["against"] = {"row": row.against,
                                **paired(scores, scored[row.against][1], images)}  # fmt: skip
        entries.append(entry)
    return entries


def percent(entry: dict) -> str:
    sd = "" if entry["sd"] is None else f" ± {entry['sd'] * 100:.1f}"
    return f"{entry['mean'] * 100:.1f}{sd}"


def interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"[{ends[0] * 100:+.1f}, {ends[1] * 100:+.1f}]"


def table(result: dict) -> str:
    """Markdown, with the command and the hash that made it."""
    n = len(result["seeds"])
    lines = [
        f"`{result['command']}`, hash {result['hash']}: percent, mean ± standard deviation over "
        f"{n} seeds; the difference of all answers to another row, with 95 % intervals by images "
        "and by seeds",
        "",
        "| row | closed | open | together | less | difference | by images | by seeds "
        "| activated / total |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        cells = [entry["title"], *(percent(entry[part]) for part in PARTS)]
        if other := entry["against"]:
            cells += [other["row"], f"{other['difference'] * 100:+.1f}", interval(other["ci95"]),
                      interval(other["ci95_seeds"])]  # fmt: skip
        else:
            cells += ["", "", "", ""]
        size = entry["parameters"]
        cells.append(f"{size['activated'] / 1e6:.2f} M / {size['total'] / 1e6:.2f} M")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
