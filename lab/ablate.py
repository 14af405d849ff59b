"""What matters? Rows of lab/rows.py, trained and scored, beside Med-MoE as it is.

    python -m lab.ablate core --seeds 3
    python -m lab.ablate medmoe no-meta --seeds 5 --jobs 1

A row is a set's name, or a row's. Each phase and each evaluation is kept in --out under a hash of
all that it depends on, so rows share phases, and a second run, or one after a kill, trains only
what is missing. --minutes N begins nothing new after N minutes; the same command continues.

Every row answers the same questions with every seed. The table has mean and standard deviation
over the seeds and the paired difference to another row, question by question, with two 95 %
intervals: a bootstrap over images, for these seeds; and Student's over the seeds' differences.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from config import UserError, argument, flag
from engine.cli import at_least, parse, user_errors, write_json, write_text
from lab.comparison import summarise, table
from lab.forest import forest
from lab.rows import ROWS, SETS, Row
from sources.records import read_json

ROOT = Path(__file__).parent.parent
VERSION = 1  # to be raised when a change of the code changes what the same flags train


@dataclass(frozen=True)
class AblateConfig:
    """Train and score the rows of lab/rows.py; write a table, its numbers and a plot."""

    names: tuple[str, ...] = argument("sets or rows: " + ", ".join(SETS) + "; lab/rows.py has all")
    seeds: int = flag(3, "seeds 0 to N - 1 of every row")
    jobs: int = flag(2, "rows at a time, one thread each")
    minutes: float | None = flag(None, "begin nothing new after so long")
    flags: str = flag("", "flags of train.py for all rows, as one word: '--steps 20'")
    out: str = flag("runs/ablations", "DIR of what is kept")
    results: str | None = flag(None, "DIR of the table, numbers and plot (default: --out)")


def key(*parts: object) -> str:
    """12 hex digits of what a result depends on."""
    text = json.dumps([VERSION, torch.__version__, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def chosen_rows(names: Sequence[str]) -> dict[str, Row]:
    """The rows in the order of `names`, each after the row that it is compared with."""
    found: dict[str, Row] = {}
    for name in names:
        if name not in SETS and name not in ROWS:
            raise UserError(f"{name}: neither a set ({', '.join(SETS)}) nor a row of lab/rows.py")
        for row in SETS.get(name, (name,)):
            wanted = [row]
            while (other := ROWS[wanted[0]].against) != wanted[0]:
                wanted.insert(0, other)
            found |= {one: ROWS[one] for one in wanted if one not in found}
    return found


class OutOfTime(Exception):
    """Nothing new is begun."""


class Runner:
    """Trains and scores what is not there yet; several threads may want the same."""

    def __init__(self, flags: AblateConfig):
        self.out, self.common = Path(flags.out).resolve(), shlex.split(flags.flags)
        self.end = (
            time.monotonic() + flags.minutes * 60 if flags.minutes is not None else float("inf")
        )
        self.locks: dict[str, threading.Lock] = {}
        self.lock = threading.Lock()
        self.stopped = False

    def call(self, name: str, command: list[str]) -> None:
        """Run one of our scripts, one thread; raise UserError with its last line if it fails."""
        if time.monotonic() > self.end:
            raise OutOfTime
        if self.stopped:
            raise UserError(f"{name}: not begun, another row failed")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                              capture_output=True)  # fmt: skip
        if done.returncode:
            self.stopped = True
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"{name}: python {shlex.join(command)}: {last}")

    def once(self, name: str) -> threading.Lock:
        with self.lock:
            return self.locks.setdefault(name, threading.Lock())

    def phase(self, number: int, row: Row, seed: int) -> tuple[str, Path]:
        """-> the hash of this phase and all before it, and the checkpoint."""
        stages = [self.common + shlex.split(f"{row.common} {getattr(row, f'phase{n}')}")
                  for n in range(1, number + 1)]  # fmt: skip
        name = key(seed, *stages)
        path = self.out / name / f"phase{number}"
        before = self.phase(number - 1, row, seed)[1] if number > 1 else None
        with self.once(name):
            if not path.is_dir():
                init = ["--init", str(before)] if before else []
                self.call(name, ["train.py", "--phase", str(number), *init, "--out",
                                 str(path.parent), "--seed", str(seed), "--resume", "--no-eval",
                                 *stages[-1]])  # fmt: skip
        return name, path

    def result(self, row: Row, seed: int) -> Path:
        """-> the --json of eval.py for this row and seed."""
        name, checkpoint = self.phase(2 if row.phase3 is None else 3, row, seed)
        path = self.out / name / f"answers-{key(row.answers)}.json"
        with self.once(path.name + name):
            if not path.is_file():
                part = path.with_suffix(".part")
                self.call(name, ["eval.py", str(checkpoint), "--json", str(part),
                                 *shlex.split(row.answers)])  # fmt: skip
                os.replace(part, path)
        return path


def run_all(flags: AblateConfig, rows: dict[str, Row]) -> dict[str, list[Path]]:
    """-> row -> its results, a seed each; rows that lack one are left out."""
    runner, found, start = Runner(flags), {}, time.monotonic()
    jobs = [(name, seed) for name in rows for seed in range(flags.seeds)]
    with ThreadPoolExecutor(flags.jobs) as pool:
        futures = {job: pool.submit(runner.result, rows[job[0]], job[1]) for job in jobs}
        try:
            for (name, seed), future in futures.items():
                try:
                    path = future.result()
                except OutOfTime:
                    continue
                found.setdefault(name, []).append(path)
                minutes = (time.monotonic() - start) / 60
                score = read_json(path)["protocols"]["strict"]["overall"]
                print(f"{minutes:6.1f} min  {name:<22} seed {seed}  {score:.1%}", flush=True)
        except BaseException:
            runner.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    return {name: paths for name, paths in found.items() if len(paths) == flags.seeds}


@user_errors
def main(argv: Sequence[str] | None = None) -> dict:
    flags = parse(AblateConfig, argv, "python -m lab.ablate")
    at_least(flags, seeds=1, jobs=1)
    rows = chosen_rows(flags.names)
    results = Path(flags.results or flags.out)
    results.mkdir(parents=True, exist_ok=True)
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    found = run_all(flags, rows)
    missing = [name for name in rows if name not in found]
    done = {name: row for name, row in rows.items() if row.against in found and name in found}
    words = ["python", "-m", "lab.ablate", *flags.names, "--seeds", str(flags.seeds)]
    words += ["--flags", flags.flags] if flags.flags else []
    value = {
        "name": "-".join(flags.names), "command": shlex.join(words),
        "hash": key(*[(name, vars(row)) for name, row in done.items()], flags.seeds, flags.flags),
        "torch": torch.__version__, "seeds": list(range(flags.seeds)),
        "rows": summarise(done, found) if done else [],
    }  # fmt: skip
    text = table(value)
    print(f"\n{text}")
    if missing:
        print(f"not finished: {', '.join(missing)}; the same command continues")
    base = results / value["name"]
    write_json(base.with_suffix(".json"), value)
    write_text(base.with_suffix(".md"), text, "--results")
    forest(value, base.with_suffix(".png"))
    return value


if __name__ == "__main__":
    main()
