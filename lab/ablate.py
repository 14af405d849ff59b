"""What matters? Rows of flags, trained and scored, beside Med-MoE as it is.

    python -m lab.ablate core --seeds 3

Each phase and evaluation is kept in --out under a hash of all that it depends on: rows share them,
and after a kill only what is missing is trained. The table has the paired difference to another
row with two 95 % intervals: a bootstrap over images, for these seeds; Student's over the seeds.
"""

import functools
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import UserError, argument, flag
from engine.cli import parse, user_errors, write_json, write_text
from metrics import bootstrap, images_of, question_ids
from scoring.compare import value
from sources.load import how_read, load_samples
from sources.records import read_json

ROOT = Path(__file__).parent.parent
SKIP = "--lr 0 --steps 1"  # a phase that changes nothing; phase 2 still trains its router
EVERYONE = "--router lab/controls.py:Everyone --start fresh --experts"
BALANCED = "--router topk --balance 0.01"
WRONG = "--router lab/controls.py:Wrong"
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


@dataclass(frozen=True)
class Row:
    """Flags of train.py and eval.py that differ from Med-MoE's; all rows share equal phases."""

    title: str
    phase1: str = ""
    phase2: str = ""
    phase3: str | None = ""  # None: phase 2's model is evaluated
    answers: str = ""  # flags of eval.py
    against: str = "medmoe"  # the row it is compared with, question by question; itself: none
    common: str = ""  # flags of all phases


# fmt: off
CORE = {
    "medmoe": Row("Med-MoE: modality router, top-2 and meta expert"),
    "no-phase-1": Row("without phase 1", phase1=SKIP),
    "no-phase-2": Row("without phase 2, but for its router", phase2=SKIP),
    "no-phase-3": Row("without phase 3: phase 2's dense model", phase3=None),
    "no-router-training": Row("router randomly initialised, not trained", phase3="--router random"),
    "no-meta": Row("without meta expert", phase3="--no-meta"),
    "no-meta-top-1": Row("without meta expert, top-1", phase3="--no-meta --top-k 1"),
    "top-1": Row("top-1 and meta expert", phase3="--top-k 1"),
    "released-start": Row("phase 3 starts as released", phase3="--start released"),
    "fresh-start": Row("experts re-initialised, output 0", phase3="--start fresh"),
    "dense": Row("dense FFNs, trained on", phase3="--experts 0"),
    "dense-flops": Row("dense, steps for equal FLOPs", phase3="--experts 0 --steps 192"),
    "dense-activated": Row("dense, equal activated parameters", phase3=f"{EVERYONE} 2 --top-k 2"),
    "dense-total": Row("dense, equal total parameters", phase3=f"{EVERYONE} 4 --top-k 4"),
    "token": Row("Med-MoE, one decision per token", phase3="--router-level token"),
    "sequence": Row("Med-MoE, one per sample and block", phase3="--router-level sequence"),
    "joint": Row("Med-MoE, router trained on", phase3="--modality-loss 0.1"),
    "learned": Row("learned with the experts", phase3="--router topk"),
    "learned-balanced": Row("learned, balance loss 0.01", phase3=BALANCED),
    "moe-llava": Row("learned, balance 0.01, no meta (MoE-LLaVA)", phase3=f"{BALANCED} --no-meta"),
    "hash": Row("by token, fixed (hash)", phase3="--router lab/controls.py:Hash"),
    "oracle": Row("oracle: the true modality's expert", phase3="--router oracle"),
    "asked-oracle": Row("Med-MoE, evaluated with the true expert", answers="--router oracle"),
    "asked-wrong": Row("Med-MoE, evaluated with a wrong expert", answers=WRONG),
    "oracle-asked-wrong": Row("oracle, evaluated with a wrong expert", phase3="--router oracle",
                              answers=WRONG, against="oracle"),
}
HARD = {  # phase 2 changes nothing: what differs between the domains is left to phase 3's FFNs
    f"hard-{n}": Row(f"no phase 2: {title}", phase2=SKIP, phase3=flags, against="no-phase-2")
    for n, title, flags in (
        ("oracle", "oracle", "--router oracle"),
        ("random", "router randomly initialised", "--router random"),
        ("fresh-start", "experts re-initialised, output 0", "--start fresh"),
        ("no-meta", "without meta expert", "--no-meta"),
        ("dense-activated", "dense, equal activated", f"{EVERYONE} 2 --top-k 2"))
}
EXPERTS = {  # 1 to 8 learned experts, and worlds of few and many signs
    f"s{s}-e{e}": Row(f"{s} signs, {e} experts, top-1", common=f"--data phantoms:4000/{s}",
                      phase3=f"--router topk --top-k 1 --experts {e}", against=f"s{s}-e1")
    for s in (60, 120, 240) for e in (1, 2, 4, 8)
}
# fmt: on
ROWS = CORE | HARD | EXPERTS
FACTS = (
    "medmoe",
    "token",
    "no-router-training",
    "dense-activated",
    "dense-total",
    "oracle",
    "asked-wrong",
    "oracle-asked-wrong",
)
SETS = {"core": tuple(CORE), "facts": FACTS, "hard": ("no-phase-2", *HARD),
        "experts": tuple(EXPERTS)}  # fmt: skip


@dataclass(frozen=True)
class AblateConfig:
    """Train and score rows; write a table, its numbers and a plot."""

    names: tuple[str, ...] = argument("core, facts, hard or experts; or rows of lab/ablate.py")
    seeds: int = flag(3, "seeds 0 to N - 1 of every row", least=1)
    jobs: int = flag(2, "rows at a time, one thread each", least=1)
    flags: str = flag("", "flags of train.py for all rows, as one word: '--steps 20'")
    out: str = flag("runs/ablations", "DIR of what is kept, the table, numbers and plot")


@functools.cache
def code() -> str:
    """A hash of the code that trains and scores: of every file but lab, course, tests and cuda."""
    files = [f for folder in (ROOT, *map(ROOT.joinpath, ("sources", "scoring", "engine")))
             for f in sorted(folder.glob("*.py"))]  # fmt: skip
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key(*parts: object) -> str:
    """12 hex digits of what a result depends on."""
    text = json.dumps([code(), torch.__version__, *parts]).encode()
    return hashlib.sha256(text).hexdigest()[:12]


def chosen_rows(names: Sequence[str]) -> dict[str, Row]:
    """The rows in the order of `names`, each after the row that it is compared with."""
    found: dict[str, Row] = {}
    for name in names:
        if name not in SETS and name not in ROWS:
            raise UserError(f"{name}: neither a set ({', '.join(SETS)}) nor a row of lab/ablate.py")
        for wanted in [[row] for row in SETS.get(name, (name,))]:
            while (other := ROWS[wanted[0]].against) != wanted[0]:
                wanted.insert(0, other)
            found |= {one: ROWS[one] for one in wanted}
    return found


class Runner:
    """Trains and scores what is not there yet; several threads may want the same."""

    def __init__(self, flags: AblateConfig):
        self.out, self.common = Path(flags.out).resolve(), shlex.split(flags.flags)
        self.locks, self.error = {}, None

    def call(self, row: Row, command: list[str]) -> None:
        """Run one of our scripts, one thread; raise UserError with its last line if it fails."""
        if self.error:  # nothing new is begun
            raise self.error
        done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            self.error = UserError(f"{row.title}: python {shlex.join(command)}: {last}")
            raise self.error

    def phase(self, number: int, row: Row, seed: int) -> Path:
        """-> the checkpoint, in a folder named by the hash of this phase and all before it."""
        stages = [self.common + shlex.split(f"{row.common} {getattr(row, f'phase{n}')}")
                  for n in range(1, number + 1)]  # fmt: skip
        path = self.out / key(seed, *stages) / f"phase{number}"
        init = ["--init", str(self.phase(number - 1, row, seed))] if number > 1 else []
        with self.locks.setdefault(path, threading.Lock()):
            if not path.is_dir():
                self.call(row, ["train.py", "--phase", str(number), *init, "--out",
                                str(path.parent), "--seed", str(seed), "--resume", "--no-eval",
                                *stages[-1]])  # fmt: skip
        return path

    def result(self, row: Row, seed: int) -> Path:
        """-> the --json of eval.py for this row and seed."""
        checkpoint = self.phase(2 if row.phase3 is None else 3, row, seed)
        path = checkpoint.parent / f"answers-{key(row.answers)}.json"
        with self.locks.setdefault(path, threading.Lock()):
            if not path.is_file():
                part = path.with_suffix(".part")  # a kill leaves no half file
                # A router of one's own is named again; the last --router counts.
                own = " ".join(re.findall(r"--router \S+\.py:\S+", row.phase3 or ""))
                self.call(row, ["eval.py", str(checkpoint), "--json", str(part),
                                *shlex.split(f"{own} {row.answers}")])  # fmt: skip
                os.replace(part, path)
        return path


def run_all(flags: AblateConfig, rows: dict[str, Row]) -> dict[str, list[Path]]:
    """-> row -> its results, a seed each."""
    runner, found = Runner(flags), {}
    with ThreadPoolExecutor(flags.jobs) as pool:
        futures = [(name, pool.submit(runner.result, row, seed))
                   for name, row in rows.items() for seed in range(flags.seeds)]  # fmt: skip
        try:
            for name, future in futures:
                found.setdefault(name, []).append(future.result())
                print(f"{time.strftime('%H:%M')} {name}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def over_seeds(scores: np.ndarray) -> dict[str, float | None]:
    """(S seeds, Q questions) -> mean and standard deviation of the seeds' means, if several."""
    means = scores.mean(axis=1)
    return {"mean": float(means.mean()), "sd": float(means.std(ddof=1)) if len(means) > 1 else None}


def paired(scores: np.ndarray, others: np.ndarray, images: Sequence[str]) -> dict:
    """(S, Q) minus (S, Q), same seeds and questions -> the mean, intervals by images, by seeds."""
    gain = scores - others
    n, (mean, sd), ends = len(gain), over_seeds(gain).values(), None
    if n > 1:
        half = T975[min(n - 2, len(T975) - 1)] * sd / math.sqrt(n)
        ends = mean - half, mean + half
    by_image = bootstrap(gain.mean(axis=0), images, least=-1.0)
    return {"difference": mean, "ci95": by_image, "ci95_seeds": ends}


def summarise(rows: dict[str, Row], found: dict[str, list[Path]]) -> tuple[list[dict], dict]:
    """-> an entry a row: rates, parameters, the difference to another; every score (S, Q)."""
    scores, entries = {}, []
    for name, row in rows.items():
        results = [read_json(path) for path in found[name]]
        known = how_read(results[0], found[name][0])
        known.pop("limit", None)
        samples = load_samples(known.pop("data"), "vqa", known.pop("split", "test"), **known)
        pairs = list(zip(samples, question_ids(samples), strict=True))
        values = [[value(s, result["answers"][i], None) for s, i in pairs] for result in results]
        values = scores[name] = np.array(values)  # (S, Q)
        closed, against = np.array([s.answer_type == "closed" for s in samples]), None
        signs = np.array([s.kind == "sign" for s in samples])
        facts = signs & ~closed if signs.any() else np.ones_like(signs)  # other data: everything
        if row.against != name:
            images, other = images_of([samples[i] for i in facts.nonzero()[0]]), row.against
            gain = paired(values[:, facts], scores[other][:, facts], images)
            against = {"row": other} | gain
        entries.append({
            "row": name, "title": row.title, "closed": over_seeds(values[:, closed & ~signs]),
            "open": over_seeds(values[:, ~closed & ~signs]), "facts": over_seeds(values[:, facts]),
            "parameters": results[0]["params"], "against": against,
        })  # fmt: skip
    return entries, scores


def table(result: dict) -> str:
    """Markdown, with the command and the hash that made it."""
    lines = [
        f"`{result['command']}`, hash {result['hash']}: percent, mean ± standard deviation over "
        f"{len(result['seeds'])} seeds; closed and open without signs; the difference of facts to "
        "another row, with 95 % intervals by images and by seeds\n",
        "| row | closed | open | facts | minus | difference | by images | by seeds "
        "| activated / total |\n" + 9 * "|---" + "|",
    ]
    for entry in result["rows"]:
        parts, size = [entry[p] for p in ("closed", "open", "facts")], entry["parameters"]
        sds = ["" if p["sd"] is None else f" ± {p['sd'] * 100:.1f}" for p in parts]
        cells = [f"{p['mean'] * 100:.1f}{sd}" for p, sd in zip(parts, sds, strict=True)]
        cells = [entry["title"], *cells, "", "", "", ""]
        if other := entry["against"]:
            ends = [other[name] for name in ("ci95", "ci95_seeds")]
            cells[4:] = [other["row"], f"{other['difference'] * 100:+.1f}"]
            cells += [f"[{e[0] * 100:+.1f}, {e[1] * 100:+.1f}]" if e else "-" for e in ends]
        cells.append(f"{size['activated'] / 1e6:.2f} M / {size['total'] / 1e6:.2f} M")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict, file: Path) -> None:
    """Points of difference to the row that each is compared with."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{file}: no plot without matplotlib: pip install -r requirements-lab.txt")
        return
    rows = [(row["title"], row["against"]) for row in result["rows"] if row["against"]]
    axes = (figure := Figure((10, 1 + 0.27 * len(rows)), layout="constrained")).subplots()
    for y, (_, other) in enumerate(rows):
        for name, width in (("ci95_seeds", 1), ("ci95", 4)):
            if other[name]:
                axes.plot([100 * end for end in other[name]], [y, y], "C0", linewidth=width)
        axes.plot(100 * other["difference"], y, "oC0")
    axes.set_yticks(range(len(rows)), [f"{title} (minus {other['row']})" for title, other in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="black")
    axes.set_xlabel("facts, percentage points; thick: 95 % by images, thin: by seeds")
    figure.savefig(file, dpi=100)


@user_errors
def main(argv: Sequence[str] | None = None) -> dict:
    flags = parse(AblateConfig, argv, "python -m lab.ablate")
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    found = run_all(flags, rows := chosen_rows(flags.names))
    entries, scores = summarise(rows, found)
    words = ["python", "-m", "lab.ablate", *flags.names, "--seeds", str(flags.seeds)]
    words += ["--flags", flags.flags] if flags.flags else []
    result = {
        "command": shlex.join(words),
        "hash": key(*[(name, vars(row)) for name, row in rows.items()], flags.seeds, flags.flags),
        "seeds": list(range(flags.seeds)), "rows": entries,
    }  # fmt: skip
    print(f"\n{table(result)}")
    file = Path(flags.out, "-".join(flags.names) + ".json")
    write_json(file, result)
    # Every question's score: from them each interval can be computed again.
    np.savez_compressed(file.with_suffix(".npz"), **scores)
    write_text(file.with_suffix(".md"), table(result), "--out")
    plot(result, file.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
