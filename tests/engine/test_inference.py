"""Answering is faster and gives the same answers; options are chosen by their likelihood."""

import copy
import itertools

import pytest
import torch

from config import IGNORE
from decoder import Cache
from engine import inference
from tests.conftest import FAMILIES, PROMPTS, prompts

KEPT = (".ln", "decoder.embed", ".router.", "vision.cls", "vision.positions")  # always in fp32
OPTIONS = [[12, 2], [30, 31, 33, 2], [2], [30, 2]]
_batch = pytest.fixture(name="batch")(lambda: prompts())


def forward(model, batch, cached=3):
    """Hidden states of the prompts, computed in two parts with a cache between them."""
    cache, parts = Cache(len(model.decoder.blocks)), []
    for part in (slice(cached), slice(cached, None)):
        x = model.decoder.embed(batch.ids[:, part].clamp(min=0))
        hints = inference.Hints(ids=batch.ids[:, part])
        parts.append(model.decoder(x, batch.mask[:, part], hints, cache)[0])
    return torch.cat(parts, dim=1)


@FAMILIES
def test_q_k_and_v_are_views_of_one_matrix_and_answers_stay(build, batch, family):
    model = build(family)
    expected, attn = forward(model, batch), model.decoder.blocks[0].attn
    for block in model.decoder.blocks:
        inference.fuse_qkv(block.attn)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, batch), expected, atol=1e-5, rtol=0)
        attn.fused["weight"] += 1
        parts = [layer.weight for layer in (attn.q, attn.k, attn.v)]
        assert torch.equal(torch.cat(parts), attn.fused["weight"])
        changed = forward(model, batch)
    forward(model, batch).sum().backward()  # with gradients it is Attention again
    assert parts and all(part.grad.any() for part in parts)
    model.double()  # moved, they are matrices of their own
    assert not attn.fused
    torch.testing.assert_close(forward(model, batch).float(), changed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "sparse", "tied"])
@FAMILIES
def test_a_prepared_model_is_cast_once_and_answers_alike(build, batch, family, kind, dtype):
    plain = build(family, {} if kind == "sparse" else None)
    if kind == "tied":
        plain.decoder.lm_head.weight = plain.decoder.embed.weight
    model, narrow, found = copy.deepcopy(plain).train(), dtype == torch.bfloat16, []
    inference.prepare(model, torch.device("cpu"), dtype)
    for (name, param), now in zip(plain.named_parameters(), model.parameters(), strict=True):
        expected = param.to(dtype) if narrow and not any(k in name for k in KEPT) else param
        torch.testing.assert_close(now, expected, atol=0, rtol=0)
    assert not model.training and all(block.attn.fused for block in model.decoder.blocks)
    assert ("SortedExperts" in str(model)) == (kind == "sparse")
    for one, cast in ((model, narrow), (plain, narrow), (plain, False)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found.append(one.decoder.lm_head(one(*batch[:2], batch.images)[0])[batch.mask].float())
    atol = 0.1 * found[2].std().item() if narrow else 1e-5
    torch.testing.assert_close(found[0], found[1], atol=atol, rtol=0)
    if kind != "sparse":  # a rounded hidden state may be routed to another expert
        torch.testing.assert_close(found[0], found[2], atol=atol, rtol=0)
    inference.prepare(model, torch.device("meta"), dtype)
    assert all(param.is_meta for param in model.parameters())


@pytest.mark.parametrize("moe", [None, {}, {"level": "sequence"}])
@FAMILIES
def test_an_option_is_as_likely_as_its_tokens_in_the_whole_text(build, collate, batch, family, moe):
    """All prompts together, padded on the left, options from the cache = each text alone, whole."""
    model = build(family, moe)
    found = inference.option_likelihoods(model, batch, OPTIONS)
    assert found.shape == (3, 4) and not found.requires_grad
    images = [batch.images[:1], batch.images[:0], batch.images[1:]]  # of PROMPTS
    for (i, prompt), (j, option) in itertools.product(enumerate(PROMPTS), enumerate(OPTIONS)):
        one = [(prompt + option, [IGNORE] * len(prompt) + option)]
        loss = model.loss(collate(one, images=images[i])).total.item()
        assert found[i, j].item() == pytest.approx(-loss, abs=1e-4), (i, j)
