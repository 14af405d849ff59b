"""Training with two and four processes, by the launcher and the command that users have."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from engine.run import Run
from tests.mini import losses, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 20
FLAGS = ["--data", "phantoms:15", "--steps", str(STEPS), "--batch-size", "7", "--no-eval",
         "--router-images", "15", "--dtype", "float32", "--save-every", "100"]  # fmt: skip
EXPERTS = ["--expert-parallel", "2"]
SAME = [[], EXPERTS, ["--activation-checkpointing"], ["--cache-features"], ["--accumulate", "4"]]
OTHER = [["--lora-rank", "4"], ["--preset", "tiny-stablelm"],
         ["--weights", "bf16", "--dtype", "bfloat16"]]  # fmt: skip


def start(n: int, *argv: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [sys.executable, *(launcher if n > 1 else []), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def launch(n: int, out: Path, *argv: str, stop_at: int = 0) -> str:
    """Train with n processes; stop_at: SIGTERM during that step."""
    done = start(n, __file__, str(stop_at), "--out", str(out), *FLAGS, *argv)
    printed = done.stdout + done.stderr
    code = 0 if not stop_at else 143 if n == 1 else 1  # torchrun has a code of its own
    assert done.returncode == code, printed[-3000:]
    return printed


def steps(out: Path, phase: int) -> tuple[list[float], list[float]]:
    """Losses, and norms of the gradients: Adam would hide it if all were twice as large."""
    found = [r for r in losses(out) if r["phase"] == phase]
    assert [r["step"] for r in found] == list(range(STEPS))
    return [r["loss"] for r in found], [r["grad_norm"] for r in found]


def assert_alike(a: Path, b: Path, phase: int, is_bf16: bool = False) -> None:
    near, near_norm, near_weight = (2e-2, 0.2, 4e-2) if is_bf16 else (1e-5, 1e-4, 2e-3)
    (losses_a, norms_a), (losses_b, norms_b) = steps(a, phase), steps(b, phase)
    assert losses_a == pytest.approx(losses_b, abs=near)
    assert norms_a == pytest.approx(norms_b, rel=near_norm)
    a, b = (weights(out / f"phase{phase}") for out in (a, b))
    assert a.keys() == b.keys()
    for name in a:  # Adam divides by gradients near 0
        torch.testing.assert_close(a[name], b[name], atol=near_weight, rtol=0, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """All phases by one process."""
    launch(1, out := tmp_path_factory.mktemp("one"))
    return out


@pytest.mark.parametrize("more", SAME + OTHER, ids=" ".join)
def test_two_processes_train_what_one_trains_in_every_phase(one, tmp_path, more):
    if more in OTHER:  # SAME flags change nothing: `one` was trained without them
        launch(1, one := tmp_path / "one", *more)
    for phase in (1, 2, 3):
        init = [] if phase == 1 else ["--init", str(one / f"phase{phase - 1}")]
        launch(2, tmp_path, "--phase", str(phase), *init, *more)
        assert_alike(tmp_path, one, phase, "bf16" in more)


@pytest.mark.parametrize("first", [1, 2], ids=["one-then-two", "two-then-one"])
@pytest.mark.parametrize("more", [[], EXPERTS], ids=["fsdp", "experts"])
def test_each_resumes_from_the_others_checkpoint(one, tmp_path, first, more):
    phase_3 = ["--phase", "3", "--init", str(one / "phase2")]
    argv = {1: phase_3, 2: [*phase_3, *more]}
    assert "stopped by SIGTERM after 7 steps" in launch(first, tmp_path, *argv[first], stop_at=7)
    printed = launch(3 - first, tmp_path, *argv[3 - first], "--resume")
    assert f"processes {first}, now {3 - first}" in printed
    assert_alike(tmp_path, one, 3)


def test_four_processes_in_two_copies_of_two_halves_of_the_experts(one, tmp_path):
    launch(4, tmp_path, "--phase", "3", "--init", str(one / "phase2"), *EXPERTS)
    assert_alike(tmp_path, one, 3)


def test_two_processes_share_an_evaluation_and_keep_the_questions_order(one, tmp_path):
    found = []
    for n, batches in ((1, "7/7"), (2, "4/4")):
        file = tmp_path / f"{n}.json"
        done = start(n, str(ROOT / "eval.py"), str(one / "phase3"), "--dtype", "float32", "--blind",
                     "--limit", "100", "--batch-size", "16", "--json", str(file))  # fmt: skip
        assert done.returncode == 0 and batches in done.stderr, done.stderr[-3000:]
        found.append(json.loads(file.read_text()) | {"command": ""})
    assert len(found[0]["answers"]) == 100 and json.dumps(found[0]) == json.dumps(found[1])


if __name__ == "__main__":  # as torchrun starts it: train.py that gets SIGTERM in its n-th step
    reduce, calls = Run.sum_loss_and_load, []

    def stop_at_the_nth(run, loss):
        calls.append(1)
        if len(calls) == int(sys.argv[1]) and run.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return reduce(run, loss)

    Run.sum_loss_and_load = stop_at_the_nth
    train.main(sys.argv[2:])
