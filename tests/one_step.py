"""One step of train.py's loop, up to its gradients; and the losses of all steps."""

from contextlib import contextmanager, suppress
from dataclasses import replace
from unittest.mock import patch

import train
from config import ASSETS, Recipe, TrainConfig
from engine.run import Run


class Stop(Exception):
    """Leaves the loop between backward and the optimizer."""


def place(folder, flags: TrainConfig) -> Run:
    folder.mkdir(exist_ok=True, parents=True)
    return Run(flags.phase, replace(flags, out=str(folder)), ASSETS / "phi" / "tokenizer.json")


def before_each_step(action):
    """action(run, loss, load), after backward and before clipping, in every step of every run."""
    reduce = Run.sum_loss_and_load

    def noting(run, loss):
        found = reduce(run, loss)
        action(run, *found)
        return found

    return patch.object(Run, "sum_loss_and_load", noting)


def gradients(model, data, rows, flags, run):
    """Gradients of the mean loss over these rows are left in the model -> loss, load (L, E)."""
    found = []

    def stop(run, *loss_and_load):
        found.append(loss_and_load)
        raise Stop

    data.epoch = lambda *_: [list(rows)]
    with before_each_step(stop), suppress(Stop):
        train.train(model, data, replace(flags, steps=1), Recipe(1e-3, 1, len(rows)), run)
    del data.epoch
    return found[0]


@contextmanager
def losses_of_steps():
    """The loss of every step of every run while this is open."""
    losses = []
    with before_each_step(lambda run, loss, load: losses.append(loss)):
        yield losses


def stopped_after_a_checkpoint():
    """Ctrl-C in the first step after a checkpoint was saved."""

    def stop(run, *_):
        if list(run.folder.glob("*step*")):
            raise KeyboardInterrupt

    return before_each_step(stop)
