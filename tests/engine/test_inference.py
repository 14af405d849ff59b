"""Answering is faster and gives the same answers; options are chosen by their likelihood."""

import itertools

import pytest
import torch

from config import IGNORE, IMAGE_ID
from decoder import Cache
from engine import inference

PATCHES = [IMAGE_ID] * 4
PROMPTS = [[5, *PATCHES, 9, 11], [*PATCHES, 7], [7, 8, 40, 41, 12]]  # an image, one, none
OPTIONS = [[12, 2], [30, 31, 33, 2], [2], [30, 2]]
FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])


def forward(model, batch, cached=3):
    """Hidden states of the prompts, computed in two parts with a cache between them."""
    cache, parts = Cache(len(model.decoder.blocks)), []
    for part in (slice(cached), slice(cached, None)):
        x = model.decoder.embed(batch.ids[:, part].clamp(min=0))
        hints = inference.Hints(ids=batch.ids[:, part])
        parts.append(model.decoder(x, batch.mask[:, part], hints, cache)[0])
    return torch.cat(parts, dim=1)


@pytest.fixture
def batch(collate):
    return collate([(ids, [IGNORE] * len(ids)) for ids in PROMPTS], side="left")


@FAMILIES
def test_q_k_and_v_are_views_of_one_matrix_and_answers_stay(build, batch, family):
    model = build(family)
    expected, before = forward(model, batch), {n: p.clone() for n, p in model.named_parameters()}
    attn = model.decoder.blocks[0].attn
    for block in model.decoder.blocks:
        inference.fuse_qkv(block.attn)
    now = dict(model.named_parameters())
    assert now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, batch), expected, atol=1e-5, rtol=0)
        attn.fused["weight"][0] += 1  # what is computed with, and q's first row
        assert torch.equal(attn.q.weight[0], before["decoder.blocks.0.attn.q.weight"][0] + 1)
        changed = forward(model, batch)
    assert (changed - expected).abs().max() > 1e-3
    forward(model, batch).sum().backward()  # with gradients it is Attention again
    assert all(layer.weight.grad.any() for layer in (attn.q, attn.k, attn.v))
    model.double()  # moved, they are matrices of their own
    with torch.no_grad():
        assert not attn.fused
        torch.testing.assert_close(forward(model, batch).float(), changed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("moe", [None, {}, {"level": "sequence"}])
@FAMILIES
def test_an_option_is_as_likely_as_its_tokens_are_in_the_whole_text(
    build, collate, batch, family, moe
):
    """All prompts together, padded on the left, options from the cache = each text alone, whole."""
    model = build(family, moe)
    found = inference.option_likelihoods(model, batch, OPTIONS)
    assert found.shape == (3, 4) and not found.requires_grad
    images = [batch.images[:1], batch.images[1:], batch.images[:0]]
    for (i, prompt), (j, option) in itertools.product(enumerate(PROMPTS), enumerate(OPTIONS)):
        one = [(prompt + option, [IGNORE] * len(prompt) + option)]
        loss = model.loss(collate(one, images=images[i])).total.item()
        assert found[i, j].item() == pytest.approx(-loss, abs=1e-4), (i, j)
