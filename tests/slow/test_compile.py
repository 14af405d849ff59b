"""Compiled blocks train alike, and runs go on with and without them."""

import pytest
import torch

import train
from config import Recipe
from engine.inference import compile_blocks
from engine.run import checkpoint_blocks
from router_training import ffn_inputs
from tests.conftest import build, prompts
from tests.one_step import losses_of_steps, place
from tests.test_train import prepared

pytestmark = pytest.mark.slow


def compiled_losses(folder, *changes, resume=False):
    """Of 10 steps in phase 3, or of the last 5; without dropout: compiled, its masks differ."""
    model, data, flags = prepared(dropout=0.0, steps=10, save_every=5, resume=resume, keep=1)
    for change in changes:
        change(model)
    with losses_of_steps() as found:
        train.train(model, data, flags, Recipe(2e-3, 1, 4), place(folder, flags))
    return found


def test_compiled_blocks_train_alike_and_runs_go_on_with_and_without(tmp_path):
    whole = compiled_losses(tmp_path / "plain")
    same = compiled_losses(tmp_path / "compiled", compile_blocks)
    assert len(whole) == 10 and same == pytest.approx(whole, abs=1e-5)
    again = compiled_losses(tmp_path / "recomputed", checkpoint_blocks, compile_blocks)
    assert again == pytest.approx(whole, abs=1e-5)
    for folder, changes in (("plain", [compile_blocks]), ("compiled", [])):
        rest = compiled_losses(tmp_path / folder, *changes, resume=True)
        assert rest == pytest.approx(whole[5:], abs=1e-5)


@torch.no_grad()
def test_a_router_is_trained_on_the_inputs_of_compiled_ffns_too():
    model = build()
    expected = ffn_inputs(model, prompts(), (0, 2))
    compile_blocks(model)
    model.loss(prompts())  # compiled now, without hooks
    assert torch.equal(ffn_inputs(model, prompts(), (0, 2)), expected)
