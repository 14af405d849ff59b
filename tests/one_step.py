"""One step of train.py's loop, up to its gradients; and the losses of all steps."""

from contextlib import contextmanager
from dataclasses import replace

import train
from config import ASSETS, Recipe, TrainConfig
from engine.run import Run


class Stop(Exception):
    """Leaves the loop between backward and the optimizer."""


def place(folder, flags: TrainConfig) -> Run:
    flags = replace(flags, out=str(folder))
    folder.mkdir(exist_ok=True, parents=True)
    return Run(flags.phase, flags, ASSETS / "phi" / "tokenizer.json")


def gradients(model, data, rows, flags, run):
    """Gradients of the mean loss over these rows are left in the model -> loss, load (L, E).

    run.counts then has images, patches, samples, positions, pairs and supervised tokens.
    """
    reduce, found = run.sum_loss_and_load, []

    def stop(loss):
        found.append(reduce(loss))
        raise Stop

    data.epoch, run.sum_loss_and_load, mode = lambda *_: [list(rows)], stop, model.training
    model.train = lambda *_: model  # the caller has chosen
    try:
        train.train(model, data, replace(flags, steps=1), Recipe(1e-3, 1, len(rows)), run)
    except Stop:
        pass
    finally:
        del data.epoch, model.train
        run.sum_loss_and_load = reduce
    assert model.training == mode
    return found[0]


@contextmanager
def losses_of_steps():
    """The loss of every step of every run while this is open."""
    reduce, losses = Run.sum_loss_and_load, []

    def noting(run, loss):
        found = reduce(run, loss)
        losses.append(found[0])
        return found

    Run.sum_loss_and_load = noting
    try:
        yield losses
    finally:
        Run.sum_loss_and_load = reduce


@contextmanager
def stopped_after_a_checkpoint():
    """Ctrl-C in the first step after a checkpoint was saved."""
    reduce = Run.sum_loss_and_load

    def stop(run, loss):
        if list(run.folder.glob("*step*")):
            raise KeyboardInterrupt
        return reduce(run, loss)

    Run.sum_loss_and_load = stop
    try:
        yield
    finally:
        Run.sum_loss_and_load = reduce
