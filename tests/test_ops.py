"""Attention and the ops of the sorted experts equal their definitions, forward and backward.

python -m pytest tests/test_ops.py
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import ops
import vision

GATES = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.0, 0.75]])


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def looped(x, weight, bias, offs):
    """The definition of grouped_linear, row by row."""
    expert = [sum(int(end) <= r for end in offs) for r in range(len(x))]
    return torch.stack([weight[e] @ row + bias[e] for e, row in zip(expert, x, strict=True)])


def test_attention_is_torchs_with_and_without_a_mask():
    q, k, v = randn(2, 3, 5, 8, seed=1), randn(2, 3, 7, 8, seed=2), randn(2, 3, 7, 8, seed=3)
    allowed = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    allowed[..., 0] = True
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, float("-inf"))
    for attn_mask in (None, mask):
        ours = vision.attention(q, k, v, attn_mask)
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        ours = torch.autograd.grad(ours.sin().sum(), (q, k, v))
        theirs = torch.autograd.grad(theirs.sin().sum(), (q, k, v))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_attention_uses_only_the_keys_that_the_mask_allows():
    q, k, v = randn(1, 1, 2, 4, seed=1), randn(1, 1, 3, 4, seed=2), randn(1, 1, 3, 4, seed=3)
    attn_mask = torch.tensor([[1, 0, 0], [0, 1, 0]]).log()[None, None]
    torch.testing.assert_close(vision.attention(q, k, v, attn_mask), v[:, :, :2])
    with torch.no_grad():
        torch.testing.assert_close(vision.attention(q, k, v, attn_mask), v[:, :, :2])


def test_attention_in_bf16_stays_bf16_and_near():
    q, k, v = (randn(1, 2, 4, 64, seed=s).detach() for s in (1, 2, 3))
    rough = vision.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), vision.attention(q, k, v), atol=0.03, rtol=0)


def test_the_plan_lists_the_gates_that_are_not_zero_by_expert_then_token():
    plan = ops.dispatch_plan(GATES)
    assert plan.token.tolist() == [0, 3, 0, 2, 3]
    assert plan.expert.tolist() == [0, 0, 2, 2, 2]
    assert plan.offsets.tolist() == [2, 2, 5]  # expert 1 is idle: its stretch is empty
    assert plan.offsets.dtype == torch.int32


def test_a_negative_gate_is_routed_too():
    assert ops.dispatch_plan(torch.tensor([[-0.5, 0.0]])).token.tolist() == [0]


def test_permute_copies_a_token_for_each_of_its_experts():
    x = randn(4, 6).detach()
    assert torch.equal(ops.permute(x, ops.dispatch_plan(GATES)), x[[0, 3, 0, 2, 3]])


def test_unpermute_is_the_gated_sum_of_each_tokens_rows():
    y = randn(5, 6).detach()
    out = ops.unpermute(y, GATES, ops.dispatch_plan(GATES))
    expected = [
        0.5 * y[0] + 0.5 * y[2],
        torch.zeros(6),
        y[3],
        0.25 * y[1] + 0.75 * y[4],
    ]
    torch.testing.assert_close(out, torch.stack(expected))


def test_unpermute_after_permute_multiplies_each_token_by_the_sum_of_its_gates():
    x, plan = randn(4, 6).detach(), ops.dispatch_plan(GATES)
    back = ops.unpermute(ops.permute(x, plan), GATES, plan)
    torch.testing.assert_close(back, x * GATES.sum(dim=1, keepdim=True))


def test_gradients_of_permute_and_unpermute_are_right_in_fp64():
    x, plan = randn(4, 3, dtype=torch.float64), ops.dispatch_plan(GATES)
    y = randn(5, 3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, plan), x)
    # A gate of 0 routes nothing: its gradient is 0 by design, so it is not among the inputs.
    weights = GATES[GATES != 0].double().requires_grad_()

    def unpermute(y, weights):
        return ops.unpermute(
            y, torch.zeros(4, 3).double().masked_scatter(GATES != 0, weights), plan
        )

    assert torch.autograd.gradcheck(unpermute, (y, weights))


def stretches(*offs):
    """The plan of tokens that are sorted by expert, one expert each."""
    expert = torch.tensor([sum(end <= r for end in offs) for r in range(offs[-1])]).long()
    return ops.DispatchPlan(torch.arange(offs[-1]), expert, torch.tensor(offs, dtype=torch.int32))


def test_gradients_of_grouped_linear_are_right_in_fp64():
    x, weight = randn(5, 3, dtype=torch.float64), randn(3, 2, 3, seed=1, dtype=torch.float64)
    bias, plan = randn(3, 2, seed=2, dtype=torch.float64), stretches(2, 2, 5)
    assert torch.autograd.gradcheck(lambda *a: ops.grouped_linear(*a, plan), (x, weight, bias))


@pytest.mark.parametrize(
    ("widths", "dtype", "path"),
    [
        ((16, 8), torch.float32, "AddBackward0"),
        ((10, 8), torch.float32, "CatBackward0"),  # rows of 40 bytes: not a multiple of 16
        ((16, 6), torch.float32, "CatBackward0"),
        ((16, 8), torch.float64, "CatBackward0"),
    ],
)
@pytest.mark.parametrize("offs", [(2, 2, 5), (0, 0, 5), (5, 5, 5), (1, 3, 5)])
def test_grouped_linear_is_its_definition_on_either_path(widths, dtype, path, offs):
    d, f = widths
    x, weight = randn(5, d, dtype=dtype), randn(3, f, d, seed=1, dtype=dtype)
    bias = randn(3, f, seed=2, dtype=dtype)
    y = ops.grouped_linear(x, weight, bias, stretches(*offs))
    assert y.grad_fn.name() == path
    expected = looped(x, weight, bias, offs)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    ours = torch.autograd.grad(y.sin().sum(), (x, weight, bias))
    theirs = torch.autograd.grad(expected.sin().sum(), (x, weight, bias))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    used = [end > start for start, end in pairwise((0, *offs))]
    assert (ours[1].flatten(1) != 0).any(dim=1).tolist() == used
    with torch.no_grad():  # on a CPU always the loop
        y = ops.grouped_linear(x, weight, bias, stretches(*offs))
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
        y = ops.grouped_linear(x, weight, None, stretches(*offs))
        torch.testing.assert_close(y, looped(x, weight, 0 * bias, offs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("able", [True, False])
def test_grouped_linear_multiplies_two_byte_floats_to_their_precision(dtype, able, monkeypatch):
    monkeypatch.setattr(ops, "_has_grouped_mm", lambda *_: able)
    x, weight = randn(5, 16).detach(), randn(3, 8, 16, seed=1).detach()
    y = ops.grouped_linear(x.to(dtype), weight.to(dtype), None, stretches(2, 2, 5))
    assert y.dtype == dtype
    rough = x.to(dtype).float(), weight.to(dtype).float(), torch.zeros(3)
    torch.testing.assert_close(y.float(), looped(*rough, (2, 2, 5)), atol=0, rtol=2**-7)


def test_grouped_linear_takes_the_gradient_of_a_sum_which_is_expanded():
    x, weight = randn(4, 8), randn(2, 4, 8, seed=1)
    ops.grouped_linear(x, weight, None, stretches(1, 4)).sum().backward()
    torch.testing.assert_close(x.grad[0], weight[0].sum(dim=0).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_linear_of_no_rows_is_empty_and_gives_zero_gradients(dtype):
    x, weight = randn(0, 16, dtype=dtype), randn(3, 8, 16, dtype=dtype)
    y = ops.grouped_linear(x, weight, None, stretches(0, 0, 0))
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
