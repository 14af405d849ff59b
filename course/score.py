"""The scoreboard: python -m course.score --assignment 1 --router FILE.py:Class --student ID

Trains phase 3 of the tiny model with the router, for a fixed number of steps and several seeds,
from one common checkpoint of phase 2, and prints a row: the same command gives the same row on
the same machine. It begins with what the assignment is about (LEADS) and with "facts", the share
of questions about signs that the model knows (sources/signs.py): on it routers differ. Rows to
compare with, of a constant router, plain top-k and the reference solution, are in reference/;
--router constant, topk, modality or oracle computes such a row. --picture draws the load.
--verify FILE compares with a row that a student has submitted (--json), number by number.

The images, the seeds and the order of the modalities are derived by SHA-256 from --student and, if
it is set, the environment variable COURSE_SECRET. Without a secret the data of every student can
be reproduced by anyone; with one the data are unknown to the students. A row is verified with the
same secret, or none, that it was made with; a row holds a hash of the secret, so choose a long
one. Other machines and other versions of torch may round differently. The last line is JSON.
"""

import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train
from checkpoint import read_config
from config import MODALITIES, UserError, flag, one_line, preset, to_dict
from course import contain, judge, picture
from course.vet import count_lines, read_submission, vet
from engine.cli import check_outputs, parse, user_errors, write_text
from routers import ROUTERS
from sources.records import read_json


@dataclass(frozen=True)
class Budget:
    """The same for all submissions of an assignment. A change changes the rows and hashes."""

    version: int = 3  # 2: other data, on which routers hardly differed
    preset: str = "tiny"
    base_images: int = 4000  # phases 1 and 2 are those of the preset's recipe
    base_steps: int | None = None  # of phase 2; None: its recipe's
    train_images: int = 3000
    signs: int = 60
    steps: int = 90  # of phase 3
    batch_size: int = 64
    lr: float = 6e-3
    experts: int = 4
    top_k: int = 2
    eval_images: int = 200  # of each held-out split, with all their questions


BUDGET = Budget()
# Fields of the budget in which an assignment has its own. Assignment 8's penalty, which grows from
# 1e-8 by 1.2 a step, acts from step 80 or so.
OF_ASSIGNMENT = {8: {"top_k": 1, "steps": 120}}
CONSTANT = """import torch
from routers import Router


class Constant(Router):
    def gate(self, logits, mask, x):
        gates = torch.arange(logits.shape[-1]) < self.top_k
        return (gates / self.top_k).expand_as(logits)
"""
COLUMNS = ("facts", "closed", "open", "load_cv", "max_vio", "dead", "dropped", "activated")
# Columns with the standard deviation over the seeds; max_vio is by third of the training.
SPREAD = ("facts", "val_loss", "max_vio_start", "max_vio_middle", "max_vio_end",
          "dropped_in_training", "largest_logit", "leak", "experts_per_question",
          "experts_per_token")  # fmt: skip
MAX_VIO = ("MaxVio by third of training", ("max_vio_start", "max_vio_middle", "max_vio_end"), ".2f")
LEADS = {  # assignment -> what its row begins with: title, columns, format
    1: MAX_VIO,
    2: ("dropped in training", ("dropped_in_training",), ".1%"),
    3: ("largest logit", ("largest_logit",), ".2f"),
    4: ("leak", ("leak",), ".1%"),
    5: MAX_VIO,
    7: ("experts a question", ("experts_per_question",), ".2f"),
    8: ("experts a token", ("experts_per_token",), ".2f"),
}
REFERENCE = Path(__file__).parent / "reference"  # rows written with --json
LIMIT_S = 600.0  # seconds that one seed may take
JOBS = 2  # seeds in parallel, each on one core


@dataclass(frozen=True)
class ScoreConfig:
    """Score one router on the course's budget."""

    router: str | None = flag(None, "FILE.py:Class; or a name to compare with")
    assignment: int | None = flag(None, "N: begin the row with what assignment N is about")
    student: str = flag("", "ID, which determines the images and the seeds")
    seeds: int = flag(3, "runs to average over", least=1)
    json: str | None = flag(None, "also write the row to this FILE")
    picture: str | None = flag(None, "draw the load into this FILE.png (needs matplotlib)")
    verify: str | None = flag(None, "FILE of a row: fail if this run gives other numbers")
    tolerance: float = flag(0.0, "--verify: largest difference, on another machine 0.01 or more")
    init: str | None = flag(None, "phase-2 checkpoint DIR, instead of the common one")
    out: str = flag("runs/score", "DIR of the common checkpoint")
    limit: float = flag(LIMIT_S, "seconds that one seed may take", least=1)


class Derived(NamedTuple):
    first: int  # seed number of the first image: never one of the default images
    seeds: list[int]
    modalities: list[int]  # the order of the modalities in the report


def digest(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def derive(student: str, secret: str, n_seeds: int) -> Derived:
    """The same for the same student and secret.

    The ranges of images of two students are equal or disjoint, and outside the 10**6 images that
    --data phantoms:N can name.
    """
    rng = random.Random(digest("course.score", secret, student))
    first = rng.randrange(100, 90_000) * 10_000
    modalities = rng.sample(range(len(MODALITIES)), len(MODALITIES))
    return Derived(first, rng.sample(range(1, 2**31), n_seeds), modalities)


def budget_of(assignment: int | None) -> Budget:
    return replace(BUDGET, **OF_ASSIGNMENT.get(assignment, {}))


def make_base(budget: Budget, out: Path) -> Path:
    """The common checkpoint of phase 2, trained once: default images, seed 0, one thread."""
    chosen = preset(budget.preset)
    recipe = {n: asdict(r) for n, r in chosen.recipes.items() if n < 3}
    config = [to_dict(chosen.model), recipe, budget.base_images, budget.base_steps]
    steps = ["--steps", str(budget.base_steps)] if budget.base_steps else []
    folder = out / f"base-{digest(config, torch.__version__)[:12]}"
    if (folder / "phase2").is_dir():
        return folder / "phase2"
    print(f"training the common checkpoint, once: {folder}", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common = ["--preset", budget.preset, "--out", str(folder), "--no-eval", "--device", "cpu",
              "--data", f"phantoms:{budget.base_images}", "--dtype", "float32",
              "--workers", "0", "--resume"]  # fmt: skip
    try:
        train.main(["--phase", "1", *common])
        one = ["--init", str(folder / "phase1")]
        train.main(["--phase", "2", *steps, *one, *common])
    finally:
        torch.set_num_threads(threads)
    return folder / "phase2"


def run_seed(job: dict, text: str, limit_s: float) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="score-"))
    try:
        (folder / contain.FILE).write_text(text)
        return contain.run_job("course.trial", job, folder, limit_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_seeds(
    text: str, cls: str, where: str, derived: Derived, base: Path, budget: Budget, limit_s: float
) -> list[dict]:
    """One result per seed, JOBS seeds in parallel."""
    job = asdict(budget) | {
        "where": where, "class": cls, "init": str(base.resolve()),
        "data": f"phantoms:{budget.train_images}+{derived.first}/{budget.signs}",
    }  # fmt: skip
    with ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1)) as pool:
        runs = [pool.submit(run_seed, job | {"seed": s}, text, limit_s) for s in derived.seeds]
        try:
            return [run.result() for run in runs]
        except BaseException:
            for run in runs:  # the other seeds would fail in the same way
                run.cancel()
            contain.stop_all()
            raise


def mean(values: list) -> float | None:
    return None if None in values else statistics.fmean(values)


def deviation(values: list) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and None not in values else None


def make_row(results: list[dict], derived: Derived) -> dict:
    """The columns computed from the results of the seeds: means, some standard deviations."""
    values = {name: [r[name] for r in results] for name in dict.fromkeys(SPREAD + COLUMNS)}
    load = torch.tensor([r["load"] for r in results])  # (seeds, M, L, E)

    def by_modality(load: torch.Tensor) -> dict:  # (M, ..., E) -> shares
        shares = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
        return {MODALITIES[m]: shares[m].tolist() for m in derived.modalities}

    return {
        **{name: mean(each) for name, each in values.items()},
        **{f"{name}_sd": deviation(values[name]) for name in SPREAD},
        "experts": results[0]["experts"],
        "load_by_modality": by_modality(load.sum(dim=(0, 2))),
        "val_losses": values["val_loss"],
        # Of the first seed, since experts of different seeds and layers have nothing in common.
        "first_seed": {"load_by_step": results[0]["load_by_step"],
                       "load_by_modality": by_modality(load[0])},
    }  # fmt: skip


def hash_row(row: dict, base: Path) -> str:
    """Of the row, which has the file, student, secret, budget and torch in it, and the base."""
    weights = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    cls = row["router"].rpartition(":")[2]  # without the name of its file
    return digest(row | {"router": cls}, weights)[:32]


def run_contract(text: str, cls: str, where: str) -> str:
    """How many of the contract's tests it passes, as in "23/24"; "-" if they are missing."""
    try:
        judged = judge.judge(judge.CONTRACT, text, cls, where)
    except UserError as error:
        print(f"contract: {error}", file=sys.stderr)
        return "stopped"
    return judged.passed if judged else "-"


def score(spec: str, flags: ScoreConfig, contract: str | None = None) -> dict:
    """The whole row of one router. contract: the result of its tests, if they were run already."""
    where, cls, text = "", spec, CONSTANT if spec == "constant" else ""
    if spec == "constant":
        cls = "Constant"
    elif spec not in ROUTERS:  # ours need no check
        path, text, cls = read_submission(spec)
        where = path.name
        vet(text, where)
    secret, budget = contain.take_secret(), budget_of(flags.assignment)
    derived = derive(flags.student, secret, flags.seeds)
    if flags.init:
        base = Path(flags.init)
        read_config(base)
    else:
        base = make_base(budget, Path(flags.out))
    results = run_seeds(text, cls, where, derived, base, budget, flags.limit)
    row = {
        "router": f"{where}:{cls}" if where else spec, "student": flags.student,
        "assignment": flags.assignment, "seeds": flags.seeds, "top_k": budget.top_k,
        "budget": digest(asdict(budget))[:16], "torch": torch.__version__,
        "text": hashlib.sha256(text.encode()).hexdigest(), "secret": digest(secret)[:16],
        **make_row(results, derived), "lines": count_lines(text),
        "contract": contract or (run_contract(text, cls, where) if where else "-"),
    }  # fmt: skip
    row["hash"] = hash_row(row, base)
    return row | {"tokens_per_s": statistics.fmean(r["tokens_per_s"] for r in results)}


def references(assignment: int | None, budget: Budget) -> tuple[list[dict], list[str]]:
    """-> committed rows of this budget to compare with, and a line for each that is missing."""
    own = f"a{assignment}-" if assignment in OF_ASSIGNMENT else ""
    names = [f"{own}constant", f"{own}topk", *([f"a{assignment}"] if assignment else [])]
    rows, lines = [], []
    for file in (REFERENCE / f"{name}.json" for name in names):
        row = read_json(file, dict) if file.is_file() else {}
        if row.get("budget") == digest(asdict(budget))[:16]:
            rows.append(row)
        else:
            why = "is stale, of another budget than this score's" if row else "is missing"
            lines.append(f"reference row {file.stem} {why}")
    return rows, lines


def cell(value: float | None, kind: str, deviation: float | None = None) -> str:
    spread = "" if deviation is None else f" ± {deviation:{kind}}"
    return "-" if value is None else f"{value:{kind}}{spread}"


def lead(row: dict, assignment: int | None) -> dict[str, str]:
    """Title -> cell of what the assignment is about; {} if that is the accuracy alone."""
    if assignment not in LEADS:
        return {}
    title, (*before, last), kind = LEADS[assignment]
    text = ", ".join([*(cell(row.get(name), kind) for name in before),
                      cell(row.get(last), kind, row.get(f"{last}_sd"))])  # fmt: skip
    text += f" (k = {row['top_k']})" if assignment == 8 else ""
    text += " (refused by generate)" if assignment == 4 and row["facts"] is None else ""
    return {title: text}


def cells(row: dict, assignment: int | None) -> dict[str, str]:
    """Title -> text of every cell of the row."""
    return {
        "router": row["router"], "student": row["student"] or "-", **lead(row, assignment),
        "facts": cell(row["facts"], ".1%", row["facts_sd"]),
        "val loss": cell(row["val_loss"], ".4f", row["val_loss_sd"]),
        "closed": cell(row["closed"], ".1%"), "open": cell(row["open"], ".1%"),
        "load CV": cell(row["load_cv"], ".3f"), "MaxVio": cell(row["max_vio"], ".3f"),
        "dead": f"{row['dead']:.1f}/{row['experts']}", "dropped": cell(row["dropped"], ".1%"),
        "activated": f"{row['activated']:,.0f}", "lines": str(row["lines"]),
        "contract": row["contract"], "hash": row["hash"],
    }  # fmt: skip


def markdown(table: list[dict[str, str]]) -> str:
    """Rows with the same titles -> a Markdown table, in which names are text and no markup."""
    lines = [list(table[0]), ["---"] * len(table[0])]
    for row in table:
        lines.append([re.sub(r"([\\|<\[`])", r"\\\1", one_line(c, 80)) for c in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(row: dict, compared: list[dict]) -> str:
    """The row and those to compare with as a Markdown table, its load by modality, its speed."""
    table = [cells(row, row["assignment"])]
    for other in compared:
        other = other | {"router": f"reference: {other['router']}"}
        table.append(cells(other, row["assignment"]))
    n_experts = len(next(iter(row["load_by_modality"].values())))
    table_of_load = [" " * 12 + "".join(f"expert {e}".rjust(10) for e in range(n_experts))]
    for name, shares in row["load_by_modality"].items():
        table_of_load.append(f"{name:<12}" + "".join(f"{share:10.1%}" for share in shares))
    speed = f"{row['tokens_per_s']:,.0f} tokens/s in training, on {platform.machine()}"
    return "\n".join([markdown(table), "", *table_of_load, "", speed])


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A row's values, each with its place: ("load_by_modality.CT[2]", 0.25)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}[{i}]")
    else:
        yield name, value


def differences(row: dict, submitted: dict, tolerance: float) -> list[str]:
    """What differs: texts, and numbers by more than the tolerance, absolute and relative.

    With a tolerance the hash and the version of torch may differ, the speed always.
    """
    ignored = {"tokens_per_s", *(("hash", "torch") if tolerance else ())}
    here, there = (dict(flat(r | {"router": str(r.get("router")).rpartition(":")[2]}))
                   for r in (row, submitted))  # fmt: skip

    def is_same(a: Any, b: Any) -> bool:
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        close = numbers and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        return a == b or (tolerance > 0 and close)

    return [f"{name} {there.get(name, 'missing')}, here {here.get(name, 'missing')}"
            for name in dict.fromkeys([*there, *here])
            if name not in ignored and not is_same(here.get(name), there.get(name))]  # fmt: skip


def verify(row: dict, file: str, submitted: dict, tolerance: float) -> None:
    """Raise UserError that names what differs."""
    if found := differences(row, submitted, tolerance):
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(f"--verify {file}: {len(found)} differ: {'; '.join(found[:6])}{more}")
    print(f"verified: {row['hash']}" + (f", within {tolerance:g}" if tolerance else ""))


@user_errors
def main(argv: list[str] | None = None) -> dict:
    contain.take_secret()
    flags = parse(ScoreConfig, argv, "course.score")
    if flags.router is None:
        raise UserError("--router FILE.py:Class is missing: the router to score")
    if flags.assignment is not None and not 1 <= flags.assignment <= 8:
        raise UserError(f"--assignment {flags.assignment}: must be from 1 to 8")
    if flags.tolerance and not flags.verify:
        raise UserError("--tolerance: only with --verify FILE")
    check_outputs((flags.json, flags.picture), (flags.verify,))
    if flags.picture:
        picture.check(flags.picture)
    submitted = read_json(Path(flags.verify), dict) if flags.verify else {}
    row = score(flags.router, flags)
    compared, lines = references(flags.assignment, budget_of(flags.assignment))
    print(show(row, compared))
    print("\n".join(lines))
    if flags.json:
        write_text(Path(flags.json), json.dumps(row) + "\n", "--json")
    if flags.picture:
        controls = [r for r in compared if r["router"] in ("constant", "topk")]
        picture.draw([row, *controls], Path(flags.picture))
    if flags.verify:
        verify(row, flags.verify, submitted, flags.tolerance)
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
