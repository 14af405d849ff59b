"""The decoders equal their equations; padding and caches change nothing."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from config import IMAGE_ID
from data import Batch
from decoder import Cache, Decoder, causal_mask, rope
from model import generate
from routers import Hints
from tests import reference
from tests.conftest import DECODERS, FAMILIES, PROMPTS, build, close, prompts, randn
from tests.golden.make import ours, outputs

DENSE, TOP_2, SEQUENCE = None, {"router": "topk"}, {"level": "sequence", "top_k": 1}
ONCE = {"level": "once"}


@torch.no_grad()
def logits_of(model, ids, mask, images=None, hints=Hints(), cache=None):
    images = torch.zeros(0, 3, 32, 32) if images is None else images
    hidden, routings = model(ids, mask, images, hints, cache)
    return model.decoder.lm_head(hidden), routings


@FAMILIES
@pytest.mark.parametrize(("moe", "padding"), [
    (DENSE, "between"), (TOP_2, "left"), (SEQUENCE, "left"), (ONCE, "left"),
    (TOP_2, "right")])  # fmt: skip
def test_logits_equal_the_equations_whatever_padding_there_is(family, moe, padding):
    model, batch = build(family, moe), prompts(side="left" if padding == "left" else "right")
    if padding == "between":
        batch.mask[:] = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1])
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
def test_logits_and_32_greedy_tokens_are_those_of_transformers(family):
    model, golden = ours(family), outputs(family)
    for side in ("left", "right"):
        ids, mask, expected = (golden[f"{side}.{name}"] for name in ("ids", "mask", "logits"))
        assert expected[mask].std() > 0.3
        close(logits_of(model, ids, mask)[0][mask], expected[mask])
    ids, mask, greedy = golden["left.ids"], golden["left.mask"], golden["greedy"]
    batch = Batch(ids, mask, ids, torch.zeros(0, 3, 28, 28), torch.full((len(ids),), -1))
    tokens = torch.stack([step.tokens for step in generate(model, batch, -1, max_new=32)], dim=1)
    assert torch.equal(tokens, greedy) and greedy.shape[1] == 32 and len(greedy.unique()) > 4


@FAMILIES
@pytest.mark.parametrize(("moe", "cuts"), [
    (DENSE, []), (DENSE, [10, 12]), (TOP_2, [11]), (SEQUENCE, [10, 11, 12])])  # fmt: skip
def test_text_that_continues_a_cache_gets_the_logits_and_routes_of_the_whole(family, moe, cuts):
    model, batch = build(family, moe), prompts()
    ids = torch.cat([batch.ids, torch.randint(3, 60, (3, 4))], dim=1)
    mask = torch.cat([batch.mask, torch.ones(3, 4).bool()], dim=1)
    prompt, cache = mask & (torch.arange(13) < 9), Cache(3)
    expected, its_routings = logits_of(model, ids, mask, batch.images, Hints(prompt=prompt))
    found = [logits_of(model, batch.ids, batch.mask, batch.images, Hints(batch.mask), cache)]
    for start, end in pairwise([9, *cuts, 13]):
        found.append(logits_of(model, ids[:, start:end], mask[:, start:end], cache=cache))
    close(torch.cat([logits for logits, _ in found], dim=1)[mask], expected[mask])
    assert len(its_routings) == (0 if moe is None else 2)
    for layer, routing in enumerate(its_routings):
        gates = torch.cat([routings[layer].gates for _, routings in found], dim=1)
        assert torch.equal(gates != 0, routing.gates != 0)
    n_kv_heads = model.config.decoder.n_kv_heads or 4
    assert {layer.keys.shape for layer in cache.layers} == {(3, n_kv_heads, 13, 8)}


@FAMILIES
def test_norms_dropout_and_a_tied_head_follow_the_config(family):
    model = Decoder(replace(DECODERS[family], norm_eps=0.25, dropout=1.0, tied=True))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    assert {layer.eps for layer in norms} == {0.25} and len(norms) == (4 if family == "phi" else 7)
    assert model.lm_head.weight is model.embed.weight
    x, mask = randn(1, 4, 32), torch.ones(1, 4).bool()
    rest = causal_mask(mask, 4), *rope(torch.arange(4)[None], 2, 10000.0), None, Hints()
    for block in model.blocks:
        assert torch.equal(block.train()(x, mask, *rest)[0], x)  # all of both branches is dropped
        assert not torch.equal(block.eval()(x, mask, *rest)[0], x)
