"""Which of our own functions are entered: python -m tests.trace_calls

Printed for one forward of a sparse layer on the CPU, and for what happens between the last two
optimizer steps of train.py --phase 3 --steps 3. Comprehensions and lambdas are left out.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

import train
from config import PHASES, MoEConfig, preset
from model import MedMoE, make_sparse
from routers import Hints

ROOT = Path(__file__).resolve().parent.parent


class Calls:
    """Functions of this project entered while `on`, as (file, name)."""

    def __init__(self):
        self.found: dict[tuple[str, str], int] = {}

    def __call__(self, frame, event: str, arg: object) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and not code.co_name.startswith("<"):
            name = str(path.relative_to(ROOT)), code.co_qualname
            if not name[0].startswith("tests"):
                self.found[name] = self.found.get(name, 0) + 1

    def show(self, title: str) -> str:
        files = sorted({file for file, _ in self.found})
        lines = [f"{title}: {len(self.found)} functions in {len(files)} files"]
        for file in files:
            names = [name for where, name in self.found if where == file]
            lines.append(f"  {file:<22}{', '.join(names)}")
        return "\n".join(lines)


def sparse_layer() -> Calls:
    """One forward of block 0's sparse layer of the tiny preset, in training."""
    model = MedMoE(preset("tiny").model)
    make_sparse(model, MoEConfig())
    x, mask = torch.randn(2, 8, 128), torch.ones(2, 8, dtype=torch.bool)
    layer, calls = model.decoder.blocks[0].mlp.train(), Calls()
    sys.setprofile(calls)
    try:
        layer(x, mask, Hints())
    finally:
        sys.setprofile(None)
    return calls


def training_step() -> Calls:
    """From the end of the second optimizer step of phase 3 to the end of the third."""
    calls, steps = Calls(), []
    step = torch.optim.AdamW.step

    def counted(optimizer, *args, **kwargs):
        sys.setprofile(None)
        result = step(optimizer, *args, **kwargs)
        steps.append(optimizer)
        if len(steps) == 3 * len(PHASES) - 1:  # the last but one of phase 3
            sys.setprofile(calls)
        return result

    torch.optim.AdamW.step = counted
    try:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            train.main(["--phase", "3", "--steps", "3", "--no-eval", "--out", out])
    finally:
        torch.optim.AdamW.step = step
        sys.setprofile(None)
    return calls


def main() -> None:
    print(sparse_layer().show("one forward of a sparse layer"))
    print(training_step().show("between the last two optimizer steps of phase 3"))


if __name__ == "__main__":
    main()
