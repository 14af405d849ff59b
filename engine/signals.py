"""Ctrl-C and kill during the loop: the step is finished first, and a checkpoint saved."""

import os
import signal
from types import FrameType

from engine.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """While it is entered, the first of these signals is noted; a second one ends the process."""

    def __init__(self, processes: Processes):
        self.processes, self.noted = processes, 0

    def __enter__(self) -> "Signals":
        found = {number: signal.getsignal(number) for number in SIGNALS}
        # nohup wants SIGHUP ignored, a script's & SIGINT; None belongs to somebody else.
        self.before = {n: h for n, h in found.items() if h not in (signal.SIG_IGN, None)}
        for number in self.before:
            signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            os._exit(128 + number)
        self.noted = number
        if self.processes.is_first:  # not print: it may have been interrupted in the middle
            os.write(2, b"\nstops after this step; a second signal stops at once\n")

    def asked(self) -> int:
        """A signal that some process was sent, told to all of them at the same step; 0: none."""
        (n_asked,) = self.processes.sum(self.noted > 0)
        return (self.noted or signal.SIGTERM) if n_asked else 0

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.noted and kind is None:  # it came after the last step: not lost
            signal.raise_signal(self.noted)
