"""Power cuts, kills and full disks at every disk operation, a thousand damages, kill -9 of runs."""

import contextlib
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

import pytest

import train
from checkpoint import load_checkpoint, read_config, read_seen
from config import PRESETS, UserError
from engine import durable
from engine.durable import recover
from engine.run import unfinished
from model import MedMoE
from tests.engine.test_durable import (
    Crash,
    Faulty,
    check,
    operations,
    prepare,
    save,
    synced,  # noqa: F401  a fixture
    torn,
    written,
)
from tests.engine.test_run import begin, reach
from tests.mini import losses, mini, same, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def crash(operation, *args):
    raise Crash


def kill(operation, *args):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number, operation, *args):
    raise OSError(number, os.strerror(number))


class Disk(Faulty):
    """Knows what has reached the disk: contents of files, entries of folders."""

    def __init__(self, at, folder, copy):
        super().__init__(at, crash)
        self.folder, self.copy, self.loose = folder, copy, set()
        self.keep_names()

    def keep_names(self):
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folder, self.copy)

    def __call__(self, operation, *args):
        super().__call__(operation, *args)
        if file := written(operation, args):
            self.loose |= {file.stat().st_ino, file.parent.stat().st_ino}
        elif operation is durable.fsync:
            self.loose.discard(args[0].stat().st_ino)
            if args[0] == self.folder:
                self.keep_names()

    def cut(self, names_are_lost):
        for path in [*self.folder.glob("*"), *self.folder.glob("*/*")]:
            if path.exists() and path.stat().st_ino in self.loose:
                if path.is_dir():
                    shutil.rmtree(path)
                    path.mkdir()
                else:
                    path.write_bytes(b"\0" * 7)
        if names_are_lost:
            shutil.rmtree(self.folder)
            shutil.copytree(self.copy, self.folder)


@pytest.mark.parametrize("names_are_lost", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_power_cut_takes_only_what_was_not_synced(tmp_path, monkeypatch, before, names_are_lost):
    n = len(operations(tmp_path, monkeypatch, before))
    for k in range(n + 1):
        folder = prepare(tmp_path, before)
        disk = Disk(k, folder, tmp_path / "copy")
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(durable, "act", disk)
            save(folder, "n")
        disk.cut(names_are_lost)
        letter = check(folder, before)
    assert n >= 9 and letter == "n"  # once save has returned, it is on the disk


def test_a_crash_while_a_crash_is_mended_costs_nothing_either(tmp_path, monkeypatch):
    n = len(operations(tmp_path, monkeypatch, True))
    assert n >= 13
    for k in range(n):
        for again in range(4):
            folder = prepare(tmp_path, True)
            with monkeypatch.context() as patch:
                patch.setattr(durable, "act", Faulty(k, crash))
                with pytest.raises(Crash):
                    save(folder, "n")
                patch.setattr(durable, "act", Faulty(again, torn))
                with contextlib.suppress(Crash):
                    recover(folder, "*")
            check(folder, True)


def test_a_crash_while_a_damaged_one_is_rolled_back_does_not_hide_the_damage(tmp_path, monkeypatch):
    for k in range(4):
        folder = prepare(tmp_path, True)
        shutil.copytree(folder / "x", folder / ".x.old")
        (folder / "x" / "b.json").write_text("n" * 100)
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(durable, "act", Faulty(k, torn))
            recover(folder, "x")
        assert check(folder, True) == "o"


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "parts"))


@pytest.mark.parametrize("number", [None, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_kill_or_an_error_at_any_operation_of_a_save_costs_no_checkpoint(
    preset, tmp_path, monkeypatch, number
):
    found, is_over = [], False
    while not is_over:
        k, folder = len(found), tmp_path / str(len(found))
        reach(run := begin(folder, keep=1), 1)
        if number is None:
            if (child := os.fork()) == 0:
                durable.act = Faulty(k, kill)
                reach(run, 2)
                os._exit(0)
            is_over = os.waitpid(child, 0)[1] == 0
        else:
            with monkeypatch.context() as patch:
                patch.setattr(durable, "act", Faulty(k, lambda *args: fail(number, *args)))
                try:
                    reach(run, 2)
                    is_over = True
                except UserError as error:
                    assert str(folder) in str(error) and os.strerror(number) in str(error)
        found.append(begin(folder).first)
    assert len(found) > 15 and set(found) == {1, 2} and found == sorted(found)


def harmed(data, rng):
    """Shorter, or with one bit the other way."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def test_a_thousand_damages_are_refused_by_the_name_of_the_file(preset, tmp_path):
    train.main(["--phase", "2", "--preset", "mini", "--data", "phantoms:16", "--steps", "1",
                "--router-images", "16", "--no-eval", "--out", str(tmp_path)])  # fmt: skip
    rng, files = random.Random(0), sorted((tmp_path / "phase2").iterdir())
    assert len(files) == 6
    model = MedMoE(read_config(tmp_path / "phase2")[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    readers = {"config.json": read_config, "seen.safetensors": read_seen}
    for i in range(1000):
        path = files[i % 6]
        sound = path.read_bytes()
        path.write_bytes(harmed(sound, rng))
        for read in (lambda folder: load_checkpoint(model, folder), readers.get(path.name)):
            if read:
                with pytest.raises(UserError, match=f"^{path}: "):
                    read(path.parent)
        path.write_bytes(sound)
    assert same(before, dict(model.named_parameters()))  # nothing was filled
    load_checkpoint(model, tmp_path / "phase2")


def command(folder, *argv):
    return [sys.executable, "train.py", "--data", "phantoms:24", "--save-every", "1", "--batch-size",
            "4", "--dtype", "float32", "--jitter", "--out", str(folder), *argv]  # fmt: skip


def kill_and_resume(argv, is_ready):
    """kill -9 when is_ready() is true, and again after the next checkpoint; then to the end."""
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for more in ([], ["--resume"]):
        before = is_ready()
        with subprocess.Popen([*argv, *more], **quiet) as run:
            while is_ready() == before:
                assert run.poll() is None
                time.sleep(0.002)
            time.sleep(0.01 * len(more))
            run.kill()
        assert run.returncode == -signal.SIGKILL
    subprocess.run([*argv, "--resume"], check=True, **quiet)


@pytest.mark.parametrize("number", [1, 3])
def test_kill_9_changes_neither_weights_nor_scores(tmp_path, number):
    argv = {}
    for name in ("whole", "out"):
        more = ["--phase", str(number), "--steps", "12", "--router-images", "40",
                "--json", str(tmp_path / f"{name}.json")]  # fmt: skip
        argv[name] = command(tmp_path / name, *more)
    subprocess.run(argv["whole"], cwd=ROOT, check=True, capture_output=True)
    kill_and_resume(argv["out"], lambda: unfinished(tmp_path / "out", number))
    for n in range(1, number + 1):
        whole, out = (tmp_path / name / f"phase{n}" for name in ("whole", "out"))
        assert same(weights(whole), weights(out)) and not unfinished(tmp_path / "out", n)
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
    scores = []
    for name in ("whole", "out"):
        values = json.loads((tmp_path / f"{name}.json").read_text())
        differ = {"checkpoint", "command", "trained_with"}
        scores.append({k: v for k, v in values.items() if k not in differ})
    assert scores[0] == scores[1]
