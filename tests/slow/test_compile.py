"""Compiled blocks train alike, and runs go on with and without them."""

import pytest
import torch

import train
from config import Recipe
from engine.inference import compile_blocks
from engine.run import checkpoint_blocks
from router_training import ffn_inputs
from routers import Hints
from tests.conftest import build, prompts
from tests.one_step import losses_of_steps, place
from tests.test_train import prepared

pytestmark = pytest.mark.slow


def compiled_losses(folder, compiles, recompute=False, resume=False):
    """Of 10 steps in phase 3, saved in the middle, or of the last 5.

    Without dropout: compiled, its masks differ.
    """
    model, data, flags = prepared(dropout=0.0, steps=10, save_every=5, resume=resume, keep=1)
    if recompute:
        checkpoint_blocks(model)
    names = [name for name, _ in model.named_parameters()]
    if compiles:
        compile_blocks(model)
    with losses_of_steps() as found:
        train.train(model, data, flags, Recipe(2e-3, 1, 4), place(folder, flags))
    assert [name for name, _ in model.named_parameters()] == names
    return found


def test_compiled_blocks_train_alike_and_runs_go_on_with_and_without(tmp_path):
    whole = compiled_losses(tmp_path / "plain", False)
    same = compiled_losses(tmp_path / "compiled", True)
    assert len(whole) == 10 and same == pytest.approx(whole, abs=1e-5)
    again = compiled_losses(tmp_path / "recomputed", True, recompute=True)
    assert again == pytest.approx(whole, abs=1e-5)
    for folder, compiles in (("plain", True), ("compiled", False)):
        rest = compiled_losses(tmp_path / folder, compiles, resume=True)
        assert rest == pytest.approx(whole[5:], abs=1e-5)


def test_a_router_is_trained_on_the_inputs_of_compiled_ffns_too():
    inputs = []
    for compiles in (False, True):
        model = build()
        if compiles:
            compile_blocks(model)
        with torch.no_grad():
            model(*prompts()[:2], prompts().images, Hints())
        inputs.append(ffn_inputs(model, prompts(), (0, 2)))
    assert torch.equal(*inputs)
