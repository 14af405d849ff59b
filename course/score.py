"""The scoreboard: python -m course.score --router my_router.py:MyRouter --student ID

Trains phase 3 of the tiny model with the router, for a fixed number of steps and several seeds,
from one common checkpoint of phase 2, and prints a row: the same command gives the same row on
the same machine. --verify HASH checks a row that a student has submitted. The number to look at is
"facts", the share of questions about signs that it knows (sources/signs.py): on it routers differ.
--router constant, topk, modality or oracle gives a row to compare with.

The images, the seeds and the order of the modalities are derived by SHA-256 from --student and, if
it is set, the environment variable COURSE_SECRET. Without a secret the data of every student can
be reproduced by anyone; with one the data are unknown to the students. A row is verified with the
same secret, or none, that it was made with; a row holds a hash of the secret, so choose a long
one. Other machines and other versions of torch may round differently. The last line is JSON.
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
from checkpoint import read_config
from config import MODALITIES, UserError, flag, one_line, preset, to_dict
from course import contain, judge
from course.vet import count_lines, read_submission, vet
from engine.cli import check_writable, parse, user_errors, write_json
from routers import ROUTERS

SECRET = "COURSE_SECRET"


@dataclass(frozen=True)
class Budget:
    """The same for every submission. Any change changes the rows and their hashes."""

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
CONSTANT = """import torch
from routers import Router


class Constant(Router):
    def gate(self, logits, mask, x):
        return torch.tensor([0.5, 0.5, *[0.0] * (logits.shape[-1] - 2)]).expand_as(logits)
"""
LIMIT_S = 600.0  # seconds that one seed may take
JOBS = 2  # seeds in parallel, each on one core


@dataclass(frozen=True)
class ScoreConfig:
    """Score one router on the course's budget."""

    router: str | None = flag(None, "FILE.py:Class; or a name to compare with")
    student: str = flag("", "ID, which determines the images and the seeds")
    seeds: int = flag(3, "runs to average over", least=1)
    json: str | None = flag(None, "also write the row to this FILE")
    verify: str | None = flag(None, "HASH of a row: fail if this run gives another")
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
    text: str, cls: str, where: str, derived: Derived, base: Path, limit_s: float
) -> list[dict]:
    """One result per seed, JOBS seeds in parallel."""
    job = asdict(BUDGET) | {
        "where": where, "class": cls, "init": str(base.resolve()),
        "data": f"phantoms:{BUDGET.train_images}+{derived.first}/{BUDGET.signs}",
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


def make_row(results: list[dict], derived: Derived) -> dict:
    """The columns computed from the results of the seeds: means, two standard deviations."""
    losses, facts = [r["val_loss"] for r in results], [r["facts"] for r in results]
    columns = ("facts", "closed", "open", "load_cv", "max_vio", "dead", "dropped", "activated")
    load = torch.tensor([r["load"] for r in results]).sum(dim=0)[derived.modalities]  # (M, E)
    shares = load / load.sum(dim=1, keepdim=True).clamp(min=1)
    return {
        "facts_sd": statistics.stdev(facts) if len(facts) > 1 and None not in facts else None,
        "val_loss": mean(losses),
        "val_loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
        **{name: mean([r[name] for r in results]) for name in columns},
        "experts": results[0]["experts"],
        "load_by_modality": {
            MODALITIES[m]: row.tolist() for m, row in zip(derived.modalities, shares, strict=True)
        },
        "val_losses": losses,
    }


def hash_row(row: dict, base: Path) -> str:
    """Of the row, with the file, student and secret in it, the budget, the checkpoint, torch."""
    weights = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    recipe = [asdict(BUDGET), weights, torch.__version__]
    cls = row["router"].rpartition(":")[2]  # without the name of its file
    return digest(row | {"router": cls}, recipe)[:32]


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
    secret = os.environ.get(SECRET, "")
    derived = derive(flags.student, secret, flags.seeds)
    if flags.init:
        base = Path(flags.init)
        read_config(base)
    else:
        base = make_base(BUDGET, Path(flags.out))
    results = run_seeds(text, cls, where, derived, base, flags.limit)
    row = {
        "router": f"{where}:{cls}" if where else spec, "student": flags.student,
        "seeds": flags.seeds,
        "text": hashlib.sha256(text.encode()).hexdigest(), "secret": digest(secret)[:16],
        **make_row(results, derived), "lines": count_lines(text),
        "contract": contract or (run_contract(text, cls, where) if where else "-"),
    }  # fmt: skip
    row["hash"] = hash_row(row, base)
    return row | {"tokens_per_s": statistics.fmean(r["tokens_per_s"] for r in results)}


def cell(value: float | None, kind: str) -> str:
    return "-" if value is None else format(value, kind)


def show(row: dict) -> str:
    """The row as a Markdown table, then the load by modality and the speed."""
    facts, loss = cell(row["facts"], ".1%"), cell(row["val_loss"], ".4f")
    if row["facts_sd"] is not None:
        facts += f" ± {row['facts_sd']:.1%}"
    if row["val_loss_sd"] is not None:
        loss += f" ± {row['val_loss_sd']:.4f}"
    cells = {
        "router": row["router"], "student": one_line(row["student"]) or "-", "facts": facts,
        "val loss": loss,
        "closed": cell(row["closed"], ".1%"), "open": cell(row["open"], ".1%"),
        "load CV": cell(row["load_cv"], ".3f"), "MaxVio": cell(row["max_vio"], ".3f"),
        "dead": f"{row['dead']:.1f}/{row['experts']}", "dropped": cell(row["dropped"], ".1%"),
        "activated": f"{row['activated']:,.0f}", "lines": str(row["lines"]),
        "contract": row["contract"], "hash": row["hash"],
    }  # fmt: skip
    lines = [cells.keys(), ["---"] * len(cells), [c.replace("|", "/") for c in cells.values()]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    n_experts = len(next(iter(row["load_by_modality"].values())))
    table_of_load = [" " * 12 + "".join(f"expert {e}".rjust(10) for e in range(n_experts))]
    for name, shares in row["load_by_modality"].items():
        table_of_load.append(f"{name:<12}" + "".join(f"{share:10.1%}" for share in shares))
    speed = f"{row['tokens_per_s']:,.0f} tokens/s in training, on {platform.machine()}"
    return "\n".join([table, "", *table_of_load, "", speed])


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(ScoreConfig, argv, "course.score")
    if flags.router is None:
        raise UserError("--router FILE.py:Class is missing: the router to score")
    if flags.json:
        check_writable(Path(flags.json))
    row = score(flags.router, flags)
    print(show(row))
    if flags.json:
        write_json(Path(flags.json), row)
    if flags.verify and flags.verify != row["hash"]:
        raise UserError(f"--verify {flags.verify}: this run gives {row['hash']}")
    if flags.verify:
        print(f"verified: {row['hash']}")
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
