"""The benchmark compares two models that compute the same: python -m pytest tests/lab/test_bench.py

Most of it is skipped where transformers is not installed: the project itself does not need it.
"""

import importlib.util
import json
import sys

import pytest
import torch

from config import EXPERTS_AND_META, IGNORE, IMAGE_ID
from lab import bench
from model import freeze_all_but, generate

oracle = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
THEIR_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@pytest.fixture(name="pair")
def _pair(build):
    """Our sparse model and the assembled one, by family."""

    def make(family, **moe):
        ours = build(family, {"router": "random", **moe})
        freeze_all_but(ours, EXPERTS_AND_META)
        return ours, bench.assembled(ours).eval()

    return make


@pytest.fixture(name="batch")
def _batch(collate):
    def make(side):
        image = [IMAGE_ID] * 4
        first = [1, 2, *image, 7, 8, 9, 10, 11], [IGNORE] * 8 + [9, 10, 11]
        rows = [first, ([5, *image, 8, 9], [IGNORE] * 5 + [8, 9]), ([5, 6, 7], [IGNORE, 6, 7])]
        return collate(rows, side=side)

    return make


def their_gradients(theirs, layer, name):
    """The gradients of what is `name` in our stacked experts; an idle expert of theirs has None."""
    part, kind = name.split(".")
    name = f"{THEIR_NAMES.get(part, part)}.{kind}"
    params = [e.get_parameter(name) for e in theirs.decoder.model.layers[layer].mlp.experts]
    return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])


@oracle
@FAMILIES
def test_loss_and_gradients_are_those_of_the_assembled_model(pair, batch, family):
    ours, theirs = pair(family)
    batch = batch("right")
    loss = bench.mean_loss(ours, batch)
    loss.backward()
    their_loss = theirs.loss(batch)
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    for layer in (0, 2):
        mlp, their_mlp = ours.decoder.blocks[layer].mlp, theirs.decoder.model.layers[layer].mlp
        assert all(p.grad.abs().sum() > 0 for p in mlp.experts.parameters())
        for name, param in mlp.experts.named_parameters():
            grad = their_gradients(theirs, layer, name)
            torch.testing.assert_close(param.grad, grad, rtol=1e-4, atol=1e-5)
        for param, other in zip(mlp.meta.parameters(), their_mlp.meta.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-5)


@oracle
@FAMILIES
def test_greedy_tokens_are_those_of_the_assembled_model(pair, batch, family):
    ours, theirs = pair(family)
    batch = batch("left")
    tokens = torch.stack([s.tokens for s in generate(ours, batch, eos_id=-1, max_new=32)], dim=1)
    assert torch.equal(tokens, theirs.generate(batch, 32))
    assert len(tokens.unique()) > 3


@oracle
def test_one_expert_a_token_keeps_its_probability_in_both(pair, batch):
    ours, theirs = pair("phi", top_k=1)
    loss = bench.mean_loss(ours, batch("right"))
    torch.testing.assert_close(loss, theirs.loss(batch("right")), rtol=1e-5, atol=0)


@oracle
def test_both_train_the_same_number_of_parameters(pair):
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in pair("phi")]
    assert counts[0] == counts[1] > 0


@oracle
def test_two_steps_in_bf16_move_both_models_alike(pair, batch):
    ours, theirs = pair("stablelm")
    gains = []
    for model, loss in ((ours, lambda b: bench.mean_loss(ours, b)), (theirs, theirs.loss)):
        step = bench.stepper(model, loss, torch.bfloat16)
        before = loss(batch("right")).item()
        for _ in range(2):
            step(batch("right"))
        gains.append(before - loss(batch("right")).item())
    assert gains[0] > 0
    assert gains[0] == pytest.approx(gains[1], rel=0.1)


@oracle
def test_train_and_generate_report_what_they_measured(capsys):
    small = ["--rounds", "2", "--data", "phantoms:8"]
    result = bench.main(["train", *small, "--steps", "1", "--batch-size", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    speeds, ratio = result["tokens_per_s"], result["ratio"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert speeds["ours"]["min"] / speeds["transformers"]["max"] <= ratio["max"]
    assert 0 < result["mfu"]["min"] <= result["mfu"]["max"] < 1
    result = bench.main(["generate", *small, "--new-tokens", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["batch_8"]["ratio"]["median"] > 0


def test_without_transformers_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lab.assembled", raising=False)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["generate"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "pip install transformers" in lines[0]


def test_ways_take_turns_and_the_first_round_does_not_count():
    calls = []
    ways = {n: lambda n=n: calls.append(n) or 1 for n in ("a", "b")}
    rates = bench.interleave(ways, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in rates.values()] == [2, 2]


def test_a_ratio_is_taken_within_a_round():
    assert bench.ratios([10, 40, 90], [5, 10, 30]) == {"median": 3, "min": 2, "max": 4}


def test_the_memory_plan_is_handed_to_its_own_file(capsys):
    found = bench.main(["memory", "--preset", "stablelm2", "--gpus", "8"])
    assert found["gpus"] == 8
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["preset"] == "stablelm2"


def test_the_loader_is_measured_beside_training(capsys):
    flags = ["--data", "phantoms:4", "--rounds", "1", "--steps", "1", "--batch-size", "4"]
    result = bench.main(["loader", *flags])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert set(result["images_per_s"]) == {"1 thread", "2 threads", "training"}
