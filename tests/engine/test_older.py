"""Checkpoints of older versions: two more fields in config.json, and early TinyMed's layer."""

import torch

from engine import older
from moe import MoE
from routers import Hints
from tests.conftest import shake


def test_early_tinymeds_layer_has_a_dense_ffn_beside_and_fields_that_are_no_more_are_dropped(build):
    model = build("stablelm", {"meta": False, "layers": (1,), "router": "topk"})
    assert not older.has_residual(n for n, _ in model.named_parameters())
    older.add_residual(model)
    assert older.has_residual(n for n, _ in model.named_parameters())
    moe = shake(model).decoder.blocks[1].mlp
    assert moe.dense.state_dict().keys() == model.decoder.blocks[0].mlp.state_dict().keys()
    x, mask = torch.randn(2, 5, 32), torch.ones(2, 5).bool()
    y, _ = moe(x, mask, Hints())
    experts, _ = MoE.forward(moe, x, mask, Hints())
    c = (x @ moe.coefficient.weight.T + moe.coefficient.bias).exp()
    expected = (c[..., :1] * experts + c[..., 1:] * moe.dense(x)) / c.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    info = {"model": {"moe": {"top_k": 1, "every": 2, "residual": False}}}
    older.upgrade(info)
    assert info == {"model": {"moe": {"top_k": 1}}}
