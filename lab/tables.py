"""The paper's result tables with ours beside them, as markdown.

    python -m lab.tables [--results DIR]

Ours are what `eval.py CHECKPOINT --json FILE` wrote to DIR. Files that differ in their seed
only are one row. The paper is arXiv 2404.10237v3, its numbers are as printed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError, flag
from engine.cli import parse, user_errors
from sources.records import read_json, shown

COMMANDS = ("trained_with", "command")
# Flags that change neither training nor the questions, or that follow from the rest of a row.
TRAIN_SKIPS = {"phase", "preset", "data", "out", "seed", "init", "device", "dtype", "resume",
               "save-every", "no-eval", "workers", "max-missing", "tune-vision", "no-tune-vision",
               "jitter", "no-jitter", "json", "max-bad", "follow-links", "overwrite"}  # fmt: skip
FLAG = r"(?<!\S)--([\w-]+)(?:[ =](?!--)(\S+))?"
EVAL_KEEPS = {"lang", "limit", "max-new", "router-level"}
SCORERS = ("strict", "med-moe", "llava-med")
PARTS = {"": "", "blind.": "blind control, ", "majority.": "majority baseline, "}
# Of each table also our rows: label, pattern of a run's name, columns as in cell().
PAPER = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TablesConfig:
    """The paper's result tables with ours beside them."""

    results: str = flag(str(Path(__file__).parent.parent / "results"), "DIR of our results")


def data_name(specs: list[str]) -> str:
    """slake:DIR -> slake; medmnist:DIR/pneumoniamnist_128.npz -> pneumoniamnist; several: a+b."""
    pattern = r"medmnist:(?:.*/)?(\w*?mnist).*|([\w-]*).*"
    return "+".join(filter(None, (n for s in specs for n in re.fullmatch(pattern, s).groups())))


class Result:
    """One file. Results of one name are rows of one model: they differ in data and seed only."""

    def __init__(self, file: Path):
        self.file, self.values = file, read_json(file)
        self.seed, phase = self.get("seed", int), self.get("phase", int)
        self.preset, self.device, split = (self.get(k, str) for k in ("preset", "device", "split"))
        data = data_name([str(spec) for spec in self.get("data", list)])
        self.dataset = f"{data} ({split})" if split != "test" else data
        self.n, n = self.get("n", int), self.get("params.activated", int)
        is_dense = self.get("params.total", int) == self.get("params.dense_base", int)
        self.get("protocols.strict", dict)
        self.activated = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
        trained, evaluated = (re.findall(FLAG, self.get(key, str)) for key in COMMANDS)
        learnt = [value for name, value in trained if name == "data"]
        changed = {f for f in trained if f[0] not in TRAIN_SKIPS}
        changed |= {f for f in evaluated if f[0] in EVAL_KEEPS}
        self.setup = ["dense"] * is_dense + [f"phase {phase}"] * (phase != 3)
        self.setup += [f"trained on {' '.join(learnt)}"] * (data_name(learnt) not in ("", data))
        self.setup += [f"--{' '.join(f)}".strip() for f in sorted(changed)]
        self.name = ", ".join([self.preset, *self.setup])

    def get(self, path: str, *kinds: type) -> Any:
        value = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) not in kinds:
            problem = "missing" if value is None else f"{shown(value)}, not {kinds[0].__name__}"
            raise UserError(f'{self.file}: field "{path}" is {problem}')
        return value

    def share(self, path: str) -> list[float]:
        """-> percentage and the ends of its 95 % interval, if given; []: nothing to score."""
        holder, _, metric = path.rpartition(".")
        known = self.get(holder, dict)
        if self.dataset in known:  # classification, set by set
            return self.share(f"{holder}.{self.dataset}.{metric}")
        n = known.get("n_" + metric.split("_")[0], known.get("n"))
        if n == 0 or (metric == "auc" and known.get(metric, 0) is None):  # a class does not occur
            return []
        ends = known.get("ci95") or []
        ends = ends.get(metric, []) if isinstance(ends, dict) else ends
        shares = [self.get(path, float, int), *ends]
        if not all(0 <= x <= 1 for x in shares):
            raise UserError(f'{self.file}: field "{path}" or its ci95 is no share: {shares}')
        return [100 * x for x in shares]


def cell(results: list[Result], column: str) -> str:
    """column: 'DATA/FIELD'; 'activated', parameters; or '', not measured by our runs."""
    if column == "activated":
        return results[0].activated
    data, _, path = column.partition("/")
    having = [r for r in results if r.dataset == data and r.values.get(path.split(".")[0])]
    shares = [share for r in having if (share := r.share(path))]
    if not shares:
        return "-" if having else "not run"
    values = [share[0] for share in shares]
    text = f"{sum(values) / len(values):.1f}"
    if len(values) > 1:
        text += f" ({min(values):.1f}-{max(values):.1f} over {len(values)} seeds)"
    ends = [share[1:] for share in shares if share[1:]]
    low, high = max(ends, key=lambda pair: pair[1] - pair[0], default=(0, 0))
    return f"{text} [{low:.1f}, {high:.1f}]" if ends else text


def origin(results: list[Result]) -> str:
    """What was run for one model and data set."""
    commands = [r.values[key] for key in COMMANDS for r in results]
    if len(results) > 1:
        commands = [re.sub(r" --seed[ =]\d+", "", command) for command in commands]
    seeds = ", ".join(str(r.seed) for r in results)
    where = f"{seeds}; {', '.join(sorted({r.device for r in results}))}"
    code = ", ".join(f"`{command}`" for command in dict.fromkeys(commands))
    return f"- {results[0].dataset}, n {results[0].n}, {results[0].name}; --seed {where}: {code}"


def render(models: dict, title: str, header: str, paper: list, note: str, ours: list) -> str:
    rows, origins = [header, "---" + " | ---" * header.count("|"), *paper], {}
    for label, pattern, wanted in ours:
        datasets = {column.partition("/")[0] for column in wanted if "/" in column}
        found = []
        for name, results in models.items():
            used = [r for r in results if not datasets or r.dataset in datasets]
            if used and re.search(pattern, name):
                found.append([f"{label}: {name}", *(cell(used, column) for column in wanted)])
                for data in sorted({r.dataset for r in used}):
                    origins[origin([r for r in used if r.dataset == data])] = None
        rows += map(" | ".join, found or [[label, *["not run"] * len(wanted)]])
    table = "\n".join(f"| {row} |" for row in rows)
    return "\n\n".join(filter(None, [f"## {title}", table, note, "\n".join(origins)])) + "\n"


def report(models: dict[str, list[Result]]) -> str:
    """All tables. What they print is read here: a mistake in a file is a UserError."""
    scores = [f"protocols.{s}.{m}" for m in ("closed_accuracy", "open_recall") for s in SCORERS]
    datasets = sorted({r.dataset for group in models.values() for r in group}) or ["ours"]
    ours = [
        (title + d, "", [*(f"{d}/{part}{s}" for s in scores), f"{d}/router.accuracy" * (not part)])
        for d in datasets
        for part, title in PARTS.items()
    ]
    header = " | ".join(["data", *(f"{kind} {s}" for kind in ("closed", "open") for s in SCORERS)])
    tables = [render(models, **table) for table in PAPER["tables"]]
    title, note = "One set of answers, three scorers", "\n".join(PAPER["scorers"])
    tables.append(render(models, title, f"{header} | router", [], note, ours))
    return "\n".join(["\n".join(PAPER["reading"]) + "\n", *tables])


def load(files: list[Path]) -> dict[str, list[Result]]:
    """Name of a model -> its results, by seed. Raises UserError for two of one seed."""
    models = {}
    for result in sorted(map(Result, files), key=lambda r: (r.name, r.seed)):
        for other in models.setdefault(result.name, []):
            if (other.dataset, other.seed) == (result.dataset, result.seed):
                raise UserError(f"{other.file}, {result.file}: two of one model, data set and seed")
        models[result.name].append(result)
    return models


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(TablesConfig, argv, "python -m lab.tables")
    print(report(load(sorted(Path(flags.results).glob("*.json")))))


if __name__ == "__main__":
    main()
