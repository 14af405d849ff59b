"""A run that was interrupted ends as if it had not been.

Runs of a preset of 30 000 parameters with dropout and jitter. What jitter does depends here on
every random generator there is.
"""

import json
import random
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from checkpoint import load_model
from config import PRESETS, TrainConfig, UserError, to_dict
from data import Sample
from engine import run
from engine.durable import seal
from engine.processes import Processes
from engine.run import MAY_DIFFER, Run, claim, data_digest, refuse_changed_flags, unfinished
from model import MedMoE
from sources.tensorfiles import open_tensors
from tests.mini import losses, mini, same, weights

STEPS = ("--steps", "6", "--save-every", "2", "--batch-size", "4", "--accumulate", "2", "--jitter")


class Killed(BaseException):
    """Nothing in the project catches it."""


@pytest.fixture(autouse=True, scope="module")
def presets(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums come out the same every time
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Jitter that takes from all generators; `after` stops a run in its n-th micro-batch."""
    found = SimpleNamespace(optimizers=[], after=None, seen=[])
    plain = train.jitter

    def jitter(images):
        return plain(images) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002

    make, loss = train.make_optimizer, MedMoE.loss

    def make_optimizer(*args):
        found.optimizers.append(make(*args))
        return found.optimizers[-1]

    def counted(self, batch):
        found.seen.append(batch)
        if found.after is not None and len(found.seen) > found.after:
            raise Killed
        return loss(self, batch)

    monkeypatch.setattr(train, "jitter", jitter)
    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    monkeypatch.setattr(MedMoE, "loss", counted)
    return found


@pytest.fixture(scope="module")
def base(presets, tmp_path_factory):
    """Finished phases 1 and 2 to start from."""
    out = tmp_path_factory.mktemp("base")
    train.main(["--phase", "2", "--steps", "2", "--batch-size", "4", *common(out)])
    return out


def common(out):
    return ["--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--no-eval",
            "--router-images", "16", "--out", str(out)]  # fmt: skip


def phase(number, base, out, *argv):
    """This phase alone; the generators begin anywhere."""
    random.seed()
    np.random.seed()  # noqa: NPY002
    torch.seed()
    init = [] if number == 1 else ["--init", str(base / f"phase{number - 1}")]
    train.main(["--phase", str(number), *init, *common(out), *argv])


def moments(optimizer):
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    return [{k: v.clone() for k, v in s.items()} for s in states]


def interrupted(watched, number, base, out, kills, *argv):
    """Killed in these micro-batches, counted from each start, and gone on from each time."""
    resume = []
    for after in [*kills, None]:
        watched.after, watched.seen = after, []
        if after is None:
            phase(number, base, out, *resume, *argv)
        else:
            with pytest.raises(Killed):
                phase(number, base, out, *resume, *argv)
        resume = ["--resume"]


@pytest.fixture(scope="module")
def whole():
    """Undisturbed runs, made once each."""
    return {}


def undisturbed(whole, watched, number, base, out):
    if number not in whole:
        phase(number, base, out, *STEPS)
        whole[number] = (out, moments(watched.optimizers[-1]))
        watched.seen.clear()
    return whole[number]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_two_kills_amid_an_accumulation_change_nothing(whole, watched, base, tmp_path, number):
    out, expected = undisturbed(whole, watched, number, base, tmp_path / "whole")
    assert len(watched.optimizers) == 1
    # Six steps of two micro-batches: in the second half of step 2, then of step 4 (4 + 3 < 8).
    interrupted(watched, number, base, tmp_path / "parts", [5, 5], *STEPS)
    assert len(watched.seen) == 2 * (6 - 4)  # it goes on, and does not begin again
    found = moments(watched.optimizers[-1])
    assert len(expected) == len(found) > 0
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    name = f"phase{number}"
    assert same(weights(out / name), weights(tmp_path / "parts" / name))
    assert losses(out) == losses(tmp_path / "parts") and len(losses(out)) == 6
    if number == 2:
        routers = (dict(open_tensors(o / name / "router.safetensors"))
                   for o in (out, tmp_path / "parts"))  # fmt: skip
        assert same(*routers)


@pytest.mark.parametrize("name", ["rng.cpu", "rng.others", "process0"])
def test_a_generator_that_is_lost_is_noticed_by_these_tests(
    whole, watched, base, tmp_path, monkeypatch, name
):
    out, _ = undisturbed(whole, watched, 1, base, tmp_path / "whole")
    kept = run.generators
    monkeypatch.setattr(
        run, "generators", lambda d: {k: v for k, v in kept(d).items() if k != name}
    )
    interrupted(watched, 1, base, tmp_path / "parts", [5], *STEPS)
    is_same = same(weights(out / "phase1"), weights(tmp_path / "parts" / "phase1"))
    assert is_same == (name == "process0")  # the control of the control


def test_generators_come_back_and_those_without_a_state_begin_anew_by_seed():
    def sample():
        return [random.gauss(0, 1), np.random.randn(), torch.rand(()).item()]  # noqa: NPY002

    cpu = torch.device("cpu")
    sample()  # gauss and randn keep a second number for the next call
    states = run.generators(cpu)
    states = {name: tensor.clone() for name, tensor in states.items()}
    first = [sample(), sample()]
    run.set_generators(states, cpu, "other")
    assert [sample(), sample()] == first
    found = []
    for seed in ("0 6 0", "0 6 1", "0 6 0"):
        run.set_generators({}, cpu, seed)
        found.append(sample())
    assert found[0] == found[2] and not set(found[0]) & set(found[1])


def test_what_may_differ_changes_nothing(whole, watched, base, tmp_path):
    out, _ = undisturbed(whole, watched, 1, base, tmp_path / "whole")
    watched.after = 5
    with pytest.raises(Killed):
        phase(1, base, tmp_path / "a", *STEPS)
    (tmp_path / "a").rename(tmp_path / "b")  # another folder
    watched.after = None
    changed = ["--save-every", "1", "--workers", "0", "--keep", "1", "--device", "cpu", "--resume"]
    phase(1, base, tmp_path / "b", *STEPS, *changed)
    assert same(weights(out / "phase1"), weights(tmp_path / "b" / "phase1"))


@pytest.fixture
def killed(watched, base, tmp_path):
    """A run of phase 1 with checkpoints of steps 2 and 4."""
    watched.after = 9
    with pytest.raises(Killed):
        phase(1, base, tmp_path / "out", *STEPS)
    watched.after, watched.seen = None, []
    folder = tmp_path / "out"
    assert [p.name for p in unfinished(folder, 1)] == ["phase1-step0000002", "phase1-step0000004"]
    return folder


def harm(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    whole, watched, base, tmp_path, killed, capsys, file
):
    out, _ = undisturbed(whole, watched, 1, base, tmp_path / "whole")
    harm(killed / "phase1-step0000004" / file)
    phase(1, base, killed, *STEPS, "--resume")
    printed = capsys.readouterr()
    assert f"phase1-step0000004/{file}: damaged" in printed.err
    assert "resumed from step 2" in printed.out
    assert same(weights(out / "phase1"), weights(killed / "phase1"))
    assert losses(out) == losses(killed)


def refused(capsys, *args):
    """Exit code 2 and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        phase(*args)
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_damaged_checkpoints_alone_are_no_reason_to_begin_anew(watched, base, killed, capsys):
    for path in unfinished(killed, 1):
        harm(path / "model.safetensors")
    line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    assert str(killed) in line and "no checkpoint of phase 1 is whole, of 2" in line
    assert len(unfinished(killed, 1)) == 2 and not watched.seen


def test_nothing_is_lost_by_forgetting_resume(base, killed, capsys):
    line = refused(capsys, 1, base, killed, *STEPS)
    assert "phase1-step0000004 is an unfinished run: --resume continues it" in line


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda f: f.name)
def test_every_flag_is_either_refused_by_name_or_harmless(tmp_path, field):
    flags = TrainConfig()
    now = not field.default if isinstance(field.default, bool) else 7
    if isinstance(field.default, tuple):
        now = ("slake:x",)
    changed = replace(flags, **{field.name: now})
    if field.name in MAY_DIFFER:
        refuse_changed_flags(tmp_path, to_dict(flags), changed)
        return
    flag = "--" + field.name.replace("_", "-")
    with pytest.raises(UserError, match=rf"began with {flag}.*, now {flag} "):
        refuse_changed_flags(tmp_path, to_dict(flags), changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--steps", "7"), "with --steps 6, now --steps 7"),
        (("--batch-size", "8"), "with --batch-size 4, now --batch-size 8"),
        (("--seed", "1"), "with --seed 0, now --seed 1"),
        (("--dtype", "bfloat16"), "with --dtype float32, now --dtype bfloat16"),
        (("--router", "topk"), "with --router modality, now --router topk"),
        (("--lang", "zh"), "with --lang en, now --lang zh"),
        (("--no-jitter",), "with --jitter True, now --jitter False"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_as_another(watched, base, killed, capsys, change, message):
    line = refused(capsys, 1, base, killed, *STEPS, "--resume", *change)
    assert "phase1-step0000004" in line and message in line and not watched.seen


def test_a_run_does_not_go_on_with_other_defaults_or_other_data(
    watched, base, killed, capsys, monkeypatch
):
    """The same command, but what it means has changed."""
    recipes = {1: replace(PRESETS["mini"].recipes[1], lr=0.5)}
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "mini", replace(PRESETS["mini"], recipes=recipes))
        line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    assert "with --lr 0.01, now --lr 0.5" in line
    other = replace(PRESETS["mini"], model=replace(PRESETS["mini"].model, system="Be brief."))
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "mini", other)
        line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    assert "began with another model or tokenizer" in line
    tokenizer = PRESETS["mini"].llm / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    tokenizer.write_text(text)
    assert "began with another model or tokenizer" in line
    load = train.load_samples
    monkeypatch.setattr(train, "load_samples", lambda *a, **k: load(*a, **k)[::-1])
    line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    assert "with --data of samples" in line and not watched.seen


def test_an_older_checkpoint_is_not_gone_on_from_by_guess(base, killed, capsys):
    for path in unfinished(killed, 1):
        meta = json.loads((path / "config.json").read_text())
        del meta["run"]
        (path / "config.json").write_text(json.dumps(meta))
        seal(path)
    line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    assert "phase1-step0000004: began with --dtype None" in line


def test_samples_that_differ_in_anything_or_their_order_are_others():
    one = Sample("1", "x", "train", None, (("a", "b"),))
    others = [replace(one, id="2"), replace(one, turns=(("a", "c"),)), replace(one, weight=2.0),
              replace(one, modality="CT"), replace(one, source="y")]  # fmt: skip
    found = {data_digest(s) for s in ([one], [one, others[0]], [others[0], one],
                                      *([o] for o in others))}  # fmt: skip
    assert len(found) == 8


def test_another_number_of_processes_goes_on_with_a_warning(base, killed, capsys):
    class Second(Processes):
        """The second of two that never differ."""

        def sum(self, *values):
            return list(values)

    flags = read_flags(killed)
    for processes in (Processes(), Second(1, 2)):
        model = load_model(killed / "phase1-step0000004", torch.device("cpu"))[0]
        place = Run(1, flags, killed / "phase1-step0000004" / "tokenizer.json", processes)
        meta = run.read_config(killed / "phase1-step0000004")[1]
        place.resolved = meta["run"] | {"processes": processes.world}
        named = {n: p for n, p in model.named_parameters() if n.startswith("projector.")}
        place.model, place.params = model, named
        place.optimizer = torch.optim.AdamW(named.values())
        assert place.resume() == 4
        assert ("processes 1, now 2" in capsys.readouterr().err) == (processes.world == 2)
        numbers = torch.rand(3)
        run.set_generators({}, place.device, "0 4 1")
        assert torch.equal(numbers, torch.rand(3)) == (processes.world == 2)


def read_flags(folder):
    values = run.read_config(unfinished(folder, 1)[-1])[1]["flags"]
    return TrainConfig(**values | {"data": tuple(values["data"]), "resume": True})


def test_as_many_checkpoints_stay_as_keep_says(watched, base, tmp_path):
    watched.after = 11
    with pytest.raises(Killed):
        phase(1, base, tmp_path, *STEPS, "--save-every", "1", "--keep", "3")
    assert [p.name[-1] for p in unfinished(tmp_path, 1)] == ["3", "4", "5"]


def test_a_log_without_its_last_end_is_mended(whole, watched, base, tmp_path, killed):
    out, _ = undisturbed(whole, watched, 1, base, tmp_path / "whole")
    for torn in ('{"phase": 1, "step": 5, "lo', "\0\0\0\0\xff"):
        with (killed / "log.jsonl").open("a", encoding="latin-1") as file:
            file.write(torn)
    phase(1, base, killed, *STEPS, "--resume")
    records = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert losses(killed) == losses(out)
    assert [r["begins"] for r in records if "begins" in r] == [4]


def test_a_log_with_harm_in_its_middle_is_named(base, killed, capsys):
    text = (killed / "log.jsonl").read_text()
    (killed / "log.jsonl").write_text("{harm\n" + text)
    line = refused(capsys, 1, base, killed, *STEPS, "--resume")
    assert f"{killed / 'log.jsonl'}: line 1 is not JSON" in line


def test_logs_have_each_step_once_after_any_kill(watched, base, tmp_path):
    steps = ("--steps", "23", "--save-every", "6", "--batch-size", "4")
    interrupted(watched, 1, base, tmp_path, [8, 7, 9], *steps)
    assert [r["step"] for r in losses(tmp_path)] == list(range(23))


def test_a_logged_step_that_is_done_again_is_logged_once(watched, base, tmp_path):
    """Killed in step 11, when step 10 is in the log and in no checkpoint."""
    steps = ("--steps", "12", "--save-every", "10", "--batch-size", "4")
    interrupted(watched, 1, base, tmp_path, [11], *steps)
    assert [r["step"] for r in losses(tmp_path)] == list(range(12))


ROUTER = """
import torch
from routers import TopKRouter, top_k_gates

class Balanced(TopKRouter):
    def __init__(self, d_model, n_experts, **how):
        super().__init__(d_model, n_experts, **how)
        self.register_buffer("bias", torch.zeros(n_experts))

    def gate(self, logits, mask, x):
        gates = top_k_gates((logits + self.bias).softmax(dim=-1), self.top_k)
        if self.training:
            load = (gates[mask] != 0).float().mean(dim=0)
            self.bias += 0.1 * (load.mean() - load).sign()
        return gates
"""


def test_a_routers_buffer_goes_on_too(watched, base, tmp_path):
    (tmp_path / "balanced.py").write_text(ROUTER)
    how = (*STEPS, "--router", f"{tmp_path / 'balanced.py'}:Balanced")
    phase(3, base, tmp_path / "whole", *how)
    interrupted(watched, 3, base, tmp_path / "parts", [5], *how)
    whole, parts = (weights(tmp_path / n / "phase3") for n in ("whole", "parts"))
    assert same(whole, parts) and whole["decoder.blocks.0.mlp.router.bias"].any()


def test_after_a_crash_that_followed_the_last_save_the_phase_ends_as_before(
    watched, base, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        remove = Run.remove

        def stop(self, paths):
            if (self.folder / "phase1").exists():
                raise Killed
            remove(self, paths)

        watched.after = 9
        with pytest.raises(Killed):
            phase(1, base, tmp_path, *STEPS)
        watched.after = None
        patch.setattr(Run, "remove", stop)
        phase(1, base, tmp_path, *STEPS, "--resume")
    assert len(unfinished(tmp_path, 1)) == 2
    before = weights(tmp_path / "phase1")
    phase(1, base, tmp_path, *STEPS, "--resume")
    assert "resumed from step 4" in capsys.readouterr().out
    assert not unfinished(tmp_path, 1) and same(before, weights(tmp_path / "phase1"))
    phase(1, base, tmp_path, *STEPS, "--resume")
    assert "phase 1: done before" in capsys.readouterr().out


def test_a_finished_phase_is_not_taken_for_a_later_run_of_it(
    watched, base, tmp_path, killed, capsys
):
    """A second run of the phase was interrupted: that one goes on."""
    killed.rename(tmp_path / "second")
    phase(1, base, killed, "--steps", "1", "--seed", "3")
    for path in unfinished(tmp_path / "second", 1):
        path.rename(killed / path.name)
    phase(1, base, killed, *STEPS, "--resume")
    assert "resumed from step 4" in capsys.readouterr().out
    assert not unfinished(killed, 1)


def test_a_finished_phase_is_not_taken_for_one_with_other_flags(base, tmp_path, capsys):
    phase(1, base, tmp_path, "--steps", "1")
    line = refused(capsys, 1, base, tmp_path, "--steps", "2", "--resume")
    assert "with --steps 1, now --steps 2" in line


def test_it_is_saved_before_it_is_evaluated(base, tmp_path, monkeypatch):
    def evaluate(command, env):
        assert command[2] == str(tmp_path / "phase1") and not unfinished(tmp_path, 1)
        load_model(tmp_path / "phase1", torch.device("cpu"))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(train.subprocess, "run", evaluate)
    with pytest.raises(SystemExit) as stop:
        phase(1, base, tmp_path, "--steps", "1", "--eval")
    assert stop.value.code == 3 and (tmp_path / "phase1").is_dir()


def test_a_start_mends_what_a_crash_left(tmp_path, base):
    phase(1, base, tmp_path, "--steps", "1")
    (tmp_path / "phase1").rename(tmp_path / ".phase1.old")
    (tmp_path / ".phase1-step0000003.part").mkdir()
    with claim(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "log.jsonl", "phase1"]
