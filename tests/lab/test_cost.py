"""What Med-MoE and dense controls cost: counted on the model, timed in interleaved rounds."""

import json

import pytest
import torch

from config import preset
from engine.flops import model_flops
from engine.inference import FusedAttention
from lab import bench, cost
from lab.cost import VARIANTS
from routers import Hints


def test_dense_controls_have_as_many_parameters_but_for_routers_and_output_biases():
    found, d = cost.count("phi2"), preset("phi2").model.decoder
    router, bias, ffn = 4 * (d.d_model + 1), d.d_model, 2 * d.d_model * d.d_ff + d.d_model + d.d_ff
    assert found["medmoe"]["activated"] - found["wide-3"]["total"] == 16 * (router + 2 * bias)
    assert found["medmoe"]["total"] - found["wide-5"]["total"] == 16 * (router + 4 * bias)
    assert found["medmoe"]["activated"] - found["top-1"]["activated"] == 16 * ffn
    assert found["top-1"]["activated"] == found["no-meta"]["activated"]
    shares = [found["medmoe"]["activated"] / found[key]["total"] for key in ("medmoe", "dense")]
    assert [found["medmoe"][name] for name in ("of own total", "of dense")] == shares


@pytest.mark.parametrize("key", VARIANTS)
def test_gflop_are_those_of_what_the_router_decides(key):
    """A prompt of 64 tokens and an image in a tiny model, counted from its routes."""
    config, variant = preset("tiny").model, VARIANTS[key]
    model, p = cost.build(config, variant).requires_grad_(False), config.vision.n_patches
    n, c = p + cost.PROMPT, model_flops(model)
    hidden = torch.randn(1, n, config.decoder.d_model)
    mask = torch.ones(1, n, dtype=torch.bool)
    _, routings = model.decoder(hidden, mask, Hints(prompt=mask))
    expected = c.image + p * c.patch + n * c.position + n * n * c.pair + c.answer
    expected += sum(int((r.gates != 0).sum()) * f for r, f in zip(routings, c.routed, strict=True))
    found = cost.count("tiny")[key]
    assert found["prefill"] == expected / 1e9
    token = c.position + sum(c.routed) * (variant.moe.top_k if variant.moe else 0)
    token += (n + (cost.ANSWER + 1) / 2) * c.pair + c.answer
    assert found["token"] == pytest.approx(token / 1e9)


@pytest.mark.parametrize("key", VARIANTS)
def test_what_is_timed_is_a_model_that_answers_and_one_that_learns(key):
    cpu, batches = torch.device("cpu"), cost.inputs("tiny", torch.device("cpu"))
    model = cost.answering("tiny", key, cpu, torch.float32)
    assert all(isinstance(block.attn, FusedAttention) for block in model.decoder.blocks)
    assert not any(p.requires_grad for p in model.parameters())
    assert bench.answer(model, batches["8"], torch.float32, 3).shape == (8, 3)
    model = cost.training("tiny", key, cpu)
    step = bench.stepper(model, torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(batches["1"]._replace(labels=batches["1"].ids.clamp(min=0)))
    learned = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    kinds = {n.split(".mlp.")[1].split(".")[0] for n in learned}
    experts = {"experts"} if key == "no-meta" else {"experts", "meta"}
    assert kinds == ({"fc1", "fc2"} if VARIANTS[key].moe is None else experts)


def test_the_command_prints_what_it_counted_and_measured(monkeypatch, capsys):
    for key in [k for k in VARIANTS if k not in ("dense", "medmoe")]:
        monkeypatch.delitem(VARIANTS, key)
    found = cost.main(["--measure", "tiny", "--rounds", "1"])
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == found
    times = found["measured"]["tiny"]
    assert {row["dense"]["ratio"]["median"] for row in times.values()} == {1.0}
    assert len(times) == 5 and times["training step"]["medmoe"]["ms"]["min"] > 0
    assert sum(line.startswith("  top-2 of 4 and meta") for line in table) == 4
    assert f"{found['counted']['phi2']['medmoe']['of 7 B']:.1%}" in "\n".join(table)
