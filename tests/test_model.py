"""Patches take their places, the loss is the shifted cross-entropy, sizes are the published ones.

python -m pytest tests/test_model.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import config
from config import IGNORE, IMAGE_ID, ModelConfig, MoEConfig, UserError
from model import MedMoE, count_parameters, make_sparse, splice
from ops import use_sorted_experts
from routers import Hints

PATCHES, HIDDEN = [IMAGE_ID] * 4, [IGNORE] * 4
# (ids, labels): an image first, one in the middle, none, one with two answers.
ROWS = [
    ([*PATCHES, 9, 11, 12, 2], [*HIDDEN, IGNORE, IGNORE, 12, 2]),
    ([5, *PATCHES, 21, 2], [IGNORE, *HIDDEN, 21, 2]),
    ([7, 8, 40, 41, 2], [IGNORE, IGNORE, 40, 41, 2]),
    (
        [5, *PATCHES, 9, 30, 2, 6, 31, 2],
        [IGNORE, *HIDDEN, IGNORE, 30, 2, IGNORE, 31, 2],
    ),
]
FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
MOE = pytest.mark.parametrize("moe", [None, {}, {"level": "sequence"}])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Splicing


def test_patches_are_put_in_order_in_their_places_and_nothing_else_moves():
    x, patches = randn(3, 6, 8), randn(2, 3, 8, seed=1)
    places = torch.tensor([[0, 1, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 1, 1, 1]]).bool()
    y = splice(x, patches, places)
    assert torch.equal(y[0, 1:4], patches[0])
    assert torch.equal(y[2, 3:6], patches[1])
    assert torch.equal(y[~places], x[~places])


def test_patches_take_the_type_of_the_text():
    places = torch.ones(1, 3).bool()
    assert splice(randn(1, 3, 8), randn(1, 3, 8).bfloat16(), places).dtype == torch.float32


def test_gradients_reach_the_patches_and_the_text_beside_them_only():
    x, patches = randn(1, 4, 8).requires_grad_(), randn(1, 2, 8).requires_grad_()
    places = torch.tensor([[0, 1, 1, 0]]).bool()
    splice(x, patches, places).sum().backward()
    assert torch.equal(patches.grad, torch.ones(1, 2, 8))
    assert torch.equal(x.grad, (~places)[..., None].expand(1, 4, 8).float())


@pytest.mark.parametrize("n_places", [0, 1, 5])
def test_a_wrong_number_of_places_is_refused(n_places):
    places = (torch.arange(6) < n_places)[None]
    with pytest.raises(ValueError, match=rf"\[{n_places}\] places for 1 images of 3"):
        splice(randn(1, 6, 8), randn(1, 3, 8), places)


@FAMILIES
def test_the_model_refuses_images_that_do_not_fit_their_places(build, collate, family):
    model, batch = build(family), collate(ROWS)
    with pytest.raises(ValueError, match=r"places for 2 images of 4 patches"):
        model(batch.ids, batch.mask, batch.images[:2])
    with pytest.raises(ValueError, match=r"places for 3 images of 4 patches"):
        model(batch.ids.clamp(min=0), batch.mask, batch.images)


def test_the_model_feeds_the_projected_patches_to_the_decoder(build, collate):
    model, batch = build(), collate(ROWS[1:2])
    text = model.decoder.embed(torch.tensor(ROWS[1][0]).clamp(min=0))
    patches = model.vision(batch.images)[0]
    h = patches @ model.projector.fc1.weight.T + model.projector.fc1.bias
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))  # the exact GELU
    patches = h @ model.projector.fc2.weight.T + model.projector.fc2.bias
    x = torch.cat([text[:1], patches, text[5:]])[None]
    expected, _ = model.decoder(x, batch.mask, Hints())
    hidden, _ = model(batch.ids, batch.mask, batch.images)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)


@FAMILIES
@MOE
def test_a_mixed_batch_equals_its_samples_one_by_one(build, collate, family, moe):
    model, batch = build(family, moe), collate(ROWS)
    which = iter(batch.images.split(1))
    total = 0.0
    loss = model.loss(batch)
    hints = Hints(prompt=batch.prompt(), modality=batch.modality)
    hidden, _ = model(batch.ids, batch.mask, batch.images, hints)
    for row in range(4):
        has_image = IMAGE_ID in ROWS[row][0]
        alone = collate([ROWS[row]], images=next(which) if has_image else batch.images[:0])
        its_hints = Hints(prompt=alone.prompt(), modality=alone.modality)
        its_hidden, _ = model(alone.ids, alone.mask, alone.images, its_hints)
        torch.testing.assert_close(hidden[row][batch.mask[row]], its_hidden[0], atol=1e-5, rtol=0)
        total += model.loss(alone).total
    torch.testing.assert_close(loss.total, total, atol=1e-5, rtol=1e-5)


@FAMILIES
@MOE
def test_a_batch_of_text_alone_needs_no_image_and_does_not_run_the_tower(
    build, collate, family, moe
):
    model = build(family, moe).train()
    batch = collate([ROWS[2]] * 3)
    assert batch.images.shape[0] == 0
    loss = model.loss(batch)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(p.grad is None for p in (*model.vision.parameters(), *model.projector.parameters()))


# Loss


@FAMILIES
@MOE
def test_the_loss_is_the_cross_entropy_of_each_supervised_token_from_the_position_before(
    build, collate, family, moe
):
    model, batch = build(family, moe), collate(ROWS)
    hints = Hints(prompt=batch.prompt(), modality=batch.modality)
    hidden, _ = model(batch.ids, batch.mask, batch.images, hints)
    log_p = model.decoder.lm_head(hidden).log_softmax(dim=-1)
    terms = []
    for row, (ids, labels) in enumerate(ROWS):
        for t, label in enumerate(labels):
            if label != IGNORE:
                assert label == ids[t]
                terms.append(-log_p[row, t - 1, ids[t]])
    loss = model.loss(batch)
    assert loss.n_tokens == len(terms) == 11
    torch.testing.assert_close(loss.total, torch.stack(terms).sum(), atol=1e-5, rtol=1e-5)
    assert len(loss.routings) == (0 if moe is None else 2)


def test_a_label_at_the_very_first_position_has_nothing_to_predict_it_from(build, collate):
    loss = build().loss(collate([([7, 8, 9], [7, IGNORE, 9])]))
    assert loss.n_tokens == 1


@FAMILIES
def test_positions_after_the_last_supervised_one_get_no_gradient(build, collate, family):
    model, batch = build(family), collate([([5, 6, 7, 8, 9], [IGNORE, IGNORE, 7, IGNORE, IGNORE])])
    model.loss(batch).total.backward()
    grads = model.decoder.embed.weight.grad.abs().amax(dim=-1)
    assert (grads[[5, 6]] > 0).all() and (grads[[7, 8, 9]] == 0).all()


def test_image_positions_and_padding_carry_no_loss(build, collate):
    model, batch = build(), collate(ROWS)
    unsupervised = (batch.ids == IMAGE_ID) | ~batch.mask
    assert (batch.labels[unsupervised] == IGNORE).all()
    logits = torch.zeros(4, batch.ids.shape[1], 64).requires_grad_()
    target, scored = batch.labels[:, 1:], logits[:, :-1]
    F.cross_entropy(scored.flatten(0, 1), target.flatten(), ignore_index=IGNORE).backward()
    predicts = (logits.grad != 0).any(dim=-1)  # the positions that a plain loss scores
    assert int(predicts.sum()) == model.loss(batch).n_tokens
    assert not predicts[:, :-1][unsupervised[:, 1:]].any()


def test_gradients_reach_every_part_through_the_loss(build, collate):
    for family in ("phi", "stablelm"):
        model = build(family, {"router": "topk"})
        model.loss(collate(ROWS)).total.backward()
        # A key's bias adds the same to all scores of a query, which softmax ignores.
        idle = [
            n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7
        ]
        assert all(name.endswith("k.bias") for name in idle), idle


@FAMILIES
@pytest.mark.parametrize("moe", [{}, {"level": "sequence"}])
def test_sorted_experts_have_the_loss_and_the_gradients_of_the_loop(build, collate, family, moe):
    loops, batch = build(family, moe), collate(ROWS)
    fast = copy.deepcopy(loops)
    use_sorted_experts(fast)
    for model in (loops, fast):
        model.loss(batch).total.backward()
    torch.testing.assert_close(fast.loss(batch).total, loops.loss(batch).total)
    for (name, p), q in zip(loops.named_parameters(), fast.parameters(), strict=True):
        assert (q.grad is None) == (p.grad is None), name
        if p.grad is not None:
            assert (q.grad - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-6, name


def test_the_prompt_is_what_is_real_before_the_first_answer(collate):
    batch = collate([([5, 9, 30, 2, 6, 31], [IGNORE, IGNORE, 30, 2, IGNORE, 31]), ([5], [IGNORE])])
    assert batch.prompt().int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    left = collate([([5, 9], [IGNORE] * 2), ([5], [IGNORE])], side="left")
    assert left.prompt().int().tolist() == [[1, 1], [0, 1]]


# Sparse models and their sizes


@pytest.mark.parametrize(
    ("layers", "sparse"), [(None, [0, 2]), ((0, 1, 2), [0, 1, 2]), ((1,), [1])]
)
def test_every_second_block_becomes_sparse_or_those_that_are_listed(build, layers, sparse):
    model = build(moe={"layers": layers})
    assert [i for i, block in enumerate(model.decoder.blocks) if block.is_sparse] == sparse
    assert model.config.moe == MoEConfig(layers=layers)


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_top_k_must_be_from_one_to_the_number_of_experts(build, top_k):
    with pytest.raises(UserError, match=f"--top-k {top_k}: must be from 1 to --experts, 4"):
        make_sparse(build(), MoEConfig(top_k=top_k))


def test_an_unknown_router_is_a_user_error_that_names_the_flag(build):
    with pytest.raises(UserError, match="--router best: 'best' is neither one of"):
        make_sparse(build(), MoEConfig(router="best"))


def shapes_of(preset, moe=None):
    """A model of published size without its memory."""
    of = config.PRESETS[preset].model
    with torch.device("meta"):
        return MedMoE(ModelConfig(of.vision, of.decoder, moe))


@pytest.mark.parametrize(
    ("preset", "decoder", "projector"),
    [("phi2", 2_779_683_840, 9_180_160), ("stablelm2", 1_644_515_328, 6_295_552)],
)
def test_dense_models_have_the_published_number_of_parameters(preset, decoder, projector):
    model = shapes_of(preset)
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert sum(p.numel() for p in model.projector.parameters()) == projector
    # CLIP-L/14-336's vision half has 303 507 456; its last layer and last norm are not built.
    layer = 12 * 1024**2 + 13 * 1024
    tower = sum(p.numel() for p in model.vision.parameters())
    assert tower == 303_507_456 - layer - 2 * 1024
    counts = count_parameters(model)
    assert counts["total"] == counts["activated"] == counts["dense_base"]
    assert counts["total"] == decoder + projector + tower


@pytest.mark.parametrize(
    ("preset", "top_k", "activated", "total"),
    [
        ("phi2", 1, 3.62, 6.14),
        ("phi2", 2, 4.46, 6.14),
        ("stablelm2", 1, 2.06, 3.31),
        ("stablelm2", 2, 2.475, 3.31),
    ],
)
def test_sparse_models_have_the_published_billions_of_parameters(preset, top_k, activated, total):
    dense, sparse = shapes_of(preset), shapes_of(preset, MoEConfig(top_k=top_k))
    beside = sum(p.numel() for part in (dense.vision, dense.projector) for p in part.parameters())
    counts = count_parameters(sparse)
    assert (counts["activated"] - beside) / 1e9 == pytest.approx(activated, abs=0.005)
    assert (counts["total"] - beside) / 1e9 == pytest.approx(total, abs=0.005)
    assert counts["dense_base"] == count_parameters(dense)["total"]


def test_parameters_of_a_tiny_sparse_model_are_counted_by_hand(build):
    counts = count_parameters(build("phi", {"top_k": 1, "n_experts": 3}))
    dense = sum(p.numel() for p in build("phi").parameters())
    expert, router = 2 * 32 * 64 + 64 + 32, 32 * 3 + 3
    assert counts["dense_base"] == dense
    assert counts["total"] == dense + 2 * (3 * expert + router)
    assert counts["activated"] == dense + 2 * (expert + router)
