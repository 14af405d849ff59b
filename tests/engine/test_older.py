"""Checkpoints of older versions: two more fields in config.json, and early TinyMed's layer."""

import json
from dataclasses import asdict

import pytest
import torch

from checkpoint import load_model
from config import MoEConfig
from engine import older
from engine.durable import seal
from moe import MoE
from routers import Hints
from tests import mini
from tests.conftest import shake


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_the_layer_of_early_tinymed_mixes_experts_with_a_dense_ffn(build, family):
    model = build(family, {"meta": False, "layers": (1,), "router": "topk"}).bfloat16()
    assert not older.has_residual(n for n, _ in model.named_parameters())
    model.decoder.blocks[1].mlp.router.float()
    older.add_residual(model)
    assert older.has_residual(n for n, _ in model.named_parameters())
    moe = shake(model).decoder.blocks[1].mlp
    assert moe.dense.state_dict().keys() == model.decoder.blocks[0].mlp.state_dict().keys()
    assert {p.dtype for p in moe.dense.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in moe.coefficient.parameters()} == {torch.float32}  # as the router
    moe, x, mask = moe.float(), torch.randn(2, 5, 32), torch.ones(2, 5).bool()
    y, routing = moe(x, mask, Hints())
    experts, _ = MoE.forward(moe, x, mask, Hints())
    for b in range(2):
        for t in range(5):
            c0, c1 = (moe.coefficient.weight @ x[b, t] + moe.coefficient.bias).exp()
            expected = (c0 * experts[b, t] + c1 * moe.dense(x[b, t])) / (c0 + c1)
            torch.testing.assert_close(y[b, t], expected, atol=1e-5, rtol=0)
    assert torch.equal(routing.gates, moe.router(x, mask, Hints()).gates)


@pytest.mark.parametrize("moe", [None, MoEConfig()])
def test_fields_that_are_no_more_are_dropped_from_config_json(tmp_path, moe):
    folder = mini.checkpoint(tmp_path / "old", moe)
    before, _, _ = load_model(folder, torch.device("cpu"))
    info = json.loads((folder / "config.json").read_text())
    if moe:
        info["model"]["moe"] |= {"every": 2, "residual": False}
    (folder / "config.json").write_text(json.dumps(info))
    seal(folder)
    after, _, _ = load_model(folder, torch.device("cpu"))
    assert after.config == before.config
    older.upgrade(info)
    assert info["model"]["moe"] == (moe and {**asdict(moe), "layers": None})
