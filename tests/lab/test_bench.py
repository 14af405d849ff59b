"""The benchmark compares two models that compute the same; needs transformers for most of it."""

import importlib.util
import json
import sys

import pytest
import torch

from config import EXPERTS_AND_META, IGNORE, IMAGE_ID
from lab import bench
from model import freeze_all_but
from tests.conftest import build, collate

oracle = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
THEIR_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def pair(family, **moe):
    """Our sparse model and the assembled one."""
    ours = build(family, {"router": "random", **moe})
    freeze_all_but(ours, EXPERTS_AND_META)
    return ours, bench.Assembled(ours).eval()


def a_batch(side):
    image = [IMAGE_ID] * 4
    first = [1, 2, *image, 7, 8, 9, 10, 11], [IGNORE] * 8 + [9, 10, 11]
    rows = [first, ([5, *image, 8, 9], [IGNORE] * 5 + [8, 9]), ([5, 6, 7], [IGNORE, 6, 7])]
    return collate(rows, side=side)


def mean(loss):
    return loss.total / loss.n_tokens


@oracle
@FAMILIES
@pytest.mark.parametrize("top_k", [1, 2])
def test_loss_and_gradients_are_those_of_the_assembled_model(family, top_k):
    models, batch = pair(family, top_k=top_k), a_batch("right")
    losses = [mean(model.loss(batch)) for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = models
    for layer in (0, 2):
        mlp, their_mlp = ours.decoder.blocks[layer].mlp, theirs.decoder.model.layers[layer].mlp
        params = dict(mlp.experts.named_parameters())
        assert len(params) >= 3 and all(p.grad.abs().sum() > 0 for p in params.values())
        for name, param in params.items():
            part, kind = name.split(".")
            name = f"{THEIR_NAMES.get(part, part)}.{kind}"
            theirs_ = [expert.get_parameter(name) for expert in their_mlp.experts]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in theirs_]
            torch.testing.assert_close(param.grad, torch.stack(grads), rtol=1e-4, atol=1e-5)
        for param, other in zip(mlp.meta.parameters(), their_mlp.meta.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-5)


@oracle
@FAMILIES
def test_greedy_tokens_are_those_of_the_assembled_model(family):
    (ours, theirs), batch = pair(family), a_batch("left")
    tokens = bench.answer(ours, batch, torch.float32, 32)
    assert tokens.shape == (3, 32) and len(tokens.unique()) > 3
    assert torch.equal(tokens, theirs.answer(batch, torch.float32, 32))


@oracle
def test_two_steps_in_bf16_move_both_models_alike():
    models, batch, gains = pair("stablelm"), a_batch("right"), []
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
    assert counts[0] == counts[1] > 0
    for model in models:
        step, before = bench.stepper(model, torch.bfloat16), mean(model.loss(batch)).item()
        step(batch)
        step(batch)
        gains.append(before - mean(model.loss(batch)).item())
    assert gains[0] > 0 and gains[0] == pytest.approx(gains[1], rel=0.1)


@oracle
def test_train_and_generate_report_what_they_measured(capsys):
    small = ["--rounds", "2", "--data", "phantoms:8"]
    result = bench.main(["train", *small, "--steps", "1", "--batch-size", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    speeds, ratio = result["tokens_per_s"], result["ratio"]
    assert speeds["ours"]["min"] / speeds["transformers"]["max"] <= ratio["max"]
    result = bench.main(["generate", *small, "--new-tokens", "2"])
    assert result["batch_8"]["ratio"]["median"] > 0


def test_without_transformers_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["generate"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install transformers" in line


def test_ways_alternate_the_first_round_does_not_count_and_ratios_are_within_a_round():
    calls = []
    ways = {n: lambda n=n: calls.append(n) for n in ("a", "b")}
    seconds = bench.interleave(ways, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert bench.ratios([10, 40, 90], [5, 10, 30]) == {"median": 3, "min": 2, "max": 4}


def test_images_are_read_beside_training_and_memory_has_its_own_file(capsys):
    flags = ["--data", "phantoms:4", "--rounds", "1", "--steps", "1", "--batch-size", "4"]
    result = bench.main(["loader", *flags])
    assert set(result["images_per_s"]) == {"1 thread", "2 threads", "training"}
    assert bench.main(["memory", "--gpus", "8"])["gpus"] == 8
