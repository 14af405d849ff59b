"""Power cuts at every disk operation of a save, and kill -9 of runs."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import durable
from engine.run import unfinished
from tests.engine.test_durable import Crash, Faulty, check, operations, prepare, save, torn, written
from tests.engine.test_durable import synced as synced
from tests.mini import losses, same, weights

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


def test_kill_9_twice_in_phase_3_changes_no_weights(tmp_path):
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv = [sys.executable, "train.py", "--data", "phantoms:24", "--steps", "12", "--save-every",
            "1", "--batch-size", "4", "--router-images", "40", "--jitter"]  # fmt: skip
    ends = [["--out", str(f), "--no-eval"] for f in (whole, out)]
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
