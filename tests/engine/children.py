"""Training in processes of their own, to be sent signals and killed.

They are forked from one that has loaded everything, so each begins at once.
"""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo

import train
from config import PRESETS, Preset
from engine.run import Run


class Hold(NamedTuple):
    """The run waits, when it has logged this step, for a file."""

    step: int
    file: Path


def work(preset: Preset, argv: list[str], output: Path, hold: Hold | None, largest: int | None):
    """largest: bytes that a file may have, as on a disk that is full."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, as is this one under nohup
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    PRESETS["mini"] = preset
    log = Run.log

    def wait(self, **values):
        log(self, **values)
        while hold and values.get("step") == hold.step and not hold.file.exists():
            time.sleep(0.005)

    Run.log = wait
    train.main(argv)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def begin(preset: Preset, argv: list[str], output: Path, hold=None, largest=None):
    """A process that runs train.py with these arguments; what it prints goes into the file."""
    child = CONTEXT.Process(target=work, args=(preset, argv, output, hold, largest))
    child.start()
    return child


def wait_for(child, found) -> None:
    """Until found() is true."""
    latest = time.monotonic() + 60
    while not found():
        assert child.is_alive() and time.monotonic() < latest
        time.sleep(0.005)


def end(child) -> int:
    """Its exit code; -9 if it was killed."""
    child.join(60)
    return child.exitcode
