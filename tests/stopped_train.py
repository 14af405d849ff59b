"""train.py that is asked to stop: python tests/stopped_train.py N FLAGS...

In the first process, SIGTERM arrives while the N-th step of the run is computed; 0: never.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from engine import step


def main(n: int, argv: list[str]) -> None:
    forward, calls = step.forward_backward, []

    def stop_at_the_nth(model, data, rows, flags, run):
        calls.append(1)
        if len(calls) == n and run.processes.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, data, rows, flags, run)

    step.forward_backward = stop_at_the_nth
    train.main(argv)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
