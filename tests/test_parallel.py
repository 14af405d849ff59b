"""Several processes train the same model as one: python -m pytest tests/test_parallel.py

They exchange through gloo on the CPU, by the launcher and the command that users have.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensorfiles import open_tensors

HERE = Path(__file__).parent
STEPS = 20
FLAGS = ["--data", "phantoms:15", "--steps", str(STEPS), "--batch-size", "7", "--no-eval",
         "--router-images", "15", "--dtype", "float32", "--save-every", "100"]  # fmt: skip


def launch(n: int, out: Path, *argv: str, stop_at: int = 0, code: int = 0) -> str:
    """Train with n processes, one thread each; stop_at: SIGTERM during that step."""
    command = [sys.executable]
    if n > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += [str(HERE / "stopped_train.py"), str(stop_at), "--out", str(out), *FLAGS, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == (code != 0), said[-3000:]
    assert code in (0, 1) or n > 1 or done.returncode == code, said[-3000:]  # torchrun's own is 1
    return said


def losses(out: Path, phase: int) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = [(r["step"], r["loss"]) for r in lines if r["phase"] == phase and "loss" in r]
    assert [number for number, _ in found] == list(range(STEPS))
    return [loss for _, loss in found]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(open_tensors(path / "model.safetensors"))


def close(a: Path, b: Path, atol: float) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """All phases by one process."""
    out = tmp_path_factory.mktemp("one")
    launch(1, out)
    return out


def test_two_processes_train_what_one_trains_in_every_phase(one, tmp_path):
    for phase in (1, 2, 3):
        init = [] if phase == 1 else ["--init", str(one / f"phase{phase - 1}")]
        launch(2, tmp_path, "--phase", str(phase), *init)
        assert losses(tmp_path, phase) == pytest.approx(losses(one, phase), abs=1e-5), phase
    close(one / "phase3", tmp_path / "phase3", atol=1e-3)  # Adam divides by gradients near 0
