"""The scoreboard: python -m course.score --router my_router.py:MyRouter --student ID

Trains phase 3 of the tiny model with the router, a fixed number of steps for each of some seeds,
from one common checkpoint of phase 2, and prints a row: the same command gives the same row on
the same machine. --verify HASH checks a row that someone has handed in.

Pictures, seeds and the order of the modalities follow from --student and, where it is set, from
the environment variable COURSE_SECRET, by SHA-256. Without it anyone can score what anyone else
scores; a lecturer who sets it scores on pictures that nobody has seen. A row is verified with the
same secret, or none, that it was made with; a row holds a hash of it, so choose a long one. Other
machines and other versions of torch may round differently. The last line is JSON.
"""

import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import train
from checkpoint import read_meta
from config import MODALITIES, UserError, preset, to_dict
from course import contain, judge
from course.vet import count_lines, read_submission, vet
from flags import at_least, check_writable, flag, parse, user_errors, write_json
from records import one_line

SECRET = "COURSE_SECRET"


@dataclass(frozen=True)
class Budget:
    """What every submission is given. Any change makes other rows."""

    version: int = 1
    preset: str = "tiny"
    base_pictures: int = 4000
    base_steps: int = 60  # of phase 2; phase 1 has its own recipe's
    train_pictures: int = 2000
    steps: int = 60  # of phase 3
    batch_size: int = 64
    lr: float = 1e-3
    experts: int = 4
    top_k: int = 2
    pictures: int = 100  # in validation and in the test, each with all its questions


BUDGET = Budget()
LIMIT_S = 600.0  # seconds that one seed may take
JOBS = 2  # seeds at once, each on one core


@dataclass(frozen=True)
class ScoreConfig:
    """Score one router on the course's budget."""

    router: str | None = flag(None, "FILE.py:Class, what is handed in")
    student: str = flag("", "ID: whose pictures and seeds")
    seeds: int = flag(3, "runs that the row is the mean of")
    json: str | None = flag(None, "also write the row to this FILE")
    verify: str | None = flag(None, "HASH of a row: is it what comes out?")
    init: str | None = flag(None, "phase-2 checkpoint DIR, instead of the one that is kept")
    out: str = flag("runs/score", "where that one is kept")
    limit: float = flag(LIMIT_S, "seconds that one seed may take")


class Derived(NamedTuple):
    first: int  # number of the first picture: never one of the default ones
    seeds: list[int]
    modalities: list[int]  # order in which the modalities are numbered in the report


def digest(*parts: object) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def derive(student: str, secret: str, n_seeds: int) -> Derived:
    """The same for the same student and secret.

    Ranges of pictures are equal or do not meet, and begin behind the 10**6 that --data can name.
    """
    rng = random.Random(digest("course.score", secret, student))
    first = rng.randrange(100, 90_000) * 10_000
    modalities = rng.sample(range(len(MODALITIES)), len(MODALITIES))
    return Derived(first, rng.sample(range(1, 2**31), n_seeds), modalities)


def make_base(budget: Budget, out: Path) -> Path:
    """The common checkpoint of phase 2, trained once: default pictures, seed 0, one thread."""
    chosen = preset(budget.preset)
    recipe = {n: asdict(r) for n, r in chosen.recipes.items() if n < 3}
    config = [to_dict(chosen.model), recipe, budget.base_pictures, budget.base_steps]
    folder = out / f"base-{digest(config, torch.__version__)[:12]}"
    if (folder / "phase2").is_dir():
        return folder / "phase2"
    print(f"training the common checkpoint, once: {folder}", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common = ["--preset", budget.preset, "--out", str(folder), "--no-eval", "--device", "cpu",
              "--data", f"phantoms:{budget.base_pictures}", "--dtype", "float32",
              "--workers", "0", "--resume"]  # fmt: skip
    try:
        train.main(["--phase", "1", *common])
        train.main(["--phase", "2", "--steps", str(budget.base_steps), *common])
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
    text: str, cls: str, where: str, derived: Derived, base: Path, limit_s: float
) -> list[dict]:
    """One result a seed, two seeds at a time."""
    job = asdict(BUDGET) | {
        "where": where, "class": cls, "init": str(base.resolve()),
        "data": f"phantoms:{BUDGET.train_pictures}+{derived.first}",
    }  # fmt: skip
    with ThreadPoolExecutor(min(JOBS, os.cpu_count() or 1)) as pool:
        runs = [pool.submit(run_seed, job | {"seed": s}, text, limit_s) for s in derived.seeds]
        try:
            return [run.result() for run in runs]
        except BaseException:
            for run in runs:  # the others would fail alike
                run.cancel()
            contain.stop_all()
            raise


def mean(values: list) -> float | None:
    return None if None in values else statistics.fmean(values)


def make_row(results: list[dict], derived: Derived) -> dict:
    """The columns that follow from the seeds' results: means, and the sd of the loss."""
    losses = [r["val_loss"] for r in results]
    columns = ("closed", "open", "load_cv", "max_vio", "dead", "dropped", "activated")
    visits = torch.tensor([r["visits"] for r in results]).sum(dim=0)[derived.modalities]  # (M, E)
    shares = visits / visits.sum(dim=1, keepdim=True).clamp(min=1)
    return {
        "val_loss": mean(losses),
        "val_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
        **{name: mean([r[name] for r in results]) for name in columns},
        "slots": results[0]["slots"],
        "visits_by_modality": {
            MODALITIES[m]: row.tolist() for m, row in zip(derived.modalities, shares, strict=True)
        },
        "val_losses": losses,
    }


def hash_row(row: dict, base: Path) -> str:
    """Over the row, the text, the student, the secret, the budget, the checkpoint and the torch."""
    weights = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    recipe = [asdict(BUDGET), weights, torch.__version__]
    named = row["router"].rpartition(":")[2]  # whatever its file is called
    return digest(row | {"router": named}, recipe)[:32]


def keeps_contract(text: str, cls: str, where: str) -> str:
    """How many of the contract's tests it passes, as in "23/24"; "-" where there are none."""
    try:
        judged = judge.judge(judge.CONTRACT, text, cls, where)
    except UserError as error:
        print(f"contract: {error}", file=sys.stderr)
        return "stopped"
    return judged.passed if judged else "-"


def score(spec: str, flags: ScoreConfig, contract: str | None = None) -> dict:
    """The whole row of one router. contract: what its tests said, if they were run already."""
    path, text, cls = read_submission(spec)
    where = path.name
    vet(text, where)
    secret = os.environ.get(SECRET, "")
    derived = derive(flags.student, secret, flags.seeds)
    if flags.init:
        base = Path(flags.init)
        read_meta(base)
    else:
        base = make_base(BUDGET, Path(flags.out))
    results = run_seeds(text, cls, where, derived, base, flags.limit)
    row = {
        "router": f"{where}:{cls}", "student": flags.student, "seeds": flags.seeds,
        "text": hashlib.sha256(text.encode()).hexdigest(), "secret": digest(secret)[:16],
        **make_row(results, derived), "lines": count_lines(text),
        "contract": contract or keeps_contract(text, cls, where),
    }  # fmt: skip
    row["hash"] = hash_row(row, base)
    return row | {"tokens_per_s": statistics.fmean(r["tokens_per_s"] for r in results)}


def cell(value: float | None, kind: str) -> str:
    return "-" if value is None else format(value, kind)


def show(row: dict) -> str:
    """The row as a table of markdown, then what is not in it."""
    loss = cell(row["val_loss"], ".4f")
    if row["val_loss_sd"] is not None:
        loss += f" ± {row['val_loss_sd']:.4f}"
    cells = {
        "router": row["router"], "student": one_line(row["student"]) or "-", "val loss": loss,
        "closed": cell(row["closed"], ".1%"), "open": cell(row["open"], ".1%"),
        "load CV": cell(row["load_cv"], ".3f"), "MaxVio": cell(row["max_vio"], ".3f"),
        "dead": f"{row['dead']:.1f}/{row['slots']}", "dropped": cell(row["dropped"], ".1%"),
        "activated": f"{row['activated']:,.0f}", "lines": str(row["lines"]),
        "contract": row["contract"], "hash": row["hash"],
    }  # fmt: skip
    lines = [cells.keys(), ["---"] * len(cells), [c.replace("|", "/") for c in cells.values()]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    experts = len(next(iter(row["visits_by_modality"].values())))
    told = [" " * 12 + "".join(f"expert {e}".rjust(10) for e in range(experts))]
    for name, shares in row["visits_by_modality"].items():
        told.append(f"{name:<12}" + "".join(f"{share:10.1%}" for share in shares))
    speed = f"{row['tokens_per_s']:,.0f} tokens/s in training, on {platform.machine()}"
    return "\n".join([table, "", *told, "", speed])


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(ScoreConfig, argv, "course.score")
    if flags.router is None:
        raise UserError("--router FILE.py:Class is needed: what is to be scored")
    at_least(flags, seeds=1, limit=1)
    if flags.json:
        check_writable(Path(flags.json))
    row = score(flags.router, flags)
    print(show(row))
    if flags.json:
        write_json(Path(flags.json), row)
    if flags.verify and flags.verify != row["hash"]:
        raise UserError(f"--verify {flags.verify}: what comes out here is {row['hash']}")
    if flags.verify:
        print(f"verified: {row['hash']}")
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
