"""Answering is faster and gives the same answers; options are chosen by their likelihood."""

import copy
import itertools

import pytest
import torch

from config import IGNORE, IMAGE_ID, DecoderConfig, ModelConfig, UserError
from decoder import Attention, Cache
from engine import inference
from engine.inference import FusedAttention
from model import MedMoE
from moe import Experts
from ops import SortedExperts
from tests.conftest import VISION, shake

PATCHES = [IMAGE_ID] * 4
PROMPTS = [[5, *PATCHES, 9, 11], [*PATCHES, 7], [7, 8, 40, 41, 12]]  # an image, one, none
OPTIONS = [[12, 2], [30, 31, 33, 2], [2], [30, 2]]
CPU = torch.device("cpu")
FAMILIES = ("phi", "stablelm", "llama")


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


@pytest.mark.parametrize("family", FAMILIES)
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


def test_matmuls_are_cast_but_neither_routers_nor_norms_nor_a_tied_embedding(build):
    tied = ModelConfig(VISION, DecoderConfig("llama", 64, 32, 1, 4, 48, 8, tied=True))
    for model in (build(moe={}), shake(MedMoE(tied))):
        inference.cast_matmuls(model, torch.bfloat16)
        names = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
        kinds = {n.split(".")[-2].rstrip("_12") for n in names}
        router = {"proj"} if model.config.moe else set()
        assert kinds == {"ln", "ln_f", "embed", "ln_pre", "vision"} & kinds | router
        wide = [n for n in names if n.endswith(("q.weight", "fc1.weight", "patch_embed.weight"))]
        assert not wide and {"decoder.embed.weight", "decoder.ln_f.weight"} <= names
        assert model.decoder.lm_head.weight.dtype == (torch.bfloat16 if router else torch.float32)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_prepared_model_is_sorted_and_fused_and_answers_alike(build, batch, dtype):
    model = build("stablelm", {"router": "topk"}).train()
    plain = copy.deepcopy(model).eval()
    inference.prepare(model, CPU, dtype)
    assert not model.training
    is_bf16 = dtype == torch.bfloat16
    weight = model.decoder.blocks[0].attn.q.weight
    assert weight.dtype == (torch.bfloat16 if is_bf16 else torch.float32)
    assert {type(block.attn) for block in model.decoder.blocks} == {FusedAttention}
    assert {type(m) for m in model.modules() if isinstance(m, Experts)} == {SortedExperts}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        torch.testing.assert_close(
            forward(model, batch), forward(plain, batch), atol=0.3 if is_bf16 else 1e-5, rtol=0
        )
    meta = build()
    inference.prepare(meta, torch.device("meta"), dtype)
    assert meta.decoder.blocks[0].attn.q.weight.is_meta


def test_every_block_is_compiled_but_experts_and_routers(build, monkeypatch):
    compiled, reset = [], []

    def note(function, **how):
        compiled.append((type(getattr(function, "__self__", None)).__name__, how))
        return function

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(1))
    inference.compile_blocks(build(moe={}))
    names = ["VisionBlock", "VisionBlock", "Attention", "MLP", "PhiBlock", "Attention", "MLP"]
    assert compiled[1:] == [(name, {"dynamic": True}) for name in names] and reset == [1]
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: tried.append)
    inference.compile_blocks(build())
    assert len(tried) == 1  # a small function, before all

    def no_compiler(function):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"--compile: .* no working C"):
        inference.compile_blocks(build())


def test_a_copied_cache_is_extended_on_its_own(build):
    model, cache = build(), Cache(3)
    one = torch.ones(1, 1, dtype=torch.bool)
    x = torch.randn(1, 1, 32)
    first, _ = model.decoder(x, one, inference.Hints(), cache)
    again = [model.decoder(x, one, inference.Hints(), inference.copy_cache(cache))[0]
             for _ in range(2)]  # fmt: skip
    assert torch.equal(*again) and not torch.equal(again[0], first)
    assert type(model.decoder.blocks[0].attn) is Attention


@pytest.mark.parametrize("moe", [None, {}, {"level": "sequence"}])
@pytest.mark.parametrize("family", FAMILIES)
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
