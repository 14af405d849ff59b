"""Caches and padding change nothing, attention is causal, generation is the argmax of forward.

python -m pytest tests/test_decoder.py
"""

import copy
import math
from itertools import pairwise

import pytest
import torch

import decoder
from config import IGNORE, IMAGE_ID, UserError
from decoder import Cache, apply_rope, causal_mask, rope
from engine.inference import cast_matmuls, fuse_qkv
from model import autocast, generate, pick
from ops import use_sorted_experts
from routers import Hints, TopKRouter

PATCHES = [IMAGE_ID] * 4
PROMPTS = [[5, *PATCHES, 9, 11], [21, 22, 23], [7, 8, *PATCHES, 30, 31, 32]]
MODALITY = [2, -1, 0]
NO_EOS = -1  # no token is this one

FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
SPARSE = [
    {"top_k": 2, "level": "token", "router": "topk"},
    {"top_k": 1, "level": "token", "router": "topk"},
    {"top_k": 2, "level": "sequence", "router": "topk"},
    {"top_k": 1, "level": "sequence", "router": "modality"},
    {"level": "token", "router": "oracle"},
    {"level": "sequence", "router": "oracle"},
]
MODELS = pytest.mark.parametrize("moe", [None, *SPARSE])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(collate, rows=(0, 1, 2), side="left"):
    """Some of PROMPTS as a batch, each with the image that it has in any other batch."""
    batch = collate([(PROMPTS[r], [IGNORE] * len(PROMPTS[r])) for r in rows], side=side)
    images = [randn(1, 3, 32, 32, seed=r) for r in rows if IMAGE_ID in PROMPTS[r]]
    images = torch.cat([*images, batch.images[:0]])
    return batch._replace(images=images, modality=torch.tensor([MODALITY[r] for r in rows]))


@torch.no_grad()
def logits_of(model, batch, hints=None, cache=None):
    hints = hints or Hints(prompt=batch.prompt(), modality=batch.modality)
    hidden, routings = model(batch.ids, batch.mask, batch.images, hints, cache)
    return model.decoder.lm_head(hidden), routings


def loop(model, batch, n_new):
    """Generation by definition: all of the text again for each token, one sample, no cache."""
    assert len(batch.ids) == 1 and batch.mask.all()
    ids, n_prompt, steps = batch.ids, batch.ids.shape[1], []
    for _ in range(n_new):
        longer = batch._replace(ids=ids, mask=torch.ones_like(ids).bool())
        prompt = (torch.arange(ids.shape[1]) < n_prompt)[None]
        logits, _ = logits_of(model, longer, Hints(prompt=prompt, modality=batch.modality))
        steps.append(logits[0, -1])
        ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, n_prompt:].tolist(), torch.stack(steps)


def greedy(model, batch, n_new=10, eos_id=NO_EOS, **how):
    steps = list(generate(model, batch, eos_id, max_new=n_new, **how))
    return torch.stack([step.tokens for step in steps], dim=1).tolist()


# Cache and padding


@FAMILIES
@MODELS
def test_batched_cached_padded_generation_equals_the_plain_loop(build, collate, family, moe):
    model = build(family, moe)
    expected = [loop(model, prompts(collate, [r]), 10)[0] for r in range(3)]
    assert len({token for answer in expected for token in answer}) >= 8  # not one again and again
    assert greedy(model, prompts(collate)) == expected
    for r in range(3):
        assert greedy(model, prompts(collate, [r])) == [expected[r]]


@FAMILIES
@pytest.mark.parametrize("moe", SPARSE)
def test_sorted_experts_give_the_logits_and_the_answers_of_the_loop(build, collate, family, moe):
    loops, batch = build(family, moe), prompts(collate)
    fast = copy.deepcopy(loops)
    use_sorted_experts(fast)
    expected, found = logits_of(loops, batch)[0], logits_of(fast, batch)[0]
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], atol=1e-5, rtol=0)
    assert greedy(fast, batch) == greedy(loops, batch)


@FAMILIES
@MODELS
def test_logits_with_a_cache_equal_those_without(build, collate, family, moe):
    model, batch = build(family, moe), prompts(collate)
    single = [loop(model, prompts(collate, [r]), 6) for r in range(3)]
    answers = torch.tensor([tokens for tokens, _ in single])
    cache = Cache(3)
    hints = Hints(prompt=batch.mask, modality=batch.modality)
    for step in range(6):
        logits, _ = logits_of(model, batch, hints, cache)
        for r in range(3):
            torch.testing.assert_close(logits[r, -1], single[r][1][step], atol=1e-5, rtol=0)
        new = answers[:, step : step + 1]
        batch = batch._replace(ids=new, mask=torch.ones_like(new).bool(), images=batch.images[:0])
        hints = hints._replace(prompt=None)
    n_kv_heads = model.config.decoder.n_kv_heads or 4
    first, *_, last = cache.layers
    assert last.keys.shape == first.values.shape == (3, n_kv_heads, 9 + 5, 8)
    assert cache.mask.sum(dim=1).tolist() == [len(p) + 5 for p in PROMPTS]


@FAMILIES
def test_a_cache_may_be_filled_in_pieces_of_any_length(build, collate, family):
    model, batch = build(family, SPARSE[0]), prompts(collate, [2])
    whole, routings = logits_of(model, batch)
    for cuts in ([6, 9], [1, 6, 7, 9], [0, 9]):
        cache, parts, gates = Cache(3), [], []
        for start, end in pairwise([0, *cuts]):
            piece = batch._replace(ids=batch.ids[:, start:end], mask=batch.mask[:, start:end])
            if IMAGE_ID not in piece.ids:
                piece = piece._replace(images=batch.images[:0])
            elif (piece.ids == IMAGE_ID).sum() < 4:
                pytest.fail("an image must not be cut")
            logits, some = logits_of(model, piece, Hints(), cache)
            parts.append(logits)
            gates.append(some[1].gates)
        assert torch.equal(torch.cat(gates, dim=1) != 0, routings[1].gates != 0)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@FAMILIES
@MODELS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_real_positions_as_they_are(
    build, collate, family, moe, side
):
    model, batch = build(family, moe), prompts(collate, side=side)
    logits, routings = logits_of(model, batch)
    assert torch.isfinite(logits).all()
    for r in range(3):
        alone, its_routings = logits_of(model, prompts(collate, [r]))
        for routing, its in zip(routings, its_routings, strict=True):
            assert torch.equal(routing.gates[r][batch.mask[r]] != 0, its.gates[0] != 0)
            assert not routing.gates[r][~batch.mask[r]].any()
        torch.testing.assert_close(logits[r][batch.mask[r]], alone[0], atol=1e-5, rtol=0)


@FAMILIES
@MODELS
def test_the_tokens_of_padding_do_not_matter(build, collate, family, moe):
    model, batch = build(family, moe), prompts(collate, side="right")
    other = batch._replace(ids=torch.where(batch.mask, batch.ids, 17))
    assert torch.equal(
        logits_of(model, batch)[0][batch.mask], logits_of(model, other)[0][batch.mask]
    )


@FAMILIES
@MODELS
def test_a_token_changes_nothing_before_it(build, collate, family, moe):
    model, row = build(family, moe), list(range(20, 32))
    prompt = torch.arange(12)[None] < 4
    batch = collate([(row, [IGNORE] * 12)])
    hints = Hints(prompt=prompt, modality=torch.tensor([1]))
    before, _ = logits_of(model, batch, hints)
    for t in range(5, 12):
        changed = batch.ids.clone()
        changed[0, t] = 50
        after, _ = logits_of(model, batch._replace(ids=changed), hints)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=0)
        assert ((after - before)[0, t:].abs().amax(dim=-1) > 1e-3).all()


def test_the_causal_mask_allows_real_positions_up_to_the_querys_own_and_always_itself():
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    expected = [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]],
    ]
    assert causal_mask(real, 4)[:, 0].exp().tolist() == expected
    assert torch.equal(causal_mask(real, 2), causal_mask(real, 4)[:, :, 2:])


# Rotary embedding


def test_rotation_touches_the_first_channels_only_and_keeps_their_length():
    x = randn(2, 3, 5, 8)
    rotated = apply_rope(x, *rope(torch.arange(5).expand(2, 5), 4, 10000.0))
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])  # position 0: an angle of 0
    assert (rotated - x)[:, :, 1:, :4].abs().amin() > 0


def test_channel_i_is_rotated_with_its_partner_in_the_other_half():
    x, theta, dim = randn(1, 1, 7, 6), 100.0, 6
    rotated = apply_rope(x, *rope(torch.arange(7)[None], dim, theta))
    for t in range(7):
        for i in range(dim // 2):
            angle = t * theta ** (-2 * i / dim)
            a, b = x[0, 0, t, i].item(), x[0, 0, t, i + 3].item()
            now = rotated[0, 0, t, [i, i + 3]].tolist()
            expected = [
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            ]
            assert now == pytest.approx(expected, abs=1e-5)


def test_scores_of_rotated_vectors_depend_on_their_distance_only():
    q, k = randn(1, 1, 1, 8, seed=1), randn(1, 1, 1, 8, seed=2)

    def score(a, b):
        places = [rope(torch.tensor([[p]]), 4, 10000.0) for p in (a, b)]
        return float((apply_rope(q, *places[0]) * apply_rope(k, *places[1])).sum())

    assert score(12, 5) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3


def test_rotation_keeps_bf16_and_is_computed_in_fp32():
    x = randn(1, 2, 5, 8).bfloat16()
    cos, sin = rope(torch.tensor([[500, 501, 502, 503, 504]]), 4, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())


@FAMILIES
def test_positions_count_real_tokens_so_padding_between_them_is_nothing(build, collate, family):
    model = build(family)
    plain = collate([([4, 5, 6], [IGNORE] * 3)])
    gap = plain._replace(
        ids=torch.tensor([[4, 0, 0, 5, 6]]),
        mask=torch.tensor([[1, 0, 0, 1, 1]]).bool(),
        labels=torch.full((1, 5), IGNORE),
    )
    torch.testing.assert_close(
        logits_of(model, gap)[0][gap.mask], logits_of(model, plain)[0][0], atol=1e-5, rtol=0
    )


# The families


def test_a_phi_block_runs_both_branches_on_one_norm_and_a_stablelm_block_one_after_the_other(
    build,
):
    x = randn(1, 4, 32)
    mask = torch.ones(1, 4).bool()
    rest = causal_mask(mask, 4), *rope(torch.arange(4)[None], 4, 10000.0), None
    phi = build("phi").decoder.blocks[0]
    y, routing = phi(x, mask, *rest, Hints())
    h = phi.ln(x)
    torch.testing.assert_close(y, x + phi.attn(h, *rest) + phi.mlp(h), atol=1e-5, rtol=0)
    assert routing is None
    rest = causal_mask(mask, 4), *rope(torch.arange(4)[None], 2, 10000.0), None
    stable = build("stablelm").decoder.blocks[0]
    y, _ = stable(x, mask, *rest, Hints())
    middle = x + stable.attn(stable.ln_1(x), *rest)
    torch.testing.assert_close(y, middle + stable.mlp(stable.ln_2(middle)), atol=1e-5, rtol=0)


def test_biases_are_where_each_family_has_them(build):
    for family, without in (
        ("phi", {"embed"}),
        ("stablelm", {"embed", "lm_head", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}),
    ):
        names = [n for n, _ in build(family).decoder.named_parameters()]
        layers = {n.rpartition(".")[0] for n in names if n.endswith("weight")}
        bare = {n for n in layers if f"{n}.bias" not in names}
        assert {n.partition("blocks.")[2][2:] or n for n in bare} == without


@FAMILIES
def test_dropout_works_in_training_only(build, family):
    block = build(family).decoder.blocks[0]
    block.drop.p = 0.5
    x, mask = randn(1, 4, 32), torch.ones(1, 4).bool()
    cos, sin = rope(torch.arange(4)[None], 4, 10000.0)
    rest = mask, causal_mask(mask, 4), cos, sin, None, Hints()
    assert torch.equal(block(x, *rest)[0], block(x, *rest)[0])
    block.train()
    torch.manual_seed(0)
    assert not torch.equal(block(x, *rest)[0], block(x, *rest)[0])


# Generation


@FAMILIES
def test_each_step_has_the_routings_of_the_positions_it_computed(build, collate, family):
    steps = list(generate(build(family, SPARSE[0]), prompts(collate), NO_EOS, max_new=3))
    shapes = [[tuple(r.gates.shape) for r in step.routings] for step in steps]
    assert shapes == [[(3, 9, 4)] * 2, [(3, 1, 4)] * 2, [(3, 1, 4)] * 2]


@FAMILIES
def test_a_sequence_level_decision_is_kept_for_all_of_the_answer(build, collate, family):
    batch = prompts(collate)
    steps = list(generate(build(family, SPARSE[2]), batch, NO_EOS, max_new=6))
    for layer in range(2):
        decided = steps[0].routings[layer].gates[:, -1:]
        assert torch.equal(steps[0].routings[layer].gates, decided * batch.mask[..., None])
        assert all(torch.equal(s.routings[layer].gates, decided) for s in steps[1:])


def test_generation_pads_what_has_ended_with_eos_and_stops_when_all_have(build, collate):
    model, batch = build("phi", SPARSE[0]), prompts(collate)
    answers = greedy(model, batch, 12)
    eos_id = answers[0][2]
    ends = [row.index(eos_id) if eos_id in row else 12 for row in answers]
    assert ends[0] <= 2 and max(ends) > ends[0]
    stopped = greedy(model, batch, 12, eos_id)
    n_steps = min(12, max(ends) + 1)
    for row, answer, end in zip(stopped, answers, ends, strict=True):
        assert row == (answer[:end] + [eos_id] * 12)[:n_steps]
    alone = greedy(model, prompts(collate, [0]), 12, eos_id)
    assert alone == [answers[0][: ends[0] + 1]]


def test_generation_makes_max_new_tokens_if_no_answer_ends(build, collate):
    assert [len(row) for row in greedy(build(), prompts(collate), 4)] == [4, 4, 4]


def test_generation_leaves_no_gradient_and_no_tensor_on_the_model(build, collate):
    model = build("phi", SPARSE[2])
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    steps = list(generate(model, prompts(collate), NO_EOS, max_new=2))
    assert not steps[0].routings[0].gates.requires_grad
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before
    assert not any(torch.is_tensor(v) for m in model.modules() for v in vars(m).values())


class Peeking(TopKRouter):
    causal = False


def test_a_router_that_looks_ahead_cannot_generate(build, collate):
    model = build("phi", SPARSE[0])
    model.decoder.blocks[2].mlp.router = Peeking(32, 4)
    with pytest.raises(UserError, match="router Peeking looks at later tokens"):
        next(generate(model, prompts(collate), NO_EOS))


def test_temperature_zero_is_greedy_whatever_top_p_is():
    logits = randn(5, 20)
    for top_p in (0.1, 1.0):
        assert torch.equal(pick(logits, 0.0, top_p), logits.argmax(dim=-1))


def sampled_shares(probs, temperature=1.0, top_p=1.0, n=4000, seed=0):
    """Shares of the tokens in n samples."""
    logits = torch.tensor(probs).log().expand(n, -1)
    picks = pick(logits, temperature, top_p, torch.Generator().manual_seed(seed))
    return torch.bincount(picks, minlength=len(probs)) / n


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.39, [0, 0, 1, 0]),
        (0.41, [0, 1, 1, 0]),  # 0.4 alone does not reach it: the next likeliest comes along
        (0.69, [0, 1, 1, 0]),
        (0.71, [1, 1, 1, 0]),
        (0.95, [1, 1, 1, 1]),
        (1.00, [1, 1, 1, 1]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = [0.2, 0.3, 0.4, 0.1]
    shares = sampled_shares(probs, top_p=top_p)
    assert (shares > 0).int().tolist() == kept
    expected = torch.tensor(probs) * torch.tensor(kept)
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.03, rtol=0)


def test_temperature_sharpens_or_flattens_the_distribution():
    probs = [0.6, 0.3, 0.1]
    for temperature in (0.5, 2.0):
        expected = torch.tensor(probs) ** (1 / temperature)
        shares = sampled_shares(probs, temperature)
        torch.testing.assert_close(shares, expected / expected.sum(), atol=0.03, rtol=0)


def test_sampling_is_reproduced_by_the_generators_seed(build, collate):
    model, batch = build("phi", SPARSE[0]), prompts(collate)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return greedy(model, batch, 8, temperature=1.0, top_p=0.9, generator=generator)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1) != greedy(model, batch, 8)


def test_each_family_has_a_block_and_no_other():
    assert set(decoder.BLOCKS) == {"phi", "stablelm", "llama"}


@FAMILIES
def test_weights_are_cast_once_instead_of_for_every_token(build, collate, family):
    """What autocast would do each time: every logit and route stays as it is, to the last bit."""
    batch = collate([([5, *[IMAGE_ID] * 4, 9, 8], [IGNORE] * 7)] * 2, side="left")
    found = []
    for is_cast in (False, True):
        model = build(family, {})
        if is_cast:
            cast_matmuls(model, torch.bfloat16)
            kinds = {name: p.dtype for name, p in model.named_parameters()}
            assert kinds["decoder.embed.weight"] == torch.float32
            assert kinds["decoder.blocks.0.mlp.router.proj.weight"] == torch.float32
            experts = [kind for name, kind in kinds.items() if ".experts." in name]
            assert {*experts, kinds["decoder.lm_head.weight"]} == {torch.bfloat16}
        with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16):
            hidden, routings = model(batch.ids, batch.mask, batch.images)
            found.append([model.decoder.lm_head(hidden), *(r.gates for r in routings)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@FAMILIES
def test_answers_from_fused_projections_are_the_same(build, collate, family):
    batch = collate([([5, *[IMAGE_ID] * 4, 9, 8], [IGNORE] * 7)] * 2, side="left")
    model = build(family, {})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = []
    for _ in range(2):
        with torch.no_grad():
            hidden, routings = model(batch.ids, batch.mask, batch.images)
        tokens = [step.tokens for step in generate(model, batch, eos_id=-1, max_new=5)]
        found.append((hidden, routings[0].gates, torch.stack(tokens)))
        for block in model.decoder.blocks:
            fuse_qkv(block.attn)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
    attn = model.decoder.blocks[0].attn  # its parts are views of the fused weight, not copies
    attn.k.weight.data.zero_()
    assert (attn.fused["weight"] == 0).all(dim=1).sum() == len(attn.k.weight)
    model(batch.ids, batch.mask, batch.images)[0].sum().backward()
    assert all(p.grad.any() for p in (attn.k.weight, attn.v.weight))
    assert not model.double().decoder.blocks[0].attn.fused
