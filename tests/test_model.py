"""Loss and gradients equal their equations, generation the forward pass, sizes the published."""

import copy
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from config import IGNORE, IMAGE_ID, PRESETS, ModelConfig, MoEConfig, UserError, warn_once
from model import MedMoE, choose_device, count_parameters, generate, make_sparse, pick
from routers import Hints
from tests import reference
from tests.conftest import FAMILIES, LEVELS, build, close, collate, prompts, randn

HIDDEN, PATCHES = [IGNORE] * 5, [IMAGE_ID] * 4
# (ids, labels): an image first, one in the middle, none, one with two answers.
ROWS = [([*PATCHES, 9, 11, 12, 2], [*HIDDEN, IGNORE, 12, 2]),
        ([5, *PATCHES, 21, 2], [*HIDDEN, 21, 2]),
        ([7, 8, 40, 41, 2], [7, IGNORE, 40, 41, 2]),  # nothing predicts the first
        ([5, *PATCHES, 9, 30, 2, 6, 31, 2, 7],
         [*HIDDEN, IGNORE, 30, 2, IGNORE, 31, 2, IGNORE])]  # fmt: skip


@FAMILIES
@pytest.mark.parametrize("moe", [None, {"router": "topk"}, {"level": "sequence", "top_k": 1}])
def test_the_loss_of_a_mixed_batch_and_all_gradients_equal_the_equations(family, moe):
    model, batch = build(family, moe), collate(ROWS)
    loss = model.loss(batch)
    images, terms = iter(batch.images.split(1)), []
    for r, (ids, labels) in enumerate(ROWS):
        n = len(ids)
        its_images = next(images) if IMAGE_ID in ids else batch.images[:0]
        row = torch.tensor(ids), torch.ones(n).bool(), its_images, batch.prompt()[r, :n]
        logits = reference.logits(model, *row)
        terms.append(reference.loss(logits[None], torch.tensor([labels])))
    totals, numbers = zip(*terms, strict=True)
    assert loss.n_tokens == sum(numbers) == 11
    assert len(loss.routings) == (0 if moe is None else 2)
    close(loss.total, sum(totals))
    params = dict(model.named_parameters())
    found = torch.autograd.grad(loss.total, params.values(), allow_unused=True)
    exact = torch.autograd.grad(sum(totals), params.values(), allow_unused=True)
    for name, a, b in zip(params, found, exact, strict=True):
        if b is None or b.norm() < 1e-4:  # a key's bias changes no softmax
            assert name.endswith((".k.bias", ".router.proj.weight", ".router.proj.bias")), name
        else:
            assert (a - b).norm() <= 2e-5 * b.norm(), name


def greedy(model, batch, n_new, eos_id=-1, **how):
    steps = generate(model, batch, eos_id, max_new=n_new, **how)
    return torch.stack([step.tokens for step in steps], dim=1).tolist()


@torch.no_grad()
def by_definition(model, batch, n_new):
    """One sample, for each token all of the text again, without a cache."""
    ids, n_prompt = batch.ids, batch.ids.shape[1]
    for _ in range(n_new):
        prompt = (torch.arange(ids.shape[1]) < n_prompt)[None]
        hints = Hints(prompt=prompt, modality=batch.modality)
        hidden, _ = model(ids, torch.ones_like(ids).bool(), batch.images, hints)
        ids = torch.cat([ids, model.decoder.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return ids[0, n_prompt:].tolist()


@FAMILIES
@pytest.mark.parametrize("moe", [None, {"router": "topk"}, {"level": "sequence", "top_k": 1},
                                 {"level": "once"}, {"router": "oracle"}])  # fmt: skip
def test_batched_cached_padded_generation_equals_the_plain_loop(family, moe):
    model = build(family, moe)
    expected = [by_definition(model, prompts([r]), 8) for r in range(3)]
    assert len({token for answer in expected for token in answer}) >= 8  # not one again and again
    assert greedy(model, prompts(), 8) == expected


def test_generation_pads_what_has_ended_with_eos_and_stops_when_all_have():
    model, batch = build(moe={"router": "topk"}), prompts()
    answers = greedy(model, batch, 12)
    assert [len(row) for row in answers] == [12] * 3
    eos_id = answers[0][2]
    ends = [row.index(eos_id) if eos_id in row else 12 for row in answers]
    assert ends[0] <= 2 and max(ends) > ends[0]
    n_steps = min(12, max(ends) + 1)
    expected = [(row[:end] + [eos_id] * 12)[:n_steps]
                for row, end in zip(answers, ends, strict=True)]  # fmt: skip
    assert greedy(model, batch, 12, eos_id) == expected
    assert greedy(model, prompts([0]), 12, eos_id) == [answers[0][: ends[0] + 1]]


def shares(probs, temperature=1.0, top_p=1.0):
    """Of each token in 4000 samples."""
    logits = probs.log().expand(4000, -1)
    picks = pick(logits, temperature, top_p, torch.Generator().manual_seed(0))
    return torch.bincount(picks, minlength=len(probs)) / 4000


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_temperature_0_is_greedy():
    probs = torch.tensor([0.2, 0.3, 0.4, 0.1])
    # 0.4 does not reach 0.41: the next comes along
    for top_p, kept in ((0.39, [0, 0, 1, 0]), (0.41, [0, 1, 1, 0]), (1.0, [1, 1, 1, 1])):
        expected, found = probs * torch.tensor(kept), shares(probs, top_p=top_p)
        assert (found > 0).int().tolist() == kept
        close(found, expected / expected.sum(), 0.03)
    assert (shares(torch.tensor([0.5, 0.5]), top_p=0.5) > 0).sum() == 1
    for temperature in (0.5, 2.0):
        expected = probs ** (1 / temperature)
        close(shares(probs, temperature), expected / expected.sum(), 0.03)
    assert torch.equal(pick(randn(5, 20), 0, 0.1), randn(5, 20).argmax(dim=-1))
    a, b, c = [greedy(build(), prompts(), 8, temperature=1.0, top_p=0.9,
                      generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2)]  # fmt: skip
    assert a == b != c


@LEVELS
def test_the_model_of_phase_3_begins_with_the_logits_of_phase_2(level):
    dense, batch, moe = build(), collate(ROWS), MoEConfig(level=level)
    sparse, weights = copy.deepcopy(dense), {"weight": randn(4, 32, seed=5), "bias": randn(4)}
    make_sparse(sparse, moe, weights)
    assert sparse.config == replace(dense.config, moe=moe)
    hidden = [m(batch.ids, batch.mask, batch.images)[0][batch.mask] for m in (dense, sparse)]
    close(hidden[1], hidden[0])
    for i in (0, 2):
        proj = sparse.decoder.blocks[i].mlp.router.proj
        assert torch.equal(proj.weight, weights["weight"]) and proj.weight is not weights["weight"]
        assert torch.equal(proj.bias, weights["bias"])


def test_every_second_block_becomes_sparse_or_those_that_are_listed():
    for layers, sparse in ((None, [0, 2]), ((1,), [1])):
        model = build(moe={"layers": layers, "n_experts": 3, "top_k": 1, "level": "sequence"})
        assert [i for i, block in enumerate(model.decoder.blocks) if block.is_sparse] == sparse
    router = model.decoder.blocks[1].mlp.router
    assert (router.top_k, router.level, router.proj.out_features) == (1, "sequence", 3)


@pytest.mark.parametrize(("preset", "decoder", "projector", "billions"), [
    ("phi2", 2_779_683_840, 9_180_160, {"top_1": 3.62, "top_2": 4.46, "total": 6.14}),
    ("stablelm2", 1_644_515_328, 6_295_552, {"top_1": 2.06, "top_2": 2.475, "total": 3.31}),
])  # fmt: skip
def test_models_have_the_published_number_of_parameters(preset, decoder, projector, billions):
    of = PRESETS[preset].model
    # CLIP-L/14-336's vision half has 303 507 456; its last layer and last norm are not built.
    tower = 303_507_456 - (12 * 1024**2 + 13 * 1024) - 2 * 1024
    with torch.device("meta"):  # without their memory
        model, dense = MedMoE(ModelConfig(of.vision, of.decoder)), decoder + projector + tower
        assert set(count_parameters(model).values()) == {dense}
        make_sparse(model, MoEConfig())
    for k in (1, 2):
        model.config = replace(model.config, moe=MoEConfig(top_k=k))
        counts = count_parameters(model)
        sizes = [(counts[name] - projector - tower) / 1e9 for name in ("activated", "total")]
        assert sizes == pytest.approx([billions[f"top_{k}"], billions["total"]], abs=0.005)
        assert counts["dense_base"] == dense


@pytest.mark.parametrize(("flags", "has_gpu", "cpu", "expected"), [
    (("auto", "auto"), (8, 0), {}, ("cuda", torch.bfloat16)),
    (("auto", "auto"), (7, 5), {"amx_bf16": True}, ("cuda", torch.float32)),  # T4; V100 is 7.0
    (("cuda", "bfloat16"), (7, 0), {}, ("cuda", torch.bfloat16)),
    (("auto", "auto"), None, {"amx_bf16": True}, ("cpu", torch.bfloat16)),
    (("cpu", "auto"), (9, 0), {}, ("cpu", torch.float32))])  # fmt: skip
def test_device_and_precision_are_what_there_is(monkeypatch, flags, has_gpu, cpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=has_gpu is not None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", Mock(return_value=has_gpu))
    monkeypatch.setattr(torch.cpu, "get_capabilities", Mock(return_value=cpu))
    assert choose_device(*flags) == (torch.device(expected[0]), expected[1])
    if not has_gpu:
        with pytest.raises(UserError, match="--device cuda"):
            choose_device("cuda", "auto")


def test_a_mac_is_warned_that_it_is_the_first(monkeypatch, capsys):
    warn_once.cache_clear()
    monkeypatch.setattr(torch.backends.mps, "is_available", Mock(side_effect=[False, True]))
    with pytest.raises(UserError, match="--device mps"):
        choose_device("mps", "auto")
    assert choose_device("mps", "auto") == (torch.device("mps"), torch.float32)
    assert "not been tried on a Mac" in capsys.readouterr().err
