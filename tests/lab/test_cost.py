"""What Med-MoE and dense controls cost: counted on the model, timed in interleaved rounds."""

import pytest
import torch

from config import preset
from engine.flops import model_flops
from lab import cost
from lab.cost import VARIANTS
from routers import Hints


def test_dense_controls_have_as_many_parameters_but_for_routers_and_output_biases():
    found, d = cost.count("phi2"), preset("phi2").model.decoder
    router, bias, ffn = 4 * (d.d_model + 1), d.d_model, 2 * d.d_model * d.d_ff + d.d_model + d.d_ff
    assert found["medmoe"]["activated"] - found["wide-3"]["total"] == 16 * (router + 2 * bias)
    assert found["medmoe"]["total"] - found["wide-5"]["total"] == 16 * (router + 4 * bias)
    for key in ("top-1", "no-meta"):
        assert found["medmoe"]["activated"] - found[key]["activated"] == 16 * ffn
    assert found["medmoe"]["of dense"] == found["medmoe"]["activated"] / found["dense"]["total"]


@pytest.mark.parametrize("key", VARIANTS)
def test_gflop_are_those_of_what_the_router_decides(key):
    """A prompt of 64 tokens and an image in a tiny model, counted from its routes."""
    config, variant = preset("tiny").model, VARIANTS[key]
    model, p = cost.build(config, variant).requires_grad_(False), config.vision.n_patches
    n, c = p + cost.PROMPT, model_flops(model)
    mask = torch.ones(1, n, dtype=torch.bool)
    hidden = torch.randn(1, n, config.decoder.d_model)
    _, routings = model.decoder(hidden, mask, Hints(prompt=mask))
    expected = c.image + p * c.patch + n * c.position + n * n * c.pair + c.answer
    expected += sum(int((r.gates != 0).sum()) * f for r, f in zip(routings, c.routed, strict=True))
    found = cost.count("tiny")[key]
    assert found["prefill"] == expected / 1e9
    token = c.position + sum(c.routed) * (variant.moe.top_k if variant.moe else 0)
    token += (n + (cost.ANSWER + 1) / 2) * c.pair + c.answer
    assert found["token"] == pytest.approx(token / 1e9)


def test_trained_are_experts_and_meta_or_the_dense_ffns_in_their_place():
    d, cpu = preset("tiny").model.decoder, torch.device("cpu")
    for key, n in zip(VARIANTS, (1, 5, 5, 4, 3, 5), strict=True):  # FFNs in each of two blocks
        named = cost.training("tiny", key, cpu).named_parameters()
        trained = {name: p.numel() for name, p in named if p.requires_grad}
        assert {name[:21] for name in trained} == {"decoder.blocks.0.mlp.", "decoder.blocks.2.mlp."}
        biases = 1 if VARIANTS[key].moe is None else n  # of the output: a wide FFN has one
        assert sum(trained.values()) == 2 * (n * (2 * d.d_model + 1) * d.d_ff + biases * d.d_model)


def test_the_command_counts_and_measures(monkeypatch, capsys):
    for key in set(VARIANTS) - {"dense", "medmoe"}:
        monkeypatch.delitem(VARIANTS, key)
    found = cost.main(["--measure", "tiny", "--rounds", "1"])
    times = found["measured"]["tiny"]
    assert {row["dense"]["ratio"]["median"] for row in times.values()} == {1.0}
    assert len(times) == 5 and times["training step"]["medmoe"]["ms"]["min"] > 0
    assert f"{found['counted']['phi2']['medmoe']['of 7 B']:.1%}" in capsys.readouterr().out
