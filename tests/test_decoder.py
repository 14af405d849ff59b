"""The decoders equal their equations; padding and caches change nothing.

python -m pytest tests/test_decoder.py
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from config import IMAGE_ID
from decoder import Cache, Decoder, apply_rope, causal_mask, rope
from routers import Hints
from tests import reference
from tests.conftest import DECODERS, PROMPTS, build, prompts, randn
from tests.golden.make import ours, outputs

FAMILIES = pytest.mark.parametrize("family", DECODERS)
DENSE, TOP_2, SEQUENCE = None, {"router": "topk"}, {"level": "sequence", "top_k": 1}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@torch.no_grad()
def logits_of(model, ids, mask, images=None, hints=Hints(), cache=None):
    images = torch.zeros(0, 3, 32, 32) if images is None else images
    hidden, routings = model(ids, mask, images, hints, cache)
    return model.decoder.lm_head(hidden), routings


@FAMILIES
@pytest.mark.parametrize(
    ("moe", "padding"), [(DENSE, "between"), (TOP_2, "left"), (SEQUENCE, "left"), (TOP_2, "right")]
)
def test_logits_equal_the_equations_whatever_padding_there_is(family, moe, padding):
    model, batch = build(family, moe), prompts(side=padding if padding != "between" else "right")
    if padding == "between":
        batch.mask[:] = True
        batch.mask[:, [0, 6]] = False
    prompt = batch.mask.clone()
    prompt[:, -3:] = False  # so much less to look at for a router of level "sequence"
    prompt[1] = batch.mask[1]
    logits, routings = logits_of(model, batch.ids, batch.mask, batch.images, Hints(prompt=prompt))
    images = iter(batch.images.split(1))
    for r in range(3):
        its_images = next(images) if IMAGE_ID in PROMPTS[r] else batch.images[:0]
        with torch.no_grad():
            row = batch.ids[r], batch.mask[r], its_images, prompt[r]
            close(logits[r], reference.logits(model, *row))
    assert logits.std() > 1 and len(routings) == (0 if moe is None else 2)


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_transformers_with_and_without_a_cache(family, side):
    model, golden = ours(family), outputs(family)
    ids, mask, expected = (golden[f"{side}.{name}"] for name in ("ids", "mask", "logits"))
    assert expected[mask].std() > 0.3
    close(logits_of(model, ids, mask)[0][mask], expected[mask])
    if side == "left":
        cache = Cache(len(model.decoder.blocks))
        cuts = pairwise([0, 5, *range(6, 12)])
        parts = [logits_of(model, ids[:, a:b], mask[:, a:b], cache=cache)[0] for a, b in cuts]
        close(torch.cat(parts, dim=1)[mask], expected[mask])


@FAMILIES
@pytest.mark.parametrize(
    ("moe", "cuts"), [(DENSE, []), (DENSE, [10, 12]), (TOP_2, [11]), (SEQUENCE, [10, 11, 12])]
)
def test_text_that_continues_a_cache_gets_the_logits_and_routes_of_the_whole(family, moe, cuts):
    model, batch = build(family, moe), prompts()
    ids = torch.cat([batch.ids, torch.randint(3, 60, (3, 4))], dim=1)
    mask = torch.cat([batch.mask, torch.ones(3, 4).bool()], dim=1)
    prompt = mask & (torch.arange(13) < 9)
    expected, its_routings = logits_of(model, ids, mask, batch.images, Hints(prompt=prompt))

    cache = Cache(3)
    found = [logits_of(model, batch.ids, batch.mask, batch.images, Hints(batch.mask), cache)]
    for start, end in pairwise([9, *cuts, 13]):
        found.append(logits_of(model, ids[:, start:end], mask[:, start:end], cache=cache))
    close(torch.cat([logits for logits, _ in found], dim=1)[mask], expected[mask])
    for layer, routing in enumerate(its_routings):
        gates = torch.cat([routings[layer].gates for _, routings in found], dim=1)
        assert torch.equal(gates != 0, routing.gates != 0)
    assert len(found[0][1]) == len(its_routings) == (0 if moe is None else 2)

    assert torch.equal(cache.mask, mask)
    n_kv_heads = model.config.decoder.n_kv_heads or 4
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape == layer.values.shape == (3, n_kv_heads, 13, 8)
        if moe is None or i == 1:
            assert layer.routing is None
        else:
            last = its_routings[i // 2]
            assert layer.routing.gates.shape == layer.routing.logits.shape == (3, 1, 4)
            close(layer.routing.gates, last.gates[:, -1:])
            close(layer.routing.logits, last.logits[:, -1:])


def test_routings_are_those_of_the_sparse_blocks_in_their_order():
    model, batch, seen = build(moe={"router": "topk"}), prompts(), []
    for i in (2, 0):
        router = model.decoder.blocks[i].mlp.router
        router.register_forward_hook(lambda module, args, routing: seen.append(routing.gates))
    _, routings = logits_of(model, batch.ids, batch.mask, batch.images)
    assert [r.gates.data_ptr() for r in routings] == [gates.data_ptr() for gates in seen]
    assert len(seen) == 2


def test_the_causal_mask_allows_real_positions_up_to_the_querys_own_and_always_itself():
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    expected = [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    ]
    assert causal_mask(real, 4).dtype == torch.float32
    assert causal_mask(real, 4)[:, 0].exp().tolist() == expected
    assert torch.equal(causal_mask(real, 2), causal_mask(real, 4)[:, :, 2:])


@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_the_first_channels_of_each_head_are_rotated_by_their_position(rotary_dim):
    x, positions = randn(2, 3, 4, 8), torch.tensor([[0, 1, 2, 9], [0, 0, 30, 7]])
    rotated = apply_rope(x, *rope(positions, rotary_dim, 100.0))
    for b in range(2):
        for h in range(3):
            close(rotated[b, h], reference.rope(x[b, h], positions[b], rotary_dim, 100.0))
    assert torch.equal(rotated[..., rotary_dim:], x[..., rotary_dim:])


def test_rotation_keeps_bf16_and_is_computed_in_fp32():
    x = randn(1, 2, 5, 8).bfloat16()
    cos, sin = rope(torch.tensor([[500, 501, 502, 503, 504]]), 4, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("phi", {"embed"}),
        ("stablelm", {"embed", "lm_head", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}),
        ("llama", {"embed", "lm_head", "ln_f", "ln_1", "ln_2", "attn.q", "attn.k", "attn.v",
                   "attn.o", "mlp.gate", "mlp.up", "mlp.down"}),
    ],
)  # fmt: skip
def test_biases_are_where_each_family_has_them(family, without):
    names = [name for name, _ in build(family).decoder.named_parameters()]
    layers = {name.rpartition(".")[0] for name in names if name.endswith("weight")}
    bare = {layer for layer in layers if f"{layer}.bias" not in names}
    assert {layer.partition("blocks.")[2][2:] or layer for layer in bare} == without


@FAMILIES
def test_norms_dropout_and_a_tied_head_follow_the_config(family):
    model = Decoder(replace(DECODERS[family], norm_eps=0.25, dropout=0.125, tied=True))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    assert {layer.eps for layer in norms} == {0.25} and len(norms) == (4 if family == "phi" else 7)
    assert [block.drop.p for block in model.blocks] == [0.125] * 3
    assert model.lm_head.weight is model.embed.weight
    model = Decoder(DECODERS[family])
    assert model.lm_head.weight is not model.embed.weight


@FAMILIES
def test_dropout_is_on_both_branches_of_a_block(family):
    block, x, mask = build(family).decoder.blocks[0], randn(1, 4, 32), torch.ones(1, 4).bool()
    block.drop.p = 1.0
    rest = causal_mask(mask, 4), *rope(torch.arange(4)[None], 2, 10000.0), None, Hints()
    assert torch.equal(block.train()(x, mask, *rest)[0], x)  # all of both is dropped
    assert not torch.equal(block.eval()(x, mask, *rest)[0], x)
