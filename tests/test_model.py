"""The loss and its gradients equal their equations, generation repeats the forward pass, and sizes
are the published ones.

python -m pytest tests/test_model.py
"""

import copy
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

import config
from config import IGNORE, IMAGE_ID, ModelConfig, MoEConfig, UserError
from data import Batch
from model import (
    MedMoE,
    autocast,
    choose_device,
    count_parameters,
    freeze_all_but,
    generate,
    make_sparse,
    pick,
    splice,
)
from routers import Hints, TopKRouter
from tests import reference
from tests.conftest import DECODERS, build, collate, prompts, randn
from tests.golden.make import ours, outputs

HIDDEN = [IGNORE] * 5
PATCHES = [IMAGE_ID] * 4
# (ids, labels): an image first, one in the middle, none, one with two answers.
ROWS = [
    ([*PATCHES, 9, 11, 12, 2], [*HIDDEN, IGNORE, 12, 2]),
    ([5, *PATCHES, 21, 2], [*HIDDEN, 21, 2]),
    ([7, 8, 40, 41, 2], [7, IGNORE, 40, 41, 2]),  # nothing predicts the first
    ([5, *PATCHES, 9, 30, 2, 6, 31, 2, 7], [*HIDDEN, IGNORE, 30, 2, IGNORE, 31, 2, IGNORE]),
]
FAMILIES = pytest.mark.parametrize("family", DECODERS)
NO_EOS = -1  # no token is this one


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


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


def test_text_alone_needs_no_image_and_does_not_run_the_tower():
    model = build().train()
    model.loss(collate([ROWS[2]] * 3)).total.backward()
    assert all(p.grad is None for p in (*model.vision.parameters(), *model.projector.parameters()))
    assert model.decoder.embed.weight.grad.any()


def test_patches_are_put_in_order_in_their_places_and_nothing_else_moves():
    x, patches = randn(3, 6, 8).requires_grad_(), randn(2, 3, 8, seed=1, dtype=torch.bfloat16)
    places = torch.tensor([[0, 1, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 1, 1, 1]]).bool()
    y = splice(x, patches, places)
    assert y.dtype == torch.float32
    assert torch.equal(y[0, 1:4], patches[0].float()) and torch.equal(y[2, 3:6], patches[1].float())
    assert torch.equal(y[~places], x[~places])


P = IMAGE_ID


@pytest.mark.parametrize(("ids", "n_images"), [
    ([[P, P, P, P, 7]], 0), ([[P, 7]], 0), ([[7, 7]], 1), ([[P, P, 7], [P, P, 7]], 1),
    ([[P] * 5], 1), ([[P] * 4] * 2, 1),
])  # fmt: skip
def test_images_that_do_not_fit_their_places_are_refused(ids, n_images):
    ids = torch.tensor(ids)
    with pytest.raises(ValueError, match=f"places for {n_images} images of 4 patches"):
        build()(ids, torch.ones_like(ids).bool(), randn(n_images, 3, 32, 32))


class Asking(TopKRouter):
    needs = ("ids",)

    def gate(self, logits, mask, x, ids):
        return (ids[..., None] == torch.tensor([IMAGE_ID, 5, 9, 11])).float()


def test_a_router_may_ask_for_the_tokens():
    model, batch = build(moe={}), prompts([0])
    for block in model.decoder.blocks[::2]:
        block.mlp.router = Asking(32, 4)
    _, routings = model(batch.ids, batch.mask, batch.images)
    assert routings[1].gates[0].argmax(dim=-1).tolist() == [1, 0, 0, 0, 0, 2, 3]


def greedy(model, batch, n_new, eos_id=NO_EOS, **how):
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
@pytest.mark.parametrize("moe", [
    None, {"router": "topk"}, {"level": "sequence", "top_k": 1},
    {"router": "oracle", "level": "sequence"},
])  # fmt: skip
def test_batched_cached_padded_generation_equals_the_plain_loop(family, moe):
    model = build(family, moe)
    expected = [by_definition(model, prompts([r]), 8) for r in range(3)]
    assert len({token for answer in expected for token in answer}) >= 8  # not one again and again
    assert greedy(model, prompts(), 8) == expected
    assert [greedy(model, prompts([r]), 8)[0] for r in range(3)] == expected


@FAMILIES
def test_32_greedy_tokens_are_those_of_transformers(family):
    golden = outputs(family)
    ids, mask = golden["left.ids"], golden["left.mask"]
    batch = Batch(ids, mask, ids, torch.zeros(0, 3, 28, 28), torch.full((len(ids),), -1))
    assert golden["greedy"].shape[1] == 32 and len(golden["greedy"].unique()) > 4
    assert greedy(ours(family), batch, 32) == golden["greedy"].tolist()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_each_step_has_the_routings_of_its_positions_and_a_sequence_keeps_its_decision(level):
    model, batch = build(moe={"level": level}), prompts()
    steps = list(generate(model, batch, NO_EOS, max_new=3))
    shapes = [[tuple(r.gates.shape) for r in step.routings] for step in steps]
    assert shapes == [[(3, 9, 4)] * 2, [(3, 1, 4)] * 2, [(3, 1, 4)] * 2]
    for layer in range(2):
        first, *rest = (step.routings[layer].gates for step in steps)
        assert not first.requires_grad
        if level == "sequence":
            assert torch.equal(first, first[:, -1:] * batch.mask[..., None])
            assert torch.equal(rest[0], first[:, -1:]) and torch.equal(rest[1], first[:, -1:])


def test_generation_pads_what_has_ended_with_eos_and_stops_when_all_have():
    model, batch = build(moe={"router": "topk"}), prompts()
    answers = greedy(model, batch, 12)
    assert [len(row) for row in answers] == [12] * 3
    eos_id = answers[0][2]
    ends = [row.index(eos_id) if eos_id in row else 12 for row in answers]
    assert ends[0] <= 2 and max(ends) > ends[0]
    n_steps = min(12, max(ends) + 1)
    expected = [(row[:end] + [eos_id] * 12)[:n_steps] for row, end in zip(answers, ends)]  # noqa: B905
    assert greedy(model, batch, 12, eos_id) == expected
    assert greedy(model, prompts([0]), 12, eos_id) == [answers[0][: ends[0] + 1]]
    assert len(list(generate(build(), prompts([1]), NO_EOS))) == 64


class Peeking(TopKRouter):
    causal = False


def test_a_router_that_looks_ahead_and_padding_on_the_right_are_refused():
    model = build(moe={})
    with pytest.raises(AssertionError, match="left"):
        next(generate(model, prompts(side="right"), NO_EOS))
    model.decoder.blocks[2].mlp.router = Peeking(32, 4)
    with pytest.raises(UserError, match="Peeking"):
        next(generate(model, prompts(), NO_EOS))


def shares(probs, temperature=1.0, top_p=1.0, n=4000):
    """Of each token in n samples."""
    logits = torch.tensor(probs).log().expand(n, -1)
    picks = pick(logits, temperature, top_p, torch.Generator().manual_seed(0))
    return torch.bincount(picks, minlength=len(probs)) / n


@pytest.mark.parametrize(("top_p", "kept"), [
    (0.39, [0, 0, 1, 0]), (0.41, [0, 1, 1, 0]),  # 0.4 does not reach it: the next comes along
    (0.69, [0, 1, 1, 0]), (0.71, [1, 1, 1, 0]), (0.95, [1, 1, 1, 1]), (1.00, [1, 1, 1, 1]),
])  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = [0.2, 0.3, 0.4, 0.1]
    expected = torch.tensor(probs) * torch.tensor(kept)
    found = shares(probs, top_p=top_p)
    assert (found > 0).int().tolist() == kept
    close(found, expected / expected.sum(), 0.03)
    assert (shares([0.5, 0.25, 0.25], top_p=0.5) > 0).tolist() == [True, False, False]


def test_temperature_sharpens_or_flattens_and_zero_is_greedy():
    for temperature in (0.5, 2.0):
        expected = torch.tensor([0.6, 0.3, 0.1]) ** (1 / temperature)
        close(shares([0.6, 0.3, 0.1], temperature), expected / expected.sum(), 0.03)
    logits = randn(5, 20)
    assert torch.equal(pick(logits, 0, 0.1), logits.argmax(dim=-1))


def test_sampling_is_reproduced_by_the_generators_seed():
    model, batch, found = build(), prompts(), []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        found.append(greedy(model, batch, 8, temperature=1.0, top_p=0.9, generator=generator))
    assert found[0] == found[1] and found[0] != found[2] and found[0] != greedy(model, batch, 8)


@FAMILIES
@pytest.mark.parametrize("moe", [
    {"router": "topk"}, {"top_k": 1}, {"router": "modality", "level": "sequence"},
    {"router": "oracle"},
])  # fmt: skip
def test_the_model_of_phase_3_begins_with_the_logits_of_phase_2(family, moe):
    dense, batch = build(family), collate(ROWS, modality=[3, -1, 0, 1])
    sparse, weights = copy.deepcopy(dense), {"weight": randn(4, 32, seed=5), "bias": randn(4)}
    make_sparse(sparse, MoEConfig(**moe), weights)
    assert sparse.config == replace(dense.config, moe=MoEConfig(**moe))
    hidden = [m(batch.ids, batch.mask, batch.images, Hints(modality=batch.modality))[0][batch.mask]
              for m in (dense, sparse)]  # fmt: skip
    close(hidden[1], hidden[0])
    for i in (0, 2):
        proj = sparse.decoder.blocks[i].mlp.router.proj
        assert torch.equal(proj.weight, weights["weight"]) and proj.weight is not weights["weight"]
        assert torch.equal(proj.bias, weights["bias"])


@pytest.mark.parametrize(
    ("layers", "sparse"), [(None, [0, 2]), ((0, 1, 2), [0, 1, 2]), ((1,), [1])]
)
def test_every_second_block_becomes_sparse_or_those_that_are_listed(layers, sparse):
    model = build(moe={"layers": layers, "n_experts": 3, "top_k": 1, "level": "sequence"})
    assert [i for i, block in enumerate(model.decoder.blocks) if block.is_sparse] == sparse
    assert model.config.moe == MoEConfig(3, 1, level="sequence", layers=layers)
    router = model.decoder.blocks[sparse[0]].mlp.router
    assert (router.top_k, router.level, router.proj.out_features) == (1, "sequence", 3)


@pytest.mark.parametrize(("fields", "flag"), [
    ({"top_k": 0}, "--top-k 0"), ({"top_k": 5}, "--top-k 5"), ({"router": "best"}, "--router best"),
])  # fmt: skip
def test_a_router_that_cannot_be_made_is_a_user_error_that_names_the_flag(fields, flag):
    with pytest.raises(UserError, match=flag):
        make_sparse(build(), MoEConfig(**fields))
    make_sparse(build(), MoEConfig(top_k=4))


def test_what_matches_no_pattern_is_frozen_and_a_pattern_without_a_match_refused():
    model = build(moe={})
    freeze_all_but(model, ("projector.*", "decoder.*.mlp.meta.fc1.*"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"projector.{layer}.{kind}" for layer in ("fc1", "fc2")
                       for kind in ("weight", "bias")} | {
        f"decoder.blocks.{i}.mlp.meta.fc1.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }  # fmt: skip
    freeze_all_but(model, ("*",))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="nothing"):
        freeze_all_but(model, ("projector.*", "nothing.*"))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("preset", "decoder", "projector", "billions"), [
    ("phi2", 2_779_683_840, 9_180_160, {"top_1": 3.62, "top_2": 4.46, "total": 6.14}),
    ("stablelm2", 1_644_515_328, 6_295_552, {"top_1": 2.06, "top_2": 2.475, "total": 3.31}),
])  # fmt: skip
def test_models_have_the_published_number_of_parameters(preset, decoder, projector, billions):
    of = config.PRESETS[preset].model
    with torch.device("meta"):  # without their memory
        model = MedMoE(ModelConfig(of.vision, of.decoder))
        assert (count(model.decoder), count(model.projector)) == (decoder, projector)
        # CLIP-L/14-336's vision half has 303 507 456; its last layer and last norm are not built.
        tower = 303_507_456 - (12 * 1024**2 + 13 * 1024) - 2 * 1024
        assert count(model.vision) == tower
        dense = decoder + projector + tower
        assert set(count_parameters(model).values()) == {dense}
        make_sparse(model, MoEConfig())
    for k in (1, 2):
        model.config = replace(model.config, moe=MoEConfig(top_k=k))
        counts = count_parameters(model)
        found = [(counts[name] - projector - tower) / 1e9 for name in ("activated", "total")]
        assert found == pytest.approx([billions[f"top_{k}"], billions["total"]], abs=0.005)
        assert counts["dense_base"] == dense


@pytest.mark.parametrize("meta", [True, False])
def test_parameters_of_a_tiny_sparse_model_are_counted_by_hand(meta):
    counts = count_parameters(build(moe={"top_k": 2, "n_experts": 3, "meta": meta}))
    dense, ffn, router = count(build()), 2 * 32 * 64 + 64 + 32, 32 * 3 + 3
    base = dense - (0 if meta else 2 * ffn)
    assert counts == {"dense_base": dense, "total": base + 2 * (3 * ffn + router),
                      "activated": base + 2 * (2 * ffn + router)}  # fmt: skip


@pytest.mark.parametrize(("flags", "has_gpu", "cpu", "expected"), [
    (("auto", "auto"), True, {}, ("cuda", "bfloat16")),
    (("auto", "auto"), False, {}, ("cpu", "float32")),
    (("auto", "auto"), False, {"avx512_bf16": True}, ("cpu", "bfloat16")),
    (("auto", "auto"), False, {"amx_bf16": True}, ("cpu", "bfloat16")),
    (("cpu", "auto"), True, {}, ("cpu", "float32")),
    (("cpu", "bfloat16"), True, {}, ("cpu", "bfloat16")),
    (("cuda", "float32"), True, {}, ("cuda", "float32")),
])  # fmt: skip
def test_device_and_precision_are_chosen_by_what_there_is(
    monkeypatch, flags, has_gpu, cpu, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=has_gpu))
    monkeypatch.setattr(torch.cpu, "get_capabilities", Mock(return_value=cpu))
    assert choose_device(*flags) == (torch.device(expected[0]), getattr(torch, expected[1]))
    if not has_gpu:
        with pytest.raises(UserError, match="--device cuda"):
            choose_device("cuda", "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_matmuls_in_this_dtype(dtype):
    with autocast(torch.device("cpu"), dtype):
        assert (randn(2, 2) @ randn(2, 2)).dtype == dtype
