"""Several processes train the same model as one: python -m pytest tests/engine/test_parallel.py

They exchange through gloo on the CPU, by the launcher and the command that users have.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

import train
from data import Batch
from engine.parallel import ParallelExperts, run_idle_modules
from engine.run import Run
from moe import MLP, Experts
from sources.tensorfiles import open_tensors
from tests.conftest import shake

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
    printed = done.stdout + done.stderr
    assert (done.returncode != 0) == (code != 0), printed[-3000:]
    # With several processes the exit code is torchrun's own, 1.
    assert code in (0, 1) or n > 1 or done.returncode == code, printed[-3000:]
    return printed


def losses(out: Path, phase: int) -> list[float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = [r for r in lines if r["phase"] == phase and "loss" in r]
    assert [r["step"] for r in found] == list(range(STEPS))
    return [r["loss"] for r in found]


def norms(out: Path, phase: int) -> list[float]:
    """Of the gradients: Adam would hide it if they were all twice as large."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [r["grad_norm"] for r in lines if r["phase"] == phase and "loss" in r]


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


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_have_saved(one, tmp_path):
    """The same losses all along: 7 steps by two processes, 13 by one."""
    start = ["--phase", "3", "--init", str(one / "phase2")]
    printed = launch(2, tmp_path, *start, stop_at=7, code=1)
    assert "stopped by SIGTERM after 7 steps" in printed
    assert not list(tmp_path.glob("*/*.parts"))  # what each has written is joined
    assert "processes 2, now 1" in launch(1, tmp_path, *start, "--resume")
    assert losses(tmp_path, 3) == pytest.approx(losses(one, 3), abs=1e-5)
    assert norms(tmp_path, 3) == pytest.approx(norms(one, 3), rel=1e-4)
    close(one / "phase3", tmp_path / "phase3", atol=1e-3)  # Adam divides by gradients near 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--expert-parallel", "2"]], ids=["fsdp", "experts"])
def test_two_processes_train_what_one_trains_in_every_phase(one, tmp_path, more):
    for phase in (1, 2, 3):
        init = [] if phase == 1 else ["--init", str(one / f"phase{phase - 1}")]
        launch(2, tmp_path, "--phase", str(phase), *init, *more)
        assert losses(tmp_path, phase) == pytest.approx(losses(one, phase), abs=1e-5), phase
        assert norms(tmp_path, phase) == pytest.approx(norms(one, phase), rel=1e-4), phase
        close(one / f"phase{phase}", tmp_path / f"phase{phase}", atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2], ids=["one-then-two", "two-then-one"])
@pytest.mark.parametrize("more", [[], ["--expert-parallel", "2"]], ids=["fsdp", "experts"])
def test_each_goes_on_from_the_others_checkpoint(one, tmp_path, first, more):
    start = ["--phase", "3", "--init", str(one / "phase2")]
    launch(first, tmp_path, *start, *(more if first == 2 else []), stop_at=7, code=143)
    launch(3 - first, tmp_path, *start, "--resume", *(more if first == 1 else []))
    assert losses(tmp_path, 3) == pytest.approx(losses(one, 3), abs=1e-5)


@pytest.mark.slow
def test_four_processes_in_two_copies_of_two_halves_of_the_experts(one, tmp_path):
    start = ["--phase", "3", "--init", str(one / "phase2"), "--expert-parallel", "2"]
    launch(4, tmp_path, *start)
    assert losses(tmp_path, 3) == pytest.approx(losses(one, 3), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--weights", "bf16", "--dtype", "bfloat16"],
                                  ["--lora-rank", "4"], ["--preset", "tiny-stablelm"],
                                  ["--activation-checkpointing"], ["--cache-features"]],
                         ids=lambda more: more[0])  # fmt: skip
def test_two_processes_train_like_one_with_other_flags(tmp_path, more):
    for n in (1, 2):
        launch(n, tmp_path / str(n), *more)
    # A weight in bf16 steps by 1/256 of itself: roundings can be seen after three phases.
    near = 0.1 if "bf16" in more else 1e-3
    assert losses(tmp_path / "1", 3) == pytest.approx(losses(tmp_path / "2", 3), abs=near)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"], ["--tune-vision", "--no-jitter"]],
                         ids=["plain", "lora", "tower"])  # fmt: skip
def test_a_process_without_an_image_trains_with_the_others(one, tmp_path, more):
    """Two of six samples are text: a step of three has an image, but often not in each process."""
    rows = []
    for i in range(6):
        turns = [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"No. {i}."}]
        rows.append({"id": str(i), "conversations": turns})
        if i > 1:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            rows[-1]["image"] = f"{i}.png"
            Image.new("RGB", (56, 56), (40 * i, 99, 99)).save(tmp_path / f"{i}.png")
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    flags = ["--phase", "2", "--init", str(one / "phase1"), "--batch-size", "3", *more]
    for n in (1, 2):
        launch(n, tmp_path / str(n), *flags, "--data", f"llava:{tmp_path / 'mixed.json'}")
    for values in (losses, norms):
        assert values(tmp_path / "2", 2) == pytest.approx(values(tmp_path / "1", 2), rel=1e-3)


@pytest.mark.slow
def test_two_processes_share_an_evaluation(one, tmp_path):
    found = []
    for n in (1, 2):
        file = tmp_path / f"{n}.json"
        command = [sys.executable]
        if n > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        command += [str(HERE.parent / "eval.py"), str(one / "phase3"), "--data", "phantoms:20"]
        command += ["--dtype", "float32", "--blind", "--batch-size", "16", "--json", str(file)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
        found.append({k: v for k, v in json.loads(file.read_text()).items() if k != "command"})
    assert found[0] == found[1]


@pytest.mark.parametrize(("argv", "message"), [
    (["--expert-parallel", "2"], "--expert-parallel 2: must divide the 1 processes"),
    (["--expert-parallel", "0"], "--expert-parallel 0: must be at least 1"),
])  # fmt: skip
def test_a_wrong_number_of_processes_is_refused(one, tmp_path, capsys, argv, message):
    start = ["--phase", "3", "--init", str(one / "phase2"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        train.main([*FLAGS, *start, *argv])
    assert message in capsys.readouterr().err


@pytest.fixture
def group(tmp_path):
    """A group of this process alone: everything is exchanged with itself."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("routed", ["some", "one", "none"])
def test_rows_come_back_to_their_tokens(group, routed):
    experts = shake(Experts(MLP(8, 16), 4)).double()
    x = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    gates = (torch.rand(10, 4, dtype=torch.float64) > 0.5).double() * torch.rand(10, 4)
    if routed != "some":
        gates[:, [0, 1, 3]] = 0.0
    if routed == "none":
        gates[:] = 0.0
    gates.requires_grad_()
    inputs = x, gates, *experts.parameters()
    found = []
    mesh = init_device_mesh("cpu", (1,))
    for is_parallel in (False, True):
        if is_parallel:
            experts.__class__ = ParallelExperts
            experts.group, experts.n = mesh.get_group(), 1
        y = experts(x, gates)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_dataset_of_text_alone_passes_the_projector_too(group, build):
    """A process without an image still computes what the others wait for; it adds nothing."""
    model = build()
    hook = model.decoder.register_forward_pre_hook(partial(run_idle_modules, model))
    ids = torch.arange(12).view(2, 6)
    batch = Batch(ids, torch.ones_like(ids).bool(), ids, torch.zeros(0, 3, 32, 32), ids[:, 0])
    loss = model.loss(batch).total
    loss.backward()
    grads = [p.grad for p in model.projector.parameters()]
    assert all(g is not None and not g.any() for g in grads)
    hook.remove()
    assert torch.equal(model.loss(batch).total, loss)


def test_the_norm_of_gradients_is_torchs(build):
    model = build()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.norm() for g in expected]).norm().item()
    run = object.__new__(Run)
    run.world, run.params = 1, dict(model.named_parameters())
    assert run.clip_gradients(0.0) == pytest.approx(norm)
    assert run.clip_gradients(1.0) == pytest.approx(norm)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g / norm, atol=1e-6, rtol=1e-5)
