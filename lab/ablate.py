"""What matters? Rows of flags, trained and scored, beside Med-MoE as it is.

    python -m lab.ablate core --seeds 3

Each phase and evaluation is kept in --out under a hash of all that it depends on: rows share them,
and after a kill only what is missing is trained. The table has the paired difference to another
row with two 95 % intervals: a bootstrap over images, for these seeds; Student's over the seeds.
Both also wide enough to hold for all rows of the table at once (Bonferroni): only a difference
that both of these leave on one side of 0 "stands". The scores of every question and seed are kept
beside the table, from which --scores computes it again.
"""

import functools
import hashlib
import importlib
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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from zipfile import BadZipFile

import numpy as np
import torch

from config import ASSETS, UserError, argument, flag
from engine.cli import parse, user_errors, write_json, write_text
from metrics import bootstrap, images_of, question_ids
from scoring.compare import value
from sources.load import how_read, load_samples
from sources.records import read_json

ROOT = Path(__file__).parent.parent
SKIP = "--lr 0 --steps 1"  # a phase that changes nothing; phase 2 still trains its router
EVERYONE = "--router lab/controls.py:Everyone --start fresh --experts"
BALANCED = "--router topk --balance 0.01"
WRONG = tuple(f"--router lab/controls.py:Wrong{n}" for n in (1, 2, 3))


@dataclass(frozen=True)
class Row:
    """Flags of train.py and eval.py that differ from Med-MoE's; all rows share equal phases."""

    title: str
    phase1: str = ""
    phase2: str = ""
    phase3: str | None = ""  # None: phase 2's model is evaluated
    answers: tuple[str, ...] = ("",)  # flags of eval.py; of several evaluations the mean
    against: str = "medmoe"  # the row it is compared with, question by question; itself: none
    common: str = ""  # flags of all phases


# fmt: off
CORE = {
    "medmoe": Row("Med-MoE: modality router, top-2 and meta expert"),
    "no-phase-1": Row("without phase 1 (63 steps of the projector)", phase1=SKIP),
    "no-phase-2": Row("without phase 2 (158 of projector and decoder)", phase2=SKIP),
    "no-phase-3": Row("without phase 3 (125 of two blocks' FFNs)", phase3=None),
    "no-router-training": Row("router as initialised", phase3="--router random"),
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
    "joint": Row("one per token, router trained on",
                 phase3="--router-level token --modality-loss 0.1"),
    "learned": Row("learned with the experts, per token", phase3="--router topk"),
    "learned-balanced": Row("learned, balance loss 0.01", phase3=BALANCED),
    "moe-llava": Row("learned, balance 0.01, no meta (MoE-LLaVA)", phase3=f"{BALANCED} --no-meta"),
    "by-hash": Row("by token, fixed (hash)", phase3="--router lab/controls.py:Hash"),
    "oracle": Row("oracle: the true modality's expert", phase3="--router oracle --top-k 1"),
    "asked-oracle": Row("Med-MoE, evaluated with the true expert", answers=("--router oracle",)),
    "asked-wrong": Row("Med-MoE, evaluated with each wrong expert", answers=WRONG),
    "oracle-asked-wrong": Row("oracle, evaluated with each wrong expert", answers=WRONG,
                              phase3="--router oracle --top-k 1", against="oracle"),
}
HARD = {  # phase 2 changes nothing: what differs between the domains is left to phase 3's FFNs
    f"hard-{n}": Row(f"no phase 2: {title}", phase2=SKIP, phase3=flags, against="no-phase-2")
    for n, title, flags in (
        ("oracle", "oracle", "--router oracle --top-k 1"),
        ("random", "router as initialised", "--router random"),
        ("fresh-start", "experts re-initialised, output 0", "--start fresh"),
        ("no-meta", "without meta expert", "--no-meta"),
        ("dense-activated", "dense, equal activated", f"{EVERYONE} 2 --top-k 2"))
}
LAYERS = {f"layers-{n}": Row(f"sparse blocks: {n}", phase3=f"--moe-layers {n}")
          for n in ("first-half", "second-half", "all")}
TRAINS = {"released-trains": Row("phase 3 trains projector and dense FFNs too",
                                 phase3="--trains released"),
          "lora-16": Row("LoRA of rank 16 in phase 3", phase3="--lora-rank 16")}
LABELS = {
    **{f"labels-{n}": Row(f"{n} labels for the router", phase2=f"--router-images {n}")
       for n in (20, 100)},
    **{f"noise-{n}": Row(f"{n} % of the labels wrong", phase2=f"--router-noise {n / 100}")
       for n in (30, 60)},
}
BACKBONES = {
    f"stablelm-{name}": Row(f"StableLM: {row.title}", phase3=row.phase3, against="stablelm-medmoe",
                            common="--preset tiny-stablelm")
    for name, row in CORE.items()
    if name in ("medmoe", "token", "no-router-training", "dense-activated", "dense-total", "oracle")
}
EXPERTS = {  # learned experts, in worlds of few and many signs
    f"s{s}-e{e}": Row(f"{s} signs, {e} expert{'s' * (e > 1)}, top-1", against=f"s{s}-e1",
                      phase3=f"--router topk --top-k 1 --experts {e} --data phantoms:4000/{s}")
    for s in (60, 120, 240) for e in (1, 2, 4, 8)
}
K = {f"e{e}-k{k}": Row(f"{e} experts, top-{k}", phase3=f"--router topk --experts {e} --top-k {k}",
                       against="s120-e1") for e, k in ((2, 2), (4, 2), (4, 4), (8, 2), (8, 4))}
PLAIN = ("medmoe", "dense-activated", "dense-total")
LONG = {f"long-{name}": Row(f"500 steps of phase 3: {CORE[name].title}", against="long-medmoe",
                            phase3=f"{CORE[name].phase3} --steps 500") for name in PLAIN}
RATES = {f"{name}-{rate}": Row(f"learning rate {rate}: {CORE[name].title}", against=name,
                               phase3=f"{CORE[name].phase3} --lr {rate}")
         for name in PLAIN for rate in ("3e-3", "1.2e-2")}
# fmt: on
ROWS = CORE | HARD | LAYERS | TRAINS | LABELS | BACKBONES | EXPERTS | K | LONG | RATES
SETS = {"facts": ("medmoe", "dense-activated", "dense-total", "no-router-training", "asked-wrong"),
        "routers": ("medmoe", "token", "sequence", "joint"),
        "parts": ("medmoe", "no-phase-1", "no-phase-2", "no-phase-3", "no-meta", "no-meta-top-1",
                  "top-1", "released-start", "fresh-start", "dense", "learned", "by-hash",
                  "oracle", "oracle-asked-wrong"),
        "core": tuple(CORE), "hard": ("no-phase-2", *HARD),
        "layers": ("medmoe", *LAYERS), "trains": ("medmoe", *TRAINS),
        "labels": ("medmoe", *LABELS), "backbones": tuple(BACKBONES),
        "experts": tuple(name for name in EXPERTS if name.startswith("s120-")),
        "signs": tuple(EXPERTS), "k": ("s120-e1", *K), "long": tuple(LONG),
        "rates": (*PLAIN, *RATES)}  # fmt: skip


@dataclass(frozen=True)
class AblateConfig:
    """Train and score rows; write a table, its numbers and a plot."""

    names: tuple[str, ...] = argument("sets of rows, or rows, of lab/ablate.py: facts")
    seeds: int = flag(3, "seeds 0 to N - 1 of every row", least=1)
    jobs: int = flag(2, "rows at a time, one thread each", least=1)
    flags: str = flag("", "flags of train.py for all rows, as one word: --flags='--steps 20'")
    out: str = flag("runs/ablations", "DIR of what is kept, the table, numbers and plot")
    scores: str | None = flag(None, "FILE.npz of an earlier run: only its table, computed again")


@functools.cache
def code() -> str:
    """A hash of the code that trains and scores, and of the parts that training begins with.

    A router file that --flags names is not part of it.
    """
    files = [file for folder in ("sources", "scoring", "engine")
             for file in sorted((ROOT / folder).glob("*.py"))]  # fmt: skip
    files += [ROOT / "lab" / "controls.py", *sorted(ASSETS.glob("*/*"))]
    for script in ("chat", "eval", "train"):  # they import all of the reading path
        importlib.import_module(script)
    modules = {Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
    files = sorted(file for file in modules if file.parent == ROOT) + files
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


def split_flags(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--flags {text}: {error}") from error


class Runner:
    """Trains and scores what is not there yet; several threads may want the same."""

    def __init__(self, flags: AblateConfig):
        self.out, self.common = Path(flags.out).resolve(), split_flags(flags.flags)
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

    def results(self, row: Row, seed: int) -> list[Path]:
        """-> the --json of each of this row's evaluations."""
        checkpoint, paths = self.phase(2 if row.phase3 is None else 3, row, seed), []
        for answers in row.answers:
            paths.append(path := checkpoint.parent / f"answers-{key(answers)}.json")
            with self.locks.setdefault(path, threading.Lock()):
                if not path.is_file():
                    part = path.with_suffix(".part")  # a kill leaves no half file
                    # A router of one's own is named again; the last --router counts.
                    own = " ".join(re.findall(r"--router \S+\.py:\S+", row.phase3 or ""))
                    self.call(row, ["eval.py", str(checkpoint), "--json", str(part),
                                    *shlex.split(f"{own} {answers}")])  # fmt: skip
                    os.replace(part, path)
        return paths


def run_all(flags: AblateConfig, rows: dict[str, Row]) -> dict[str, list[list[Path]]]:
    """-> row -> seed -> the results of its evaluations."""
    runner, found = Runner(flags), {}
    with ThreadPoolExecutor(flags.jobs) as pool:
        futures = [(name, pool.submit(runner.results, row, seed))
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
    means = scores.mean(axis=1, dtype=float)
    return {"mean": float(means.mean()), "sd": float(means.std(ddof=1)) if len(means) > 1 else None}


@functools.cache
def quantile(p: float, df: float) -> float:
    """Of Student's t with df degrees of freedom; of the normal distribution for infinitely many."""
    if math.isinf(df):
        return NormalDist().inv_cdf(p)
    angle = np.linspace(-math.pi / 2, math.pi / 2, 10**6)  # t = sqrt(df) tan(angle)
    area = np.cumsum(np.cos(angle) ** (df - 1))
    return math.sqrt(df) * math.tan(np.interp(p * area[-1], area, angle))


def paired(scores: np.ndarray, others: np.ndarray, images: Sequence[str], n_rows: int) -> dict:
    """(S, Q) minus (S, Q), same seeds and questions -> the mean, and its 95 % intervals.

    ci95 by images, ci95_seeds by seeds; all_images, all_seeds hold for n_rows at once.
    """
    gain = np.asarray(scores, float) - others
    n, (mean, sd) = len(gain), over_seeds(gain).values()
    low, high = bootstrap(gain.mean(axis=0), images, least=-1.0)
    every = 1 - 0.025 / n_rows
    wider = quantile(every, math.inf) / quantile(0.975, math.inf)
    found = {
        "difference": mean,
        "ci95": (low, high),
        "ci95_seeds": None,
        "all_seeds": None,
        "all_images": (mean - wider * (mean - low), mean + wider * (high - mean)),
    }
    if n > 1:
        for name, p in (("ci95_seeds", 0.975), ("all_seeds", every)):
            half = quantile(p, n - 1) * sd / math.sqrt(n)
            found[name] = mean - half, mean + half
    ends = [found["all_images"], found["all_seeds"] or (-1.0, 1.0)]
    return found | {"stands": all(a > 0 for a, _ in ends) or all(b < 0 for _, b in ends)}


def collect(rows: dict[str, Row], found: dict[str, list[list[Path]]]) -> dict[str, np.ndarray]:
    """Every score: row -> (S, Q). And "images" and "kinds" of the questions; of the rows
    "sizes" (activated, total), "bits" (first and last sparse block, before and after phase 3).
    """
    scores, sizes, bits = {}, [], []
    for name in rows:
        files = [file for seed in found[name] for file in seed]
        results = {file: read_json(file) for file in files}
        known = how_read(results[files[0]], files[0])
        known.pop("limit", None)
        samples = load_samples(known.pop("data"), "vqa", known.pop("split", "test"), **known)
        pairs = list(zip(samples, question_ids(samples), strict=True))
        scores[name] = np.array(
            [np.mean([[value(s, results[file]["answers"][i], None) for s, i in pairs]
                      for file in seed], axis=0) for seed in found[name]], np.float32)  # fmt: skip
        size = results[files[0]]["params"]
        sizes.append([size["activated"], size["total"]])
        measured = [result.get("information") for result in results.values()]
        blocks = [[np.mean([m[when][i] for m in measured]) for when in ("before", "after")]
                  for i in (0, -1)] if all(measured) else [[math.nan] * 2] * 2  # fmt: skip
        bits.append(blocks)
    kinds = [f"{s.kind} ({s.answer_type})" for s in samples]  # all rows' questions are alike
    return scores | {"images": np.array(images_of(samples)), "kinds": np.array(kinds),
                     "sizes": np.array(sizes), "bits": np.array(bits)}  # fmt: skip


def summarise(rows: dict[str, Row], scores: dict[str, np.ndarray]) -> list[dict]:
    """-> an entry a row: rates, parameters, the difference to another."""
    images, kinds, entries = scores["images"], scores["kinds"], []
    closed, signs = np.char.endswith(kinds, "(closed)"), np.char.startswith(kinds, "sign ")
    facts = signs & ~closed if signs.any() else np.ones_like(signs)  # other data: everything
    n_rows = sum(row.against != name for name, row in rows.items())
    of_rows = zip(rows.items(), scores["sizes"].tolist(), scores["bits"].tolist(), strict=True)
    for (name, row), size, bits in of_rows:
        values, against = scores[name], None
        parts = {"closed": closed & ~signs, "open": ~closed & ~signs, "facts": facts}
        if row.against != name:
            other = scores[row.against]
            against = {"row": row.against} | {
                part: paired(values[:, which], other[:, which], images[which], n_rows)
                for part, which in (("facts", facts), ("images", ~signs)) if which.any()
            }  # fmt: skip
        entries.append({
            "row": name, "title": row.title,
            **{part: over_seeds(values[:, which]) for part, which in parts.items()},
            "seeds": values[:, facts].mean(axis=1, dtype=float).tolist(),
            "activated": size[0], "total": size[1], "against": against,
            "bits": None if math.isnan(bits[0][0]) else bits,
        })  # fmt: skip
    return entries


def table(result: dict) -> str:
    """Markdown, with the command and the hash that made it."""
    lines = [
        f"`{result['command']}`, hash of code and flags {result['hash']}, "
        f"{len(result['seeds'])} seeds: percent, mean ± standard deviation over seeds; closed and "
        "open without signs. Differences to another row in points, with 95 % intervals: by images; "
        "by seeds. Bold: it stands, both intervals, widened to hold for all rows at once, exclude "
        "0. Bits: mutual information of a position's first expert and the modality (2 at most), "
        "before > after phase 3, in the first and the last sparse block\n",
        "| row | facts | difference | closed | open | difference | bits | activated / total |\n"
        + 8 * "|---"
        + "|",
    ]

    def difference(gain: dict) -> str:
        bold = "**" * gain["stands"]
        ends = [f"[{100 * e[0]:+.1f}, {100 * e[1]:+.1f}]" if e else "-"
                for e in (gain["ci95"], gain["ci95_seeds"])]  # fmt: skip
        return f"{bold}{gain['difference'] * 100:+.1f}{bold} {'; '.join(ends)}"

    for entry in result["rows"]:
        rates = []
        for part in (entry[name] for name in ("facts", "closed", "open")):
            sd = "" if part["sd"] is None else f" ± {part['sd'] * 100:.1f}"
            rates.append(f"{part['mean'] * 100:.1f}{sd}")
        known = seen = ""
        if other := entry["against"]:
            known, seen = (difference(other[part]) for part in ("facts", "images"))
            known += "" if other["row"] == "medmoe" else f", to {other['row']}"
        bits = "; ".join(f"{a:.2f} > {b:.2f}" for a, b in entry["bits"] or [])
        size = f"{entry['activated'] / 1e6:.2f} M / {entry['total'] / 1e6:.2f} M"
        cells = (entry["title"], rates[0], known, *rates[1:], seen, bits, size)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict, file: Path) -> None:
    """Facts known, a bar for each row with its seeds; experts and signs as lines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{file}: no plot without matplotlib: pip install -r requirements-lab.txt")
        return
    rows = result["rows"]
    grid = [re.fullmatch(r"s(\d+)-e(\d+)", row["row"]) for row in rows]
    lines = all(grid)
    axes = Figure((7, 4) if lines else (9, 1 + 0.3 * len(rows)), layout="constrained").subplots()
    if lines:
        for signs in dict.fromkeys(m[1] for m in grid):
            part = [(int(m[2]), row) for m, row in zip(grid, rows, strict=True) if m[1] == signs]
            at = [n for n, _ in part]
            axes.plot(at, [100 * row["facts"]["mean"] for _, row in part], label=f"{signs} signs")
            for n, row in part:
                axes.plot([n] * len(row["seeds"]), [100 * x for x in row["seeds"]], "k.", ms=4)
        axes.set(xscale="log", xlabel="experts, learned, one a token", ylim=(0, 100),
                 ylabel="facts known, percent")  # fmt: skip
        axes.set_xticks(at, at)
        axes.minorticks_off()
        axes.legend()
    else:
        means = [100 * row["facts"]["mean"] for row in rows]
        axes.barh(range(len(rows)), means, color="C0", alpha=0.5)
        for y, row in enumerate(rows):
            axes.plot([100 * x for x in row["seeds"]], [y] * len(row["seeds"]), "k.", ms=4)
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="facts known, percent; a point for each seed")
    axes.figure.savefig(file, dpi=100)


@user_errors
def main(argv: Sequence[str] | None = None) -> dict:
    flags = parse(AblateConfig, argv, "python -m lab.ablate")
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    rows = chosen_rows(flags.names)
    if flags.scores:
        try:
            scores = dict(np.load(flags.scores))
        except (OSError, TypeError, ValueError, BadZipFile) as error:
            raise UserError(f"{flags.scores}: not what lab.ablate wrote: {error}") from error
        wanted = *rows, "hash", "images", "kinds", "sizes", "bits"
        if missing := [name for name in wanted if name not in scores]:
            raise UserError(f"{flags.scores}: has no {', '.join(missing)}")
        flags = replace(flags, seeds=len(scores[next(iter(rows))]))
    else:
        inputs = [(name, vars(row)) for name, row in rows.items()], flags.seeds, flags.flags
        scores = collect(rows, run_all(flags, rows)) | {"hash": np.array(key(*inputs))}
    words = ["python", "-m", "lab.ablate", *flags.names, "--seeds", str(flags.seeds)]
    words += [f"--flags={flags.flags}"] if flags.flags else []
    result = {"command": shlex.join(words), "hash": str(scores["hash"]),
              "seeds": list(range(flags.seeds)), "rows": summarise(rows, scores)}  # fmt: skip
    print(f"\n{table(result)}")
    file = Path(flags.out, "-".join(flags.names) + ".json")
    write_json(file, result)
    np.savez_compressed(file.with_suffix(".npz"), **scores)
    write_text(file.with_suffix(".md"), table(result), "--out")
    plot(result, file.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
