"""A run that is interrupted, by whatever, ends as if it had not been; its log, signals, refusals.

The preset has 30 000 parameters and dropout; what jitter does depends here on every generator.
"""

import json
import os
import random
import resource
import signal
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from config import IGNORE, IMAGE_ID, PHASES, PRESETS, TrainConfig, UserError, to_dict
from data import Sample
from engine import durable
from engine import run as module
from engine.durable import locked, seal
from engine.processes import ALONE, Processes
from engine.run import MAY_DIFFER, Changed, Run, claim, data_digest, read_log, unfinished
from model import MedMoE, freeze_all_but
from routers import Hints
from sources.tensorfiles import open_tensors
from tests.conftest import shake
from tests.engine.test_durable import Faulty, full
from tests.mini import losses, mini, same, weights

CPU = torch.device("cpu")
STEPS = ("--steps", "6", "--save-every", "2", "--batch-size", "4", "--accumulate", "2", "--jitter")
RESUME = (*STEPS, "--resume")
ROUTER = """
import torch
from routers import TopKRouter, top_k_gates

class Balanced(TopKRouter):
    def __init__(self, d_model, n_experts, **how):
        super().__init__(d_model, n_experts, **how)
        self.register_buffer("bias", torch.zeros(n_experts))

    def gate(self, logits, mask, x):
        self.bias += 0.1 * self.training * (0.25 - (logits > 0).float().mean(dim=(0, 1)))
        return top_k_gates((logits + self.bias).softmax(dim=-1), self.top_k)
"""


class Killed(BaseException):
    """Nothing in the project catches it."""


def common(out):
    return ["--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--no-eval",
            "--router-images", "16", "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Finished phases 1 and 2 to start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        out = tmp_path_factory.mktemp("base")
        (out / "balanced.py").write_text(ROUTER)
        train.main(["--phase", "2", "--steps", "2", "--batch-size", "4", *common(out)])
        yield out


@pytest.fixture(scope="module")
def whole():
    """Folders of undisturbed runs, by phase, made once."""
    return {}


@pytest.fixture
def phase(base, whole, tmp_path, tmp_path_factory, monkeypatch):
    """phase(number, ...) runs it, kill=n until its n-th micro-batch, from generators anywhere."""
    loss, plain = MedMoE.loss, train.jitter

    def jitter(images):
        return plain(images) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002

    def counted(self, batch):
        one.batches += 1
        if one.batches == one.kill:
            raise Killed
        return loss(self, batch)

    def one(number, *argv, out=tmp_path, kill=None):
        one.batches, one.kill = 0, kill
        random.seed()
        np.random.seed()  # noqa: NPY002
        torch.seed()
        init = [] if number == 1 else ["--init", str(base / f"phase{number - 1}")]
        router = ["--router", f"{base / 'balanced.py'}:Balanced"] if number == 3 else []
        argv = ["--phase", str(number), *init, *router, *common(out), *argv]
        if kill is None:
            return train.main(argv)
        with pytest.raises(Killed):
            train.main(argv)

    def ends_like_whole(number, out=tmp_path):
        if number not in whole:
            whole[number] = tmp_path_factory.mktemp("whole")
            one(number, *STEPS, out=whole[number])
        folders = [folder / f"phase{number}" for folder in (out, whole[number])]
        assert not unfinished(out, number) and same(*map(weights, folders))
        assert losses(out) == losses(whole[number]) and len(losses(out)) == 6
        return folders

    monkeypatch.setattr(train, "jitter", jitter)
    monkeypatch.setattr(MedMoE, "loss", counted)
    one.ends_like_whole = ends_like_whole
    return one


@pytest.fixture
def refused(phase, capsys):
    """refused(...) -> the one line of an error that ends the phase with exit code 2."""

    def refused(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            phase(*args)
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert stop.value.code == 2
        return line

    return refused


@pytest.mark.parametrize("number", [1, 2, 3])
def test_two_kills_amid_an_accumulation_change_nothing(phase, number):
    """In phase 3 with a router that has a buffer. Six steps of two micro-batches."""
    phase(number, *STEPS, kill=6)  # in the second half of step 2
    phase(number, *RESUME, kill=6)  # of step 4
    phase(number, *RESUME)
    assert phase.batches == 2 * (6 - 4)  # it does not begin again
    folders = phase.ends_like_whole(number)
    if number == 2:
        assert same(*(dict(open_tensors(f / "router.safetensors")) for f in folders))
    if number == 3:
        assert weights(folders[0])["decoder.blocks.0.mlp.router.bias"].any()


def test_where_and_how_it_computes_may_differ_and_a_torn_log_is_mended(phase, tmp_path):
    out = tmp_path / "b"
    phase(1, *STEPS, out=tmp_path / "a", kill=12)  # step 4 is in the log and in no checkpoint
    (tmp_path / "a").rename(out)
    with (out / "log.jsonl").open("ab") as file:
        file.write(b'{"phase": 1, "step": 5, "lo\0\xff')
    phase(1, *RESUME, "--save-every", "1", "--workers", "0", "--keep", "1", out=out)
    phase.ends_like_whole(1, out)
    assert [r["begins"] for r in read_log(out / "log.jsonl") if "begins" in r] == [4]


def test_nothing_is_lost_by_another_command_nor_on_a_full_disk(phase, refused, tmp_path):
    """RLIMIT_FSIZE: writes stop short for real."""
    phase(1, *STEPS, kill=9)
    found, limits = unfinished(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert [p.name for p in found] == ["phase1-step0000002", "phase1-step0000004"]
    assert f"{found[1]} is an unfinished run: --resume" in refused(1)
    assert f"{found[1]}: began with --seed 0, now --seed 1" in refused(1, *RESUME, "--seed", "1")
    with locked(tmp_path):
        assert refused(1, *RESUME) == f"error: {tmp_path}: another run is writing here"
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        line = refused(1, *RESUME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith(f"error: {tmp_path / 'phase1'}") and "File too large" in line
    assert unfinished(tmp_path, 1) == found
    phase(1, *RESUME)
    phase.ends_like_whole(1)


def test_a_crash_after_the_last_save_is_resumed_and_ends_the_same(phase, tmp_path, monkeypatch):
    def stop(self, paths):
        raise Killed

    phase(1, *STEPS, kill=9)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "remove", stop)
        phase(1, *RESUME)
    before = weights(tmp_path / "phase1")
    assert len(unfinished(tmp_path, 1)) == 2
    phase(1, *RESUME)
    assert phase.batches == 4 and same(before, weights(tmp_path / "phase1"))
    assert not unfinished(tmp_path, 1)


# Checkpoints of a run without a loop: its projector holds the number of the last step.

SAMPLE = Sample("1", "x", "train", None, (("a", "b"),))


@pytest.fixture
def begin(base, tmp_path):
    """begin(...) -> a run that resumes where it can; begin.first is its first step."""

    def begin(processes=ALONE, samples=(SAMPLE,), n_steps=9, lr=0.1, tokenizer=None, system="",
              **flags):  # fmt: skip
        preset = PRESETS["mini"]
        flags = TrainConfig(**{"preset": "mini", "phase": 1, "out": str(tmp_path), "resume": True,
                               "device": "cpu", "dtype": "float32"} | flags)  # fmt: skip
        with claim(tmp_path):
            run = Run(1, flags, tokenizer or preset.llm / "tokenizer.json", processes)
            model = MedMoE(replace(preset.model, system=system))
            freeze_all_but(model, PHASES[1].trains)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            begin.first = run.begin(model, optimizer, samples, n_steps, 3, lr=lr)
        for name, param in model.named_parameters():
            if begin.first and name in run.params:
                assert (param == begin.first).all()
                assert optimizer.state[param]["step"] == begin.first
        return run

    return begin


def reach(run, *steps):
    for step in steps:
        for param in run.params.values():
            param.grad = torch.full_like(param, step)
        run.optimizer.step()
        with torch.no_grad():
            for param in run.params.values():
                param.fill_(step)
        run.save_step(step)


def harm(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_a_start_mends_what_a_crash_left_and_the_log_is_on_disk_before_a_checkpoint(
    begin, tmp_path, monkeypatch
):
    reach(run := begin(), 1)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", faulty := Faulty(0, full))
        with pytest.raises(UserError, match=f"{run.path}: could not be written: .*No space left"):
            reach(run, 2)
    assert faulty.done == [(durable.fsync, (run.path,))]
    unfinished(tmp_path, 1)[0].rename(tmp_path / ".phase1-step0000001.old")
    run.path.rename(tmp_path / ".log.jsonl.old")
    begin()
    assert begin.first == 1 and sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "log.jsonl", "phase1-step0000001"]  # fmt: skip


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(begin, tmp_path, capsys):
    reach(begin(), 2, 4)
    two, four = unfinished(tmp_path, 1)
    files = sorted(four.iterdir())
    assert len(files) == 6
    for path in files:
        sound = harm(path)
        capsys.readouterr()
        begin()
        printed = capsys.readouterr()
        assert begin.first == 2 and "resumed from step 2" in printed.out
        assert f"{path}: " in printed.err
        path.write_bytes(sound)
    run = begin()
    assert begin.first == 4
    del run.params["projector.fc1.bias"]  # as if it were frozen now
    with pytest.raises(UserError, match="no checkpoint of phase 1 is whole, of 2"):
        run.resume()
    assert "trained projector.fc1.bias, which this run freezes" in capsys.readouterr().err
    assert unfinished(tmp_path, 1) == [two, four]


def test_as_many_checkpoints_stay_as_keep_says_and_later_ones_do_not_count(begin, tmp_path):
    reach(begin(keep=3), 1, 2, 3, 4, 5)
    assert [p.name[-1] for p in unfinished(tmp_path, 1)] == ["3", "4", "5"]
    for n in (4, 5):
        harm(tmp_path / f"phase1-step000000{n}" / "model.safetensors")
    reach(begin(keep=1), 4)
    assert [p.name[-1] for p in unfinished(tmp_path, 1)] == ["4", "5"]


def test_every_flag_is_either_refused_by_name_or_harmless(tmp_path):
    flags, n_refused = TrainConfig(), 0
    for field in fields(TrainConfig):
        now = not field.default if isinstance(field.default, bool) else 7
        changed = replace(flags, **{field.name: ("x",) if field.name == "data" else now})
        older = {k: v for k, v in to_dict(flags).items() if k != field.name}
        for before in (to_dict(flags), older):  # a flag that is new has had its default before
            if field.name in MAY_DIFFER:
                module.refuse_changed_flags(tmp_path, before, changed)
                continue
            flag = "--" + field.name.replace("_", "-")
            with pytest.raises(Changed, match=rf"began with {flag} .*, now {flag} "):
                module.refuse_changed_flags(tmp_path, before, changed)
            n_refused += 1
    assert n_refused == 2 * (len(fields(TrainConfig)) - len(MAY_DIFFER)) > 50


def test_a_run_is_not_resumed_as_another(begin, tmp_path):
    """With the same flags: their defaults, the data, the model or the tokenizer have changed."""
    reach(begin(), 2)
    (tmp_path / "tokenizer.json").write_text("{}")
    for change, message in [
        ({"lr": 0.5}, "with --lr 0.1, now --lr 0.5"),
        ({"n_steps": 7}, "with --steps 9, now --steps 7"),
        ({"samples": [SAMPLE, SAMPLE]}, "with --data of samples"),
        ({"system": "Be brief."}, "began with another model or tokenizer"),
        ({"tokenizer": tmp_path / "tokenizer.json"}, "began with another model or tokenizer"),
    ]:
        with pytest.raises(Changed, match=f"phase1-step0000002: .*{message}"):
            begin(**change)
    config = tmp_path / "phase1-step0000002" / "config.json"
    values = json.loads(config.read_text())
    assert values.pop("run")["lr"] == 0.1  # as in a checkpoint of an older version
    config.write_text(json.dumps(values))
    seal(config.parent)
    with pytest.raises(Changed, match="with --dtype None"):
        begin()
    with pytest.raises(UserError, match="--kernels cuda"):
        begin(kernels="cuda")


def test_samples_that_differ_in_anything_or_their_order_are_others():
    others = [replace(SAMPLE, **{name: value}) for name, value in [
        ("id", "2"), ("turns", (("a", "c"),)), ("weight", 2.0), ("modality", "CT"),
        ("source", "y")]]  # fmt: skip
    rows = [[SAMPLE], [SAMPLE, others[0]], [others[0], SAMPLE], *([o] for o in others)]
    found = {data_digest(row) for row in rows}
    assert len(found) == 8 and {len(digest) for digest in found} == {16}


class Second(Processes):
    """The second of two; what the other one adds to every sum is `other`."""

    other = 0

    def sum(self, *values):
        return [value + self.other for value in values]


def test_another_number_of_processes_resumes_with_a_warning(begin, capsys):
    reach(begin(), 4)
    numbers = []
    for processes, is_other in ((ALONE, False), (Second(1, 2), True)):
        begin(processes)
        numbers.append(torch.rand(3))
        printed = capsys.readouterr()
        assert begin.first == 4 and ("processes 1, now 2" in printed.err) == is_other
        assert ("resumed from" in printed.out) != is_other  # the first alone prints
    assert not torch.equal(*numbers)


def test_generators_come_back_and_those_without_a_state_begin_anew_by_seed():
    def sample():
        return [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]  # noqa: NPY002

    sample()  # gauss and randn keep a second number for the next call
    states = {name: tensor.clone() for name, tensor in module.generators(CPU).items()}
    first = [sample(), sample()]
    module.set_generators(states | {"rng.cuda": torch.zeros(16)}, CPU, "other")
    assert [sample(), sample()] == first
    found = []
    for seed in ("0 6 0", "0 6 1", "0 6 0"):
        module.set_generators({}, CPU, seed)
        found.append(sample())
    assert found[0] == found[2] and not set(found[0]) & set(found[1])
    module.seed_all(seed := 2**32 + 2**31 + 5)  # numpy's take 32 bits
    torchs = torch.randn((), generator=torch.Generator().manual_seed(seed)).item()
    expected = random.Random(seed).random(), np.random.RandomState(2**31 + 5).rand(), torchs
    assert (random.random(), np.random.rand(), torch.randn(()).item()) == expected  # noqa: NPY002


def test_a_log_is_read_up_to_a_torn_line_and_harm_is_named(tmp_path):
    file = tmp_path / "log.jsonl"
    assert read_log(file) == []
    file.write_text('{"a": 1}\n{"b": 2}\n{"c')
    assert read_log(file) == [{"a": 1}, {"b": 2}]
    file.write_text('{"a": 1}\n{b": 2}\n')
    with pytest.raises(UserError, match=r"log.jsonl: line 2 is not JSON"):
        read_log(file)


def test_the_log_keeps_what_the_checkpoint_knows_and_how_the_run_began(begin, tmp_path):
    reach(begin(), 2)
    old = [{"phase": 2, "step": 8}, *({"phase": 1, "step": i} for i in range(4))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    run = begin()
    *kept, last = read_log(run.path)
    assert kept == old[:3]
    expected = {"phase": 1, "begins": 2, "steps": 9, "steps_per_epoch": 3, "trained": 544,
                "names": sorted(run.params), "flags": to_dict(run.flags)}  # fmt: skip
    assert {k: last[k] for k in expected} == expected
    assert run.resolved == {"dtype": "float32", "device": "cpu", "processes": 1, "steps": 9,
                            "lr": 0.1, "data": f"of samples {data_digest([SAMPLE])}"}  # fmt: skip
    run.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full: could not be written: .*No space left"):
        run.log(step=1)
    run.rank = 1
    run.log(step=1)  # the first process alone writes


# Signals


@pytest.fixture(autouse=True)
def handlers():
    """Those of a run in the foreground; in a shell's background SIGINT is ignored."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler),
              signal.signal(signal.SIGHUP, signal.SIG_DFL)]  # fmt: skip
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


def bare(**values):
    """A run of which only these attributes matter."""
    run, closed = object.__new__(Run), []
    bar = SimpleNamespace(close=lambda: closed.append(1), closed=closed)
    vars(run).update({"rank": 0, "world": 1, "bar": bar} | values)
    return run


@pytest.mark.parametrize(("name", "step"), [("SIGINT", 2), ("SIGTERM", 5), ("SIGHUP", 2)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(
    phase, monkeypatch, tmp_path, capfd, name, step
):
    """One in the last step, 5, is not lost."""
    number, plain = getattr(signal, name), Run.log
    before = signal.getsignal(number)

    def log(self, **values):
        plain(self, **values)
        if values.get("step") == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Run, "log", log)
        phase(1, *STEPS)
    assert stop.value.code == 128 + number and signal.getsignal(number) is before
    assert unfinished(tmp_path, 1)[-1].name == f"phase1-step000000{step + 1}"
    printed = capfd.readouterr().err
    assert f"stopped by {name} after {step + 1} steps" in printed and "--resume con" in printed
    assert "a second signal stops at once" in printed and not (tmp_path / "phase1").exists()
    phase(1, *RESUME)
    phase.ends_like_whole(1)


def test_a_second_signal_ends_it_at_once():
    if (child := os.fork()) == 0:
        with bare().interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_signals_are_noted_given_back_and_never_lost():
    before, run = signal.getsignal(signal.SIGINT), bare()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, when its terminal may go
    with pytest.raises(KeyboardInterrupt), run.interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        assert run.noted == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert run.noted == signal.SIGINT  # and nothing acts on it, so it is raised afterwards
    assert signal.getsignal(signal.SIGINT) is before and run.bar.closed == [1]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    with pytest.raises(ValueError, match=r"^$"), run.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError  # an error that is on its way goes first


def test_all_processes_stop_at_the_step_of_a_signal_to_one(capfd):
    run = bare(rank=1, world=2, processes=Second(1, 2))
    with run.interruptible():
        assert run.signal() == 0
        run.processes.other = 1
        assert run.signal() == signal.SIGTERM
        run.processes.other = -1  # sent after the others summed: they know at the next step
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signal() == 0
        run.processes.other = 0
        assert run.signal() == signal.SIGINT
        run.noted = 0
    assert capfd.readouterr().err == ""  # the first process alone prints


# What a step counts, and what follows it


def test_a_step_counts_positions_patches_and_routed_tokens(build, collate):
    model = build(moe={"router": "topk", "top_k": 2})
    batch = collate([([5, *[IMAGE_ID] * 4, 7], [IGNORE] * 5 + [7]), ([8, 9, 3], [IGNORE, 9, 3])])
    out, run = model.loss(batch), bare(load_shape=(2, 4), processes=Second(0, 2))
    run.begin_step()
    run.count(batch, out._replace(n_tokens=0))  # another process's
    assert not run.counts.any() and not run.routed.any()
    for _ in range(2):
        run.count(batch, out)
    routed = torch.stack([(r.gates[batch.mask] != 0).sum(dim=0) for r in out.routings])
    loss, load = run.sum_loss_and_load(0.5)
    assert loss == 0.5 and run.counts == [2, 8, 4, 18, 2 * (36 + 9), 6]  # images .. pairs, answers
    assert torch.equal(run.routed, 2.0 * routed) and routed.sum() == 2 * 2 * 9
    torch.testing.assert_close(load, routed / 9)
    run.world, run.processes.other = 2, 1
    run.begin_step()
    run.count(batch, out)
    assert run.sum_loss_and_load(0.5)[0] == 1.5 and run.counts[3] == 10


@pytest.mark.parametrize("n_layers", [0, 2])
def test_after_a_step_come_its_speed_and_mfu_and_every_few_steps_a_checkpoint(
    monkeypatch, n_layers
):
    logged, saved, updated, load = [], [], [], torch.full((n_layers, 4), 0.123456)
    bar = SimpleNamespace(update=lambda: updated.append(1), set_postfix=lambda **_: None)
    run = bare(costs=[10**i for i in range(6 + n_layers)], rate=1e6, load_shape=(n_layers, 4),
               noted=0, flags=TrainConfig(save_every=3), n_steps=6, bar=bar)  # fmt: skip
    run.log, run.save_step = lambda **values: logged.append(values), saved.append
    monkeypatch.setattr(module.time, "perf_counter", lambda: 5.0)
    run.begin_step()
    for step in range(6):
        assert not any(run.counts)
        run.counts, run.routed, run.start = [1, 2, 3, 400, 5, 6], torch.ones(n_layers, 4), 3.0
        run.after_step(step, 0.5, 0.1, 0.2, load)
        assert run.start == 5.0 and len(updated) == step + 1
    flops = 1 + 20 + 300 + 400_000 + 50_000 + 600_000 + 4e6 * bool(n_layers) * 11
    expected = {"step": 5, "loss": 0.5, "lr": 0.1, "grad_norm": 0.2, "tokens_per_s": 200,
                "mfu": pytest.approx(flops / 2 / 1e6)}  # fmt: skip
    assert logged[-1] == expected | ({"load": [[0.1235] * 4] * 2} if n_layers else {})
    assert saved == [3]  # the last step's is the finished checkpoint


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_scaled_to_their_joint_norm(build, world):
    """Two processes with the same gradients here: theirs are shares of one, so squares add up."""
    model = build()
    run = bare(world=world, params=dict(model.named_parameters()))
    run.processes = SimpleNamespace(sum=lambda x: [2 * x])
    run.params["unused"] = torch.nn.Parameter(torch.zeros(3))
    for p in model.parameters():
        p.grad = 0.01 * torch.randn_like(p)
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in before]).norm().item() * world**0.5
    for largest, scale in ((0.0, 1.0), (2 * norm, 1.0), (0.5, 0.5 / norm)):
        assert run.clip_gradients(largest) == pytest.approx(norm, rel=1e-5)
        for p, grad in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.grad, scale * grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_flags_of_speed_reach_the_model(tmp_path, monkeypatch, build, rank):
    called, names = [], ("compile_blocks", "checkpoint_blocks", "shard", "cache_features")
    for place, name in [(module.ops, "place_experts"), *((module, name) for name in names)]:
        monkeypatch.setattr(place, name, partial(lambda *args: called.append(args), name))
    model, processes, is_on = build(), Processes(rank, 2), rank == 1
    flags = TrainConfig(out=str(tmp_path), device="cpu", seed=7, expert_parallel=3, compile=is_on,
                        activation_checkpointing=is_on)  # fmt: skip
    torch.manual_seed(0)
    Run(3, flags, tmp_path, processes).place(model)
    numbers = torch.rand(3)
    torch.manual_seed(7 + 3 + 1000 if rank else 0)  # each process has dropout masks of its own
    assert torch.equal(torch.rand(3), numbers)
    assert called == [(name, model) for name in names[:2] if is_on] + [
        ("place_experts", model, CPU), ("shard", model, processes, CPU, 3),
        ("cache_features", model, flags, 2)]  # fmt: skip


def test_recomputed_activations_change_no_gradient(base):
    """Nor does dropout, or that what the blocks read is frozen; in evaluation nothing is kept."""
    decoder = shake(MedMoE(PRESETS["mini"].model)).decoder.train()
    x, mask, found, calls = torch.randn(2, 5, 16), torch.ones(2, 5).bool(), [], []
    decoder.blocks[1].ln.register_forward_hook(lambda *_: calls.append(1))
    for recomputes in (False, True):
        if recomputes:
            module.checkpoint_blocks(SimpleNamespace(decoder=decoder))
        torch.manual_seed(1)
        decoder.zero_grad()
        decoder(x, mask, Hints())[0].square().sum().backward()
        found.append([p.grad for p in decoder.blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(calls) == 1 + 2
    decoder.eval()(x, mask, Hints())[0].sum().backward()
    assert len(calls) == 1 + 2 + 1
