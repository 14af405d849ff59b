"""Sorted experts equal the loop over experts; test_kernels.py has what the CUDA extension does.

python -m pytest tests/test_ops.py
"""

import copy
import math
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import ops
from engine.lora import add_to_ffn
from moe import MLP, Experts, GatedMLP
from ops import SortedExperts, dispatch_plan, grouped_linear, permute, unpermute
from tests import reference
from tests.conftest import build, prompts, randn, shake

FFNS = pytest.mark.parametrize("ffn", [MLP, GatedMLP])
# Expert 1 has no token, token 1 no expert.
GATES = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.0, 0.75]])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# The plan


def test_the_plan_lists_the_gates_that_are_not_zero_by_expert_then_token():
    plan = dispatch_plan(GATES)
    assert plan.token.tolist() == [0, 3, 0, 2, 3] and plan.expert.tolist() == [0, 0, 2, 2, 2]
    assert plan.offsets.tolist() == [2, 2, 5] and plan.offsets.dtype == torch.int32
    assert plan.slot is None


def test_permute_and_unpermute_copy_and_add_up_rows_and_their_gradients_are_right():
    plan, token = dispatch_plan(GATES), [0, 3, 0, 2, 3]
    x, y, gates = (t.requires_grad_() for t in (randn(4, 8), randn(5, 8, seed=1), GATES.clone()))
    rows, out = permute(x, plan), unpermute(y, gates, plan)
    assert torch.equal(rows, x[token])
    exact = [0.5 * y[0] - 0.5 * y[2], 0 * y[0], y[3], 0.25 * y[1] + 0.75 * y[4]]
    close(out, torch.stack(exact))
    rows.backward(10.0 ** torch.arange(5)[:, None].expand(5, 8))
    assert x.grad[:, 0].tolist() == [101, 0, 1000, 10010]
    direction = randn(4, 8, seed=2)
    out.backward(direction)
    close(y.grad, direction[token] * torch.tensor([0.5, 0.25, -0.5, 1, 0.75])[:, None])
    dot = (direction[token] * y).sum(dim=1).tolist()
    expected = [[dot[0], 0, dot[2]], [0, 0, 0], [0, 0, dot[3]], [dot[1], 0, dot[4]]]
    close(gates.grad, torch.tensor(expected))


# Grouped matmul


def stretches(*offs):
    """The plan of tokens that are sorted by expert, one expert each."""
    expert = torch.tensor([sum(end <= r for end in offs) for r in range(offs[-1])]).long()
    return ops.DispatchPlan(torch.arange(offs[-1]), expert, torch.tensor(offs, dtype=torch.int32))


@pytest.mark.parametrize(("d", "f", "dtype", "is_grouped"), [
    (16, 8, torch.float32, True), (16, 8, torch.float64, False),
    (10, 8, torch.float32, False), (16, 6, torch.float32, False),  # no multiples of 16 bytes
])  # fmt: skip
@pytest.mark.parametrize("offs", [(2, 2, 5), (0, 0, 5), (5, 5, 5), (0, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_grouped_linear_and_its_gradients_are_its_definition(
    monkeypatch, d, f, dtype, is_grouped, offs, has_bias
):
    plan, counted = stretches(*offs), Mock(wraps=F.grouped_mm)
    monkeypatch.setattr(F, "grouped_mm", counted)
    x, weight, bias = (randn(*s, seed=i, dtype=dtype).requires_grad_()
                       for i, s in enumerate([(offs[-1], d), (3, f, d), (3, f)]))  # fmt: skip
    into = (x, weight, bias) if has_bias else (x, weight)
    y = grouped_linear(x, weight, bias if has_bias else None, plan)
    rows = [weight[e] @ row + has_bias * bias[e] for e, row in zip(plan.expert, x, strict=True)]
    expected = torch.stack(rows) if rows else torch.zeros(0, f, dtype=dtype)
    close(y, expected)
    assert counted.call_count == (is_grouped and offs[-1] > 0)
    found = torch.autograd.grad(y.sum(), into)  # the gradient of a sum is expanded, not contiguous
    if rows:
        close(found, torch.autograd.grad(expected.sum(), into))
    else:
        assert found[0].shape == (0, d) and not found[1].any()
    with torch.no_grad():  # without gradients always the loop on a CPU
        close(grouped_linear(x, weight, bias if has_bias else None, plan), expected)
    assert counted.call_count == (is_grouped and offs[-1] > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_grouped_linear_multiplies_two_byte_floats_to_their_precision(dtype, needs_grad):
    x, weight = randn(5, 16, dtype=dtype), randn(3, 8, 16, seed=1, dtype=dtype)
    with torch.set_grad_enabled(needs_grad):
        y = grouped_linear(x, weight, None, stretches(2, 2, 5))
    expected = [weight[e].float() @ row.float() for e, row in zip((0, 0, 2, 2, 2), x, strict=True)]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), torch.stack(expected), atol=0, rtol=2**-7)


def test_on_a_gpu_grouped_mm_is_used_from_sm_90_on(monkeypatch):
    x, weight = torch.empty(5, 16, device="meta"), torch.empty(3, 8, 16, device="meta")
    for capability, able in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with torch.no_grad():
            assert ops._has_grouped_mm(x, weight) is able


# The layer


@FFNS
@pytest.mark.parametrize("rank", [0, 2])
def test_sorted_experts_equal_the_definition_and_with_lora_the_loop(ffn, rank):
    loop = Experts(ffn(16, 24), 3)
    if rank:
        add_to_ffn(loop, rank)
    fast = copy.deepcopy(shake(loop))
    ops.use_sorted_experts(fast)
    assert type(fast) is SortedExperts and type(loop) is Experts
    x, gates, found = randn(4, 16).requires_grad_(), GATES.clone().requires_grad_(), []
    for experts in (loop, fast):
        y, params = experts(x, gates), dict(experts.named_parameters())
        found.append([y, *torch.autograd.grad(y.sin().sum(), (x, gates, *params.values()))])
    close(found[1], found[0])
    assert all(grad.any() for grad in found[0]) and any("lora_b" in n for n in params) == (rank > 0)
    learns = [[bool(one.any()) for one in grad] for grad in found[1][3:]]
    assert learns == [[True, False, True]] * len(params)  # 0 for the idle expert, and not None
    if not rank:
        close(found[1][0], reference.experts(params, x, gates))


@pytest.mark.parametrize("width", [16, 18])  # of a multiple of 16 bytes, F.grouped_mm is used
def test_an_expert_without_tokens_may_hold_nan(width):
    found = []
    for value in (0.0, math.nan):
        layer = shake(SortedExperts(MLP(16, width), 4))
        for param in layer.parameters():
            param.data[1] = value
        x = randn(10, 16).requires_grad_()
        y = layer(x, torch.tensor([[0.5, 0.0, 0.2, 0.3]]).expand(10, -1))
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert len(found[1]) == 6 and all(t.isfinite().all() for t in found[1])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_use_sorted_experts_changes_every_sparse_layer_and_place_experts_where_it_is_faster():
    model, batch = build(moe={"layers": (0, 1, 2)}), prompts()
    before, _ = model(batch.ids, batch.mask, batch.images)
    ops.use_sorted_experts(model)
    twin = copy.deepcopy(model)
    close(twin(batch.ids, batch.mask, batch.images)[0], before)
    assert [type(block.mlp.experts) for block in twin.decoder.blocks] == [SortedExperts] * 3
    for kind, d_ff, cls in (("cpu", 4096, Experts), ("cpu", 4097, SortedExperts),
                            ("cuda", 64, SortedExperts)):  # fmt: skip
        ops.use_sorted_experts(model, Experts)
        model.config = SimpleNamespace(decoder=SimpleNamespace(d_ff=d_ff))
        ops.place_experts(model, torch.device(kind))
        assert [type(block.mlp.experts) for block in model.decoder.blocks] == [cls] * 3


@FFNS
def test_sorted_experts_under_bf16_autocast_are_near_and_their_gradients_fp32(ffn):
    experts, x = shake(SortedExperts(ffn(16, 24), 3)), randn(4, 16)
    expected = reference.experts(dict(experts.named_parameters()), x, GATES)
    exact = torch.autograd.grad(expected.square().sum(), list(experts.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, GATES)
    found = torch.autograd.grad(y.float().square().sum(), list(experts.parameters()))
    assert len(exact) == len(list(experts.parameters())) and y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.02 * expected.norm()
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.03 * b.norm()


def test_what_the_extension_supports(monkeypatch):
    monkeypatch.setattr(ops, "_enabled", {"cpu"})
    half, full = torch.bfloat16, torch.float32
    for widths, dtype, able in (((8, 16), half, True), ((8, 12), half, False),
                                ((4, 8), half, False), ((8, 16), full, False)):  # fmt: skip
        assert ops.supports(torch.empty(3, *widths, dtype=dtype), None) is able
    assert not ops.supports(torch.empty(8, 8, dtype=half), torch.empty(8, 8))
    for width, dtype, able in ((8, half, True), (4, half, False), (4, full, True),
                               (6, full, False), (8, torch.float64, False)):  # fmt: skip
        assert ops.supports_rows(torch.empty(3, width, dtype=dtype)) is able
    for n_experts, dtype, able in ((48, full, True), (49, full, False), (4, half, False)):
        assert ops.supports_routing(torch.empty(3, n_experts, dtype=dtype)) is able
    meta = torch.empty(8, 8, device="meta")
    assert not any(f(meta) for f in (ops.enabled, ops.supports, ops.supports_rows,
                                     ops.supports_routing))  # fmt: skip


def gmm(product, activation, a, b, up, bias, z, u, offs):
    """What cuda/launchers.h says of it: products 0 to 2, activations 1 (GELU) and 2 (SiLU)."""
    rows, gelu_of = a.tensor_split(offs[:-1].long()), reference.tanh_gelu
    if product == 2:
        others = b.tensor_split(offs[:-1].long())
        return [torch.stack([x.T @ y for x, y in zip(rows, others, strict=True)])]
    if product == 1:
        dh = torch.cat([x @ w for x, w in zip(rows, b, strict=True)])
        if activation == 2:
            dz = torch.ops.aten.silu_backward(dh * u, z)
            return [dz, dh * F.silu(z), F.silu(z) * u]
        if activation == 1:
            return [torch.ops.aten.gelu_backward(dh, z, approximate="tanh"), gelu_of(z)]
        return [dh]
    z, u = (None if m is None else torch.cat([x @ w.T for x, w in zip(rows, m, strict=True)])
            for m in (b, up))  # fmt: skip
    if activation == 2:
        return [F.silu(z) * u, z, u]
    if bias is not None:
        z = z + bias.repeat_interleave(offs.diff(prepend=offs[:1] * 0), dim=0)
    return [gelu_of(z), z] if activation else [z]


@FFNS
@pytest.mark.parametrize("only", [0, 1, 2, 3, 4, None])
def test_the_ffn_by_grouped_products_and_each_gradient_are_exact(monkeypatch, ffn, only):
    monkeypatch.setattr(ops, "CALL", SimpleNamespace(gmm=gmm))
    experts, x = shake(Experts(ffn(8, 16), 3)).double(), randn(5, 8, dtype=torch.float64)
    names, params = zip(*experts.named_parameters(), strict=True)
    only = None if only == len(names) + 1 else only
    into = [t.detach().requires_grad_(only in (None, i)) for i, t in enumerate([x, *params])]
    plan = stretches(2, 2, 5)
    y = ops.call(ops.GeluFFN if ffn is MLP else ops.GatedFFN, *into, plan.offsets)
    gates = F.one_hot(plan.expert, 3).double()
    expected = reference.experts(dict(zip(names, into[1:], strict=True)), into[0], gates)
    close(y, expected, 1e-12)
    wanted = [t for t in into if t.requires_grad]
    found = torch.autograd.grad(y.sin().sum(), wanted)
    close(found, torch.autograd.grad(expected.sin().sum(), wanted), 1e-11)


def test_the_digest_is_of_the_sources_and_not_of_their_readme(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "SOURCES", tmp_path)
    found = []
    for name, text in (("a.cu", "1"), ("README.md", "1"), ("a.cu", "2")):
        (tmp_path / name).write_text(text)
        found.append(ops.digest())
    assert found[0] == found[1] != found[2] and len(found[0]) == 12
