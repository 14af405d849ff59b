"""Runs that are killed, stopped, or out of disk, and checkpoints that are damaged.

python -m pytest tests/engine/test_faults.py; with -m slow the whole of phase 3 through the command line.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from checkpoint import load_checkpoint, load_model, read_config, read_seen
from config import PRESETS, TrainConfig, UserError
from engine import durable
from engine.cli import user_errors
from engine.processes import Processes
from engine.run import Run, claim, unfinished
from model import MedMoE
from tests.engine import children
from tests.mini import losses, mini, same, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def preset(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums come out the same every time
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # of children
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        yield PRESETS["mini"]
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def handlers():
    """Those of a run in the foreground; in a shell's background SIGINT is ignored."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler),
              signal.signal(signal.SIGHUP, signal.SIG_DFL)]  # fmt: skip
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


def argv(out, *more):
    return ["--phase", "1", "--preset", "mini", "--data", "phantoms:16", "--dtype", "float32",
            "--no-eval", "--jitter", "--out", str(out), *more]  # fmt: skip


class Faults:
    """Stands for durable.act, and for its k-th call does something else."""

    def __init__(self, at=-1, fault=None):
        self.at, self.fault, self.n = at, fault, 0

    def __call__(self, operation, *args):
        self.n += 1
        if self.n - 1 == self.at:
            self.fault()
        operation(*args)


def fail(number):
    def fault():
        raise OSError(number, os.strerror(number))

    return fault


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Saving:
    """A run that has saved step 1, and computed step 2."""

    def __init__(self, preset, folder, keep):
        folder.mkdir()
        flags = TrainConfig(preset="mini", out=str(folder), keep=keep, resume=True)
        self.folder, self.place = folder, Run(1, flags, preset.llm / "tokenizer.json")
        self.model = MedMoE(preset.model)
        named = self.model.named_parameters()
        self.named = {n: p for n, p in named if n.startswith("projector.")}
        self.optimizer = torch.optim.AdamW(self.named.values())
        self.place.model, self.place.optimizer = self.model, self.optimizer
        self.place.params, self.place.n_steps = self.named, 9
        self.place.resolved |= {"data": "none", "steps": 9}
        self.place.begin_log(0, 9)
        self.begin()

    def begin(self):
        self.optimizer.state.clear()
        for path in unfinished(self.folder, 1):
            shutil.rmtree(path)
        self.compute(1)
        self.save(1)
        self.compute(2)

    def compute(self, step):
        with torch.no_grad():
            for param in self.named.values():
                param.fill_(step)
        sum(p.sum() for p in self.named.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step=2):
        self.place.save_step(step)

    def resume(self):
        """The next start -> the step it resumes from; everything must be of that step."""
        with claim(self.folder):
            assert [p.name for p in self.folder.glob(".*")] == [".lock"]  # the rest is mended
        step = self.place.resume()
        for param in self.named.values():
            assert (param - step).abs().max() < 0.01
            assert self.optimizer.state[param]["step"] == step
        return step


@pytest.fixture
def saving(preset, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # takes its time
    return Saving(preset, tmp_path / "out", keep=1)


# Every operation of a save


def n_operations(saving, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", counted := Faults())
        saving.save()
    assert counted.n == 19
    return counted.n


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_error_at_any_operation_of_a_save_is_told_and_costs_no_checkpoint(
    saving, monkeypatch, number
):
    found = []
    for k in range(n_operations(saving, monkeypatch)):
        saving.begin()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "act", Faults(k, fail(number)))
            with pytest.raises(UserError, match=rf"out.*could not be .*{os.strerror(number)}"):
                saving.save()
        found.append(saving.resume())
    assert set(found) == {1, 2} and found == sorted(found)


def test_a_kill_at_any_operation_of_a_save_costs_no_checkpoint(saving, monkeypatch):
    found = []
    for k in range(n_operations(saving, monkeypatch)):
        saving.begin()
        child = os.fork()
        if child == 0:
            durable.act = Faults(k, kill)
            saving.save()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found.append(saving.resume())
    assert set(found) == {1, 2} and found == sorted(found)


def one_line(err):
    """The message of the error; nothing else but the progress bar may be on stderr."""
    lines = [x.split("\r")[-1] for x in err.splitlines()]
    (line,) = [x for x in lines if x and not x.startswith("phase 1: ")]
    assert line.startswith("error: ")
    return line


def test_an_error_in_a_run_ends_it_with_one_line(tmp_path, monkeypatch, capsys):
    steps = ("--steps", "4", "--save-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", counted := Faults())
        train.main(argv(tmp_path / "whole", *steps))
    whole = weights(tmp_path / "whole" / "phase1")
    for k in range(0, counted.n, 3):
        capsys.readouterr()
        out = tmp_path / str(k)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(durable, "act", Faults(k, fail(errno.ENOSPC)))
            train.main(argv(out, *steps))
        line = one_line(capsys.readouterr().err)
        assert stop.value.code == 2 and str(out) in line and "No space left on device" in line
        train.main(argv(out, *steps, "--resume"))
        assert same(whole, weights(out / "phase1")) and not unfinished(out, 1)


def test_a_folder_that_cannot_be_written_is_an_error_before_any_training(capsys, monkeypatch):
    """/sys is read-only, even to root."""
    monkeypatch.setattr(train, "run_phase", None)
    with pytest.raises(SystemExit) as stop:
        train.main(argv("/sys"))
    assert stop.value.code == 2 and "error: /sys" in capsys.readouterr().err


def test_a_log_that_cannot_grow_is_told(tmp_path, preset):
    place = Run(1, TrainConfig(out=str(tmp_path)), preset.llm / "tokenizer.json")
    place.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full: could not be written: .*No space left"):
        place.log(step=1)


# Damage


def harmed(data, rng):
    """Shorter, or with one bit the other way."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory):
    """A finished phase 2: with a router, and with what was seen."""
    out = tmp_path_factory.mktemp("damage")
    train.main(argv(out, "--phase", "2", "--steps", "1", "--router-images", "16"))
    names = {p.name for p in (out / "phase2").iterdir()}
    assert names == {"config.json", "model.safetensors", "router.safetensors", "seen.safetensors",
                     "tokenizer.json", "checksums.json"}  # fmt: skip
    return out / "phase2"


def test_a_thousand_damages_are_refused_by_the_name_of_the_file(finished):
    rng = random.Random(0)
    files = sorted(finished.iterdir())
    model = MedMoE(read_config(finished)[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    for i in range(1000):
        path = files[i % len(files)]
        sound = path.read_bytes()
        path.write_bytes(harmed(sound, rng))
        with pytest.raises(UserError) as error:
            load_checkpoint(model, finished)
        assert str(error.value).startswith(f"{path}: ")
        if path.name == "config.json":
            with pytest.raises(UserError, match=r"config\.json: damaged"):
                read_config(finished)
        if path.name == "seen.safetensors":
            with pytest.raises(UserError, match=r"seen\.safetensors: damaged"):
                read_seen(finished)
        path.write_bytes(sound)
    assert same(before, dict(model.named_parameters()))  # nothing was filled
    load_checkpoint(model, finished)


def test_a_damaged_checkpoint_is_asked_nothing(finished):
    for name in ("model.safetensors", "tokenizer.json", "router.safetensors"):
        path = finished / name
        sound = path.read_bytes()
        path.write_bytes(harmed(sound, random.Random(2)))
        with pytest.raises(UserError, match=f"{name}: damaged"):
            load_model(finished, torch.device("cpu"))
        path.write_bytes(sound)


def test_whatever_is_damaged_a_run_goes_on_from_the_checkpoint_before(preset, tmp_path, capsys):
    saving, rng = Saving(preset, tmp_path / "out", keep=2), random.Random(1)
    saving.save()
    one, two = unfinished(saving.folder, 1)
    files = sorted(two.iterdir())
    assert len(files) == 6
    for i in range(60):
        path = files[i % len(files)]
        sound = path.read_bytes()
        path.write_bytes(harmed(sound, rng))
        capsys.readouterr()
        assert saving.resume() == 1
        assert f"{path}: " in capsys.readouterr().err or i >= len(files)  # each is named once
        path.write_bytes(sound)
    assert saving.resume() == 2
    for path in (one, two):
        (path / "trainer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint of phase 1 is whole, of 2"):
        saving.resume()


# Signals and kills, sent to processes of their own


def output_of(out):
    return out.with_name(f"{out.name}.output")


def begin(preset, out, *more, **limits):
    return children.begin(preset, argv(out, *more), output_of(out), **limits)


def begin_and_hold(preset, out, step, *more):
    """A run that has logged this step and waits for the file `go` -> the process, the file."""
    go, log = out.with_name(f"{out.name}.go"), out / "log.jsonl"
    child = begin(preset, out, *more, hold=children.Hold(step, go))
    children.wait_for(child, lambda: log.exists() and f'"step": {step}, "loss"' in log.read_text())
    return child, go


LONG = ("--steps", "50", "--save-every", "20")


@pytest.fixture(scope="module")
def whole(preset, tmp_path_factory):
    """LONG, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    train.main(argv(out, *LONG))
    return out


def ends_like(out, whole):
    return same(weights(out / "phase1"), weights(whole / "phase1")) and losses(out) == losses(whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_go_on(preset, tmp_path, whole, name):
    out, number = tmp_path / "out", getattr(signal, name)
    child, go = begin_and_hold(preset, out, 0, *LONG)
    os.kill(child.pid, number)
    go.touch()
    assert children.end(child) == 128 + number
    (path,) = unfinished(out, 1)
    step = read_config(path)[1]["step"]
    load_model(path, torch.device("cpu"))
    printed = output_of(out).read_text()
    assert "Traceback" not in printed and not (out / "phase1").exists()
    assert printed.splitlines()[-1] == (
        f"phase 1: stopped by {name} after {step} steps, saved in {out}; "
        "the same command with --resume continues"
    )
    train.main(argv(out, *LONG, "--resume"))
    assert ends_like(out, whole)


def test_a_second_signal_ends_it_at_once(preset, tmp_path):
    out = tmp_path / "out"
    child, _ = begin_and_hold(preset, out, 0, *LONG)
    os.kill(child.pid, signal.SIGINT)
    os.kill(child.pid, signal.SIGTERM)
    assert children.end(child) == 128 + signal.SIGTERM
    assert "saved in" not in output_of(out).read_text() and not unfinished(out, 1)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path, monkeypatch):
    out, log = tmp_path / "out", Run.log

    def interrupt(self, **values):
        log(self, **values)
        if values.get("step") == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "log", interrupt)
    with pytest.raises(SystemExit) as stop:
        train.main(argv(out, "--steps", "4"))
    assert stop.value.code == 143 and not (out / "phase1").exists()
    monkeypatch.setattr(Run, "log", log)
    train.main(argv(out, "--steps", "4", "--resume"))
    train.main(argv(tmp_path / "whole", "--steps", "4"))
    assert same(weights(tmp_path / "whole" / "phase1"), weights(out / "phase1"))


def surrounded(rank=0):
    """A run of which only the signals matter."""
    run = object.__new__(Run)
    run.rank, run.world, run.mfus, run.bar = rank, rank + 1, [], SimpleNamespace(close=lambda: None)
    return run


def test_signals_are_noted_given_back_and_never_lost():
    before, run = signal.getsignal(signal.SIGINT), surrounded()
    with pytest.raises(KeyboardInterrupt), run.interruptible():
        assert run.noted == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert run.noted == signal.SIGINT  # and nothing acts on it, so:
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match=r"^$"), run.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError  # an error that is on its way goes first


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """So nohup can keep a run alive when its terminal goes."""
    before, run = signal.signal(signal.SIGHUP, signal.SIG_IGN), surrounded()
    with run.interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        assert run.noted == 0
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_all_processes_stop_at_the_step_of_a_signal_to_one(capfd):
    class Second(Processes):
        others = 0

        def sum(self, *values):
            return [v + self.others for v in values]

    run = surrounded(rank=1)
    run.processes = Second(1, 2)
    with run.interruptible():
        assert run.signal() == 0
        run.processes.others = 1
        assert run.signal() == signal.SIGTERM
        run.processes.others = -1  # sent after the others summed: they know at the next step
        os.kill(os.getpid(), signal.SIGINT)
        assert run.signal() == 0
        run.processes.others = 0
        assert run.signal() == signal.SIGINT
        run.noted = 0
    assert capfd.readouterr().err == ""  # the first process alone prints


def test_ctrl_c_outside_the_loop_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        user_errors(main)([])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(preset, tmp_path, whole):
    out, rng, kills = tmp_path / "out", random.Random(3), 0
    while True:
        before = unfinished(out, 1)
        child = begin(preset, out, *LONG[:2], "--save-every", "3", "--resume")
        while child.is_alive() and unfinished(out, 1) == before:
            time.sleep(0.002)
        child.join(rng.uniform(0, 0.02))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
    assert child.exitcode == 0 and kills >= 1
    assert ends_like(out, whole) and not unfinished(out, 1)


def test_a_second_run_in_a_folder_is_refused(preset, tmp_path, capsys):
    out = tmp_path / "out"
    child, _ = begin_and_hold(preset, out, 0, *LONG)
    for more in ((), ("--resume",)):
        with pytest.raises(SystemExit) as stop:
            train.main(argv(out, *LONG, *more))
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {out}: another run is writing here\n"
    child.kill()
    assert children.end(child) == -signal.SIGKILL
    train.main(argv(out, "--steps", "1"))


def test_a_file_that_may_not_grow_ends_the_run_and_leaves_what_was_saved(preset, tmp_path, whole):
    """RLIMIT_FSIZE: writes stop short for real, as on a full disk."""
    out = tmp_path / "out"
    child, _ = begin_and_hold(preset, out, 20, *LONG)
    child.kill()
    child.join()
    before = unfinished(out, 1)
    child = begin(preset, out, *LONG, "--resume", largest=60_000)
    assert children.end(child) == 2
    line = output_of(out).read_text().splitlines()[-1]
    assert line.startswith(f"error: {out / 'phase1'}") and "could not be written" in line
    assert "File too large" in line and unfinished(out, 1) == before
    train.main(argv(out, *LONG, "--resume"))
    assert ends_like(out, whole)


def kill_and_resume(command, ready):
    """kill -9 when ready() is true, then the same command with --resume."""
    with open(os.devnull, "w") as nowhere:
        run = subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere)
        while not ready():
            assert run.poll() is None
            time.sleep(0.005)
        run.kill()
        assert run.wait() == -signal.SIGKILL
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_kill_9_and_resume_through_the_command_line(tmp_path):
    def tiny(name):
        return ["--phase", "1", "--data", "phantoms:16", "--steps", "10", "--batch-size",
                "4", "--save-every", "1", "--dtype", "float32", "--no-eval", "--out",
                str(tmp_path / name)]  # fmt: skip

    train.main(tiny("whole"))
    command = [sys.executable, "train.py", *tiny("out")]
    kill_and_resume(command, lambda: unfinished(tmp_path / "out", 1))
    assert ends_like(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_in_phase_3_changes_neither_weights_nor_scores(tmp_path):
    def command(name):
        return [sys.executable, "train.py", "--phase", "3", "--data", "phantoms:24", "--steps",
                "12", "--save-every", "3", "--batch-size", "8", "--router-images", "40",
                "--jitter", "--out", str(tmp_path / name),
                "--json", str(tmp_path / f"{name}.json")]  # fmt: skip

    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    kill_and_resume(command("out"), lambda: unfinished(tmp_path / "out", 3))
    for number in (1, 2, 3):
        whole, out = (tmp_path / name / f"phase{number}" for name in ("whole", "out"))
        assert same(weights(whole), weights(out))
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
    whole, out = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "out"))
    differ = {"checkpoint", "command", "trained_with"}
    assert {k: v for k, v in whole.items() if k not in differ} == {
        k: v for k, v in out.items() if k not in differ
    }
