"""train.py that gets SIGTERM: python tests/engine/stopped_train.py N FLAGS...

In the first process, SIGTERM arrives while the N-th step of the run is computed; 0: never.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from engine.run import Run


def main(n: int, argv: list[str]) -> None:
    reduce, calls = Run.sum_loss_and_load, []

    def stop_at_the_nth(run, loss):
        calls.append(1)
        if len(calls) == n and run.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return reduce(run, loss)

    Run.sum_loss_and_load = stop_at_the_nth
    train.main(argv)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
