"""Make again what results/ holds: python -m lab.reproduce all, or some of it, by name.

Hours are of two cores. What a kill left is continued by the same command. Real data are named as
for --data, slake:DIR, or both sets together, slake:DIR+vqa-rad:DIR; of them, as of phantoms, three
seeds are trained and scored.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError, argument, flag
from engine.cli import parse, user_errors
from lab.tables import data_name

ROOT = Path(__file__).parent.parent
ABLATIONS = {  # set -> seeds, hours
    "facts": (5, 0.6), "routers": (3, 0.2), "experts": (5, 0.4), "signs": (3, 0.5),
    "parts": (3, 0.8), "core": (3, 1.4), "k": (3, 0.3), "long": (1, 0.3), "rates": (1, 0.2),
    "hard": (3, 0.4),
    "layers": (3, 0.2), "trains": (3, 0.2), "labels": (3, 0.4), "backbones": (3, 0.5),
}  # fmt: skip
RUNS = {  # flags beside --data, hours of three seeds
    "phantoms": ("", 0.2), "slake": ("", 1.2), "vqa-rad": ("--router topk", 0.4),
    "slake+vqa-rad": ("", 1.7), "medmnist": ("--router topk --steps 300", 0.5),
}  # fmt: skip
ROUTER = "-m lab.router runs/phantoms-tiny-0/phase3 --device cpu --json results/router/tiny-seed0"


@dataclass(frozen=True)
class ReproduceConfig:
    """Make again what results/ holds."""

    names: tuple[str, ...] = argument(f"all, phantoms, router, {', '.join(ABLATIONS)}, slake:DIR")
    list: bool = flag(False, "only print the commands and their hours")


def commands(names: Sequence[str]) -> list[tuple[str, float]]:
    """-> what follows "python", and its hours."""
    found = []
    for name in ("phantoms", "router", *ABLATIONS) if "all" in names else names:
        sources = re.split(r"\+(?=vqa-rad:)", name)
        kind = "+".join(source.partition(":")[0] for source in sources)
        if name in ABLATIONS:
            seeds, hours = ABLATIONS[name]
            found.append((f"-m lab.ablate {name} --seeds {seeds}", hours))
        elif name == "router":  # of seed 0's default run, and its control
            found += [(f"{ROUTER}.json", 0.1),
                      (f"{ROUTER}-shuffled-labels.json --break-router", 0.1)]  # fmt: skip
        elif kind in RUNS and (kind == "phantoms") == (kind == name):
            flags, hours = RUNS[kind]
            data_set = data_name(sources)  # of medmnist: the file's
            file = f"results/{data_set}-tiny{re.sub('[ -]+', '-', flags)}-seed"
            if kind != name:
                data = "".join(f" --data {shlex.quote(source)}" for source in sources)
                flags = f"{data} {flags}".rstrip()
            for seed in range(3):
                out = f"runs/{data_set}-tiny-{seed}"
                train = f"train.py --phase 3 --seed {seed} --out {out} --resume"
                if len(sources) == 1:
                    found.append((f"{train} --json {file}{seed}.json{flags}", hours / 3))
                else:  # each set's questions by themselves
                    found.append((f"{train} --no-eval{flags}", hours / 3))
                    found += [(f"eval.py {out}/phase3 --data {shlex.quote(source)} --blind --json "
                               f"{file}{seed}-{source.partition(':')[0]}.json", 0.01)
                              for source in sources]  # fmt: skip
        else:
            known = ", ".join(("all", "router", *ABLATIONS, *RUNS))
            raise UserError(f"{name}: not one of {known} (real data with :DIR)")
    return found


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(ReproduceConfig, argv, "python -m lab.reproduce")
    for command, hours in commands(flags.names):
        print(f"{hours:.1f} h  python {command}", flush=True)
        if flags.list:
            continue
        words = shlex.split(command)
        if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            raise UserError(f"python {command}: failed")
        if words[1] == "lab.ablate":
            for file in (ROOT / "runs/ablations").glob(f"{words[2]}.*"):
                shutil.copy(file, ROOT / "results/ablations")


if __name__ == "__main__":
    main()
