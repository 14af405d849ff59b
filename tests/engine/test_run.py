"""A run that is interrupted ends as if it had not been; its log, signals, refusals."""

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tqdm import tqdm

import train
from config import IGNORE, IMAGE_ID, PHASES, PRESETS, TrainConfig, UserError, to_dict
from data import Sample
from engine import durable
from engine import run as module
from engine.processes import ALONE
from engine.run import Changed, Run, claim, read_log, unfinished
from model import MedMoE, freeze_all_but
from routers import Hints
from tests.conftest import shake
from tests.engine.test_durable import Crash
from tests.mini import losses, mini, same, weights

COMMON = ("--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--no-eval",
          "--router-images", "16")  # fmt: skip
STEPS = ("--steps", "6", "--save-every", "2", "--batch-size", "4", "--accumulate", "2", "--jitter")
RESUME = (*STEPS, "--resume")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Finished phases 1 and 2 to start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        out = tmp_path_factory.mktemp("base")
        train.main([*COMMON, "--phase", "2", "--steps", "2", "--out", str(out)])
        yield out


@pytest.fixture
def phase(base, tmp_path, monkeypatch):
    """phase(number, ...) runs it, kill=n to its n-th micro-batch; jitter uses all generators."""
    loss, plain = MedMoE.loss, train.jitter

    def jitter(images):
        return plain(images) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002

    def counted(self, batch):
        one.batches += 1
        if one.batches == one.kill:
            raise Crash
        return loss(self, batch)

    def one(number, *argv, out=tmp_path, kill=None):
        one.batches, one.kill = 0, kill
        init = [] if number == 1 else ["--init", str(base / f"phase{number - 1}")]
        argv = [*COMMON, "--phase", str(number), "--out", str(out), *init, *argv]
        if kill is None:
            return train.main(argv)
        with pytest.raises(Crash):
            train.main(argv)

    def ends_like_whole(number):
        undisturbed = base / f"whole{number}"
        if not undisturbed.exists():
            one(number, *STEPS, out=undisturbed)
        assert not unfinished(tmp_path, number)
        assert same(*(weights(out / f"phase{number}") for out in (tmp_path, undisturbed)))
        assert losses(tmp_path) == losses(undisturbed) and len(losses(tmp_path)) == 6

    monkeypatch.setattr(train, "jitter", jitter)
    monkeypatch.setattr(MedMoE, "loss", counted)
    one.ends_like_whole = ends_like_whole
    return one


@pytest.mark.parametrize("number", [1, 2, 3])
def test_two_kills_amid_an_accumulation_and_a_torn_log_change_nothing(phase, number, tmp_path):
    phase(number, *STEPS, kill=8)  # in the second half of step 4; saved was step 2
    phase(number, *RESUME, kill=6)  # of step 5; saved was step 4
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"phase": 1, "step": 5, "lo\0\xff')
    phase(number, *RESUME, "--save-every", "1", "--workers", "0", "--keep", "1")
    assert phase.batches == 2 * (6 - 4)  # it does not begin again
    phase.ends_like_whole(number)


def test_another_command_or_a_full_disk_loses_nothing(phase, capsys, monkeypatch, tmp_path):
    def refused(*argv):
        with pytest.raises(SystemExit, match=r"^2$"):
            phase(1, *argv)
        return capsys.readouterr().err

    phase(1, *STEPS, kill=9)
    found = unfinished(tmp_path, 1)
    assert [p.name for p in found] == ["phase1-step0000002", "phase1-step0000004"]
    assert f"{found[1]} is an unfinished run: --resume" in refused()
    assert f"{found[1]}: began with --seed 0, now --seed 1" in refused(*RESUME, "--seed", "1")
    with durable.locked(tmp_path):
        assert f"{tmp_path}: another run" in refused(*RESUME)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", Mock(side_effect=OSError("disk full")))
        assert f"{tmp_path / 'phase1'}: could not be written: disk full" in refused(*RESUME)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Run, "remove", Mock(side_effect=Crash))  # after the last save
        phase(1, *RESUME)
    assert unfinished(tmp_path, 1) == found and (tmp_path / "phase1").exists()
    phase(1, *RESUME)
    phase.ends_like_whole(1)


def test_the_log_is_on_the_disk_before_a_checkpoint_of_its_steps(phase, monkeypatch, tmp_path):
    act, on_disk, named = durable.act, [], []

    def noted(operation, *args):
        act(operation, *args)
        if (operation, args) == (durable.fsync, (tmp_path / "log.jsonl",)):
            on_disk[:] = losses(tmp_path)
        if operation is os.rename and args[1].name.startswith("phase1"):
            named.append((args[1].name, len(on_disk)))

    monkeypatch.setattr(durable, "act", noted)
    phase(1, *STEPS)
    steps = [(f"phase1-step{n:07}", n) for n in (2, 4)]
    assert named == [*steps, ("phase1", 6)]


SAMPLE = Sample("1", "x", "train", None, (("a", "b"),))


@pytest.fixture
def begin(base, tmp_path):
    """begin(...) -> a run without a loop, whose projector holds the number of the last step."""

    def begin(samples=(SAMPLE,), n_steps=9, lr=0.1, tokenizer=None, system="", **flags):
        preset = PRESETS["mini"]
        flags = TrainConfig(**{"preset": "mini", "phase": 1, "out": str(tmp_path), "resume": True,
                               "device": "cpu", "dtype": "float32"} | flags)  # fmt: skip
        with claim(tmp_path):
            run = Run(1, flags, tokenizer or preset.llm / "tokenizer.json")
            model = MedMoE(replace(preset.model, system=system))
            freeze_all_but(model, PHASES[1].trains)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            begin.first = run.begin(model, optimizer, samples, n_steps, 3, lr=lr)
        for param in run.params.values():
            assert not begin.first or (param == begin.first).all()
        return run

    return begin


def reach(run, *steps):
    for step in steps:
        for param in run.params.values():
            param.grad = torch.full_like(param, step)
        run.optimizer.step()
        for param in run.params.values():
            param.data.fill_(step)
        run.save_step(step)


def harm(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(begin, tmp_path, capsys):
    reach(begin(keep=2), 1, 2, 4)
    two, four = unfinished(tmp_path, 1)
    files = sorted(four.iterdir())
    assert two.name == "phase1-step0000002" and len(files) == 6
    for path in files:
        sound = harm(path)
        begin()
        assert begin.first == 2 and f"{path}: " in capsys.readouterr().err
        path.write_bytes(sound)
    begin()
    assert begin.first == 4
    harm(four / "model.safetensors")
    reach(begin(keep=1), 3)  # a damaged one does not count among those that are kept
    assert [p.name[-1] for p in unfinished(tmp_path, 1)] == ["3", "4"]
    harm(tmp_path / "phase1-step0000003" / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint of phase 1 is whole, of 2"):
        begin()
    assert len(unfinished(tmp_path, 1)) == 2


def test_a_run_is_not_resumed_as_another_with_the_same_flags(begin, tmp_path, monkeypatch):
    module.refuse_changed_flags(tmp_path, {}, TrainConfig(keep=9))  # begun before there were flags
    reach(begin(), 2)
    (tmp_path / "tokenizer.json").write_text("{}")
    for change, message in [
        ({"lr": 0.5}, "with --lr 0.1, now --lr 0.5"), ({"n_steps": 7}, "with --steps 9, now --s"),
        ({"samples": [SAMPLE, SAMPLE]}, "with --data of samples"),
        *(({"samples": [replace(SAMPLE, **other)]}, "with --data of samples") for other in (
            {"image": 3}, {"image_turn": 1}, {"id": ""}, {"turns": (("a", "c"),)}, {"weight": 2},
            {"modality": ""}, {"source": ""})),
        ({"system": "Be brief."}, "began with another model or tokenizer"),
        ({"tokenizer": tmp_path / "tokenizer.json"}, "began with another model")]:  # fmt: skip
        with pytest.raises(Changed, match=f"phase1-step0000002: .*{message}"):
            begin(**change)
    monkeypatch.setattr(torch, "__version__", "2.99.0")  # this is only warned of
    begin()


def test_a_parameter_that_steps_have_left_out_resumes_at_its_own_count(begin):
    run = begin()
    never, once, *others = run.params
    for left_out in ((never, once), (never,)):
        for name, param in run.params.items():
            param.grad = None if name in left_out else torch.ones_like(param)
        run.optimizer.step()
    for param in run.params.values():
        param.data.fill_(2.0)
    run.save_step(2)
    again = begin()
    steps = [again.optimizer.state[again.params[name]]["step"].item() for name in (once, *others)]
    assert others and steps == [1, *[2] * len(others)]
    assert not again.optimizer.state[again.params[never]]
    for each in (run, again):
        for param in each.params.values():
            param.grad = torch.ones_like(param)
        each.optimizer.step()
    assert same(run.params, again.params)


def test_the_log_keeps_what_the_checkpoint_knows_and_harm_is_named(begin, tmp_path):
    reach(run := begin(), 2)
    old = [{"phase": 2, "step": 8}, *({"phase": 1, "step": i} for i in range(4))]
    run.path.write_text("".join(json.dumps(r) + "\n" for r in old))
    # As a crash leaves them that comes before what was written has its name.
    run.path.rename(tmp_path / ".log.jsonl.old")
    unfinished(tmp_path, 1)[0].rename(tmp_path / ".phase1-step0000002.old")
    run = begin()
    *kept, last = read_log(run.path)
    assert begin.first == 2 and kept == old[:3] and (tmp_path / "phase1-step0000002").exists()
    assert last["begins"] == 2 and last["names"] == sorted(run.params)
    assert last["flags"] == to_dict(run.flags) and last["trained"] == 544
    run.path.write_text('{"a": 1}\n{b": 2}\n')
    with pytest.raises(UserError, match=r"log.jsonl: line 2 is not JSON"):
        read_log(run.path)
    run.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full: could not be written: .*No space left"):
        run.log(step=1)


def bare(**values):
    """A run of which only these attributes matter."""
    run = object.__new__(Run)
    vars(run).update({"rank": 0, "world": 1, "bar": Mock()} | values)
    return run


@pytest.mark.parametrize(("step", "is_signal"), [(2, True), (5, True), (2, False)])  # 5: the last
def test_a_signal_or_closed_stderr_saves_it(phase, monkeypatch, tmp_path, capsys, step, is_signal):
    plain = Run.log

    def log(self, **values):
        plain(self, **values)
        if values.get("step") == step and is_signal:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"^{128 + 15}$"):
        patch.setattr(Run, "log", log)
        if not is_signal:
            patch.setattr(tqdm, "update", Mock(side_effect=[True, True, BrokenPipeError]))
        phase(1, *STEPS)
    printed = capsys.readouterr().err
    assert f"stopped by SIGTERM after {step + 1} steps" in printed and "--resume" in printed
    assert unfinished(tmp_path, 1)[-1].name == f"phase1-step000000{step + 1}"
    assert not (tmp_path / "phase1").exists()
    phase(1, *RESUME)
    phase.ends_like_whole(1)


def test_signals_are_noted_given_back_and_never_lost_and_a_second_one_ends_it():
    run = bare(n_steps=3, title="phase 1", folder="x", processes=ALONE)
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    with pytest.raises(SystemExit, match="130"), run.interruptible():
        os.kill(os.getpid(), signal.SIGHUP)  # nohup ignores it, when the terminal may go
        assert run.noted == 0 == run.signal()
        os.kill(os.getpid(), signal.SIGINT)
        assert run.noted == signal.SIGINT == run.signal()
        # No step acts on it, so it ends the run when the phase is saved.
    assert {number: signal.signal(number, before[number]) for number in before} == handlers
    with pytest.raises(ValueError, match=r"^$"), run.interruptible():
        run.note(signal.SIGHUP, None)
        assert run.signal() == signal.SIGHUP
        raise ValueError  # an error that is on its way goes first
    if (child := os.fork()) == 0:
        with run.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_a_step_without_an_image_leaves_what_images_reach_to_no_momentum():
    params = {n: torch.nn.Parameter(torch.ones(1)) for n in ("vision.a", "projector.b", "decoder")}
    for n_images, left in ((0.0, ["decoder"]), (2.0, [*params])):
        for param in params.values():
            param.grad = torch.zeros(1)
        counts = torch.tensor([n_images, 0, 0, 4, 0, 0])
        run = bare(params=params, counts=counts, routed=torch.ones(1, 2), load_shape=(1, 2))
        run.sum_loss_and_load(3.0)
        run.drop_idle_gradients()
        assert [n for n, p in params.items() if p.grad is not None] == left


def test_other_processes_count_in_signals_and_norms_and_drop_out_otherwise(build, monkeypatch):
    params = {n: torch.nn.Parameter(torch.zeros(2)) for n in ("used", "unused")}
    run = bare(world=2, rank=1, number=3, noted=0, params=params, processes=Mock(),
               flags=TrainConfig(seed=7), device=torch.device("cpu"))  # fmt: skip
    run.processes.sum = lambda value: [2 * value]  # the other has the same as this one
    for largest, scale in ((0.0, 1.0), (99.0, 1.0), (1.0, 50**-0.5)):
        params["used"].grad = torch.tensor([3.0, 4.0])
        assert run.clip_gradients(largest) == pytest.approx(50**0.5)
        torch.testing.assert_close(params["used"].grad, scale * torch.tensor([3.0, 4.0]))
    run.processes.sum = lambda noted: [noted + 1]
    assert run.signal() == signal.SIGTERM
    for name in ("shard", "cache_features"):
        monkeypatch.setattr(module, name, Mock())
    run.place(build())
    assert module.shard.called and module.cache_features.called
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(7 + 3 + 1000)))


def test_a_step_counts_what_its_speed_mfu_and_load_are_computed_from(build, collate, monkeypatch):
    model = build(moe={"router": "topk", "top_k": 2})
    batch = collate([([5, *[IMAGE_ID] * 4, 7], [IGNORE] * 5 + [7]), ([8, 9, 3], [IGNORE, 9, 3])])
    out = model.loss(batch)
    run = bare(costs=[10**i for i in range(8)], rate=1e6, load_shape=(2, 4), log=Mock(), noted=0,
               flags=TrainConfig(), n_steps=6)  # fmt: skip
    run.begin_step()
    run.count(batch, out._replace(n_tokens=0))  # another process's
    assert not run.counts.any() and not run.routed.any()
    for _ in range(2):
        run.count(batch, out)
    loss, load = run.sum_loss_and_load(0.5)
    # Images, patches, sequences, positions, pairs of these, answers.
    assert loss == 0.5 and run.counts == [2, 8, 4, 18, 2 * (36 + 9), 6]
    routed = torch.stack([(r.gates[batch.mask] != 0).sum(dim=0) for r in out.routings])
    assert routed.sum() == 2 * 2 * 9
    torch.testing.assert_close(load, routed / 9)
    monkeypatch.setattr(module.time, "perf_counter", Mock(return_value=run.start + 2))
    run.after_step(4, loss, 0.1, 0.2, load)
    flops = 2 + 80 + 400 + 18_000 + 900_000 + 600_000 + 11e6 * 2 * 2 * 9
    logged = run.log.call_args.kwargs
    assert logged["step"] == 4 and logged["tokens_per_s"] == 18 / 2
    assert logged["mfu"] == pytest.approx(flops / 2 / 1e6)
    assert torch.tensor(logged["load"]).allclose(load, atol=1e-4)


def test_recomputed_activations_change_no_gradient(base):
    """Nor does dropout, or that what the blocks read is frozen; in evaluation nothing is kept."""
    decoder = shake(MedMoE(PRESETS["mini"].model)).decoder.train()
    x, mask, found, calls = torch.randn(2, 5, 16), torch.ones(2, 5).bool(), [], []
    decoder.blocks[1].ln.register_forward_hook(lambda *_: calls.append(1))
    for recomputes in (False, True):
        if recomputes:
            module.checkpoint_blocks(Mock(decoder=decoder))
        torch.manual_seed(1)
        decoder.zero_grad()
        decoder(x, mask, Hints())[0].square().sum().backward()
        found.append([p.grad for p in decoder.blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(calls) == 1 + 2
    decoder.eval()(x, mask, Hints())[0].sum().backward()
    assert len(calls) == 1 + 2 + 1
