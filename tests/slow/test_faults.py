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

from checkpoint import load_checkpoint, read_config
from config import UserError
from engine import durable
from engine.durable import recover
from engine.run import unfinished
from model import MedMoE
from tests.engine.test_durable import Crash, Faulty, check, operations, prepare, save, torn, written
from tests.engine.test_durable import synced as synced
from tests.engine.test_run import base as base
from tests.engine.test_run import begin as begin
from tests.engine.test_run import reach
from tests.mini import checkpoint, losses, same, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Disk(Faulty):
    """Knows what has reached the disk: contents of files, entries of folders."""

    def __init__(self, at, folder, copy):
        super().__init__(at, torn)
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
    for k in range(n + 1):
        for again in range(4):
            folder = prepare(tmp_path, True)
            with monkeypatch.context() as patch:
                patch.setattr(durable, "act", Faulty(k, torn))
                with contextlib.suppress(Crash):
                    save(folder, "n")
                if k == n:  # rolls back one that was damaged later
                    shutil.copytree(folder / "x", folder / ".x.old")
                    (folder / "x" / "b.json").write_text("o" * 100)
                patch.setattr(durable, "act", Faulty(again, torn))
                with contextlib.suppress(Crash):
                    recover(folder, "*")
            letter = check(folder, True)
    assert n >= 13 and letter == "n"


def fault(number, *args):
    """An error of the disk; 0: kill -9."""
    if not number:
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [0, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_kill_or_an_error_at_any_operation_of_a_save_costs_no_checkpoint(begin, tmp_path, number):
    found, code = [], None
    while code != 0:
        for path in unfinished(tmp_path, 1):
            shutil.rmtree(path)
        reach(run := begin(keep=1), 1)
        if (child := os.fork()) == 0:
            durable.act = Faulty(len(found), lambda *args: fault(number, *args))
            try:
                reach(run, 2)
            except UserError as error:
                is_named = str(tmp_path) in str(error) and os.strerror(number) in str(error)
                os._exit(3 if is_named else 4)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 3 if number else -signal.SIGKILL)
        begin()
        found.append(begin.first)
    assert len(found) > 15 and set(found) == {1, 2} and found == sorted(found)


def test_a_thousand_damages_are_refused_by_the_name_of_the_file(tmp_path):
    folder, rng = checkpoint(tmp_path / "phase3"), random.Random(0)
    files, model = sorted(folder.iterdir()), MedMoE(read_config(folder)[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert len(files) == 5
    for i in range(1000):
        path, sound = files[i % 5], files[i % 5].read_bytes()
        at = rng.randrange(len(sound))
        one_bit = bytes([sound[at] ^ 1 << rng.randrange(8)]) + sound[at + 1 :]
        path.write_bytes(sound[:at] + rng.choice([b"", one_bit]))
        with pytest.raises(UserError, match=f"^{path}: "):
            load_checkpoint(model, folder)
        path.write_bytes(sound)
    assert same(before, dict(model.named_parameters()))  # nothing was filled


def test_kill_9_changes_neither_weights_nor_scores(tmp_path):
    """Twice in phase 3, through the command line."""
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv = [sys.executable, "train.py", "--data", "phantoms:24", "--steps", "12", "--save-every",
            "1", "--batch-size", "4", "--router-images", "40", "--jitter"]  # fmt: skip
    ends = [["--out", str(f), "--json", str(f.with_suffix(".json"))] for f in (whole, out)]
    subprocess.run([*argv, *ends[0]], check=True, **quiet)
    for more in ([], ["--resume"]):
        before = unfinished(out, 3)
        with subprocess.Popen([*argv, *ends[1], *more], **quiet) as run:
            while unfinished(out, 3) == before and run.poll() is None:
                time.sleep(0.002)
            run.kill()
        assert run.returncode == -signal.SIGKILL
    subprocess.run([*argv, *ends[1], "--resume"], check=True, **quiet)
    for name in ("phase1", "phase2", "phase3"):
        assert same(weights(whole / name), weights(out / name))
    assert losses(whole) == losses(out) and not unfinished(out, 3)
    scores = [json.loads(f.with_suffix(".json").read_text()) for f in (whole, out)]
    differ = dict.fromkeys(("checkpoint", "command", "trained_with"))
    assert scores[0] | differ == scores[1] | differ
