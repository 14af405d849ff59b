"""Sorted experts equal the loop over experts; test_kernels.py has what the CUDA extension does."""

import copy
import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from engine.lora import add_to_ffn
from moe import Experts, MoE
from ops import SortedExperts, dispatch_plan, grouped_linear, permute, unpermute
from routers import Hints, TopKRouter
from tests import cuda_on_cpu, reference
from tests.conftest import FFNS, build, close, prompts, randn, shake

HALF, FULL = torch.bfloat16, torch.float32
# Expert 1 has no token, token 1 no expert.
GATES = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.0, 0.75]])


def test_the_plan_lists_gates_by_expert_then_token_and_rows_are_copied_and_added_up_by_it():
    plan, token = dispatch_plan(GATES), [0, 3, 0, 2, 3]
    assert plan.token.tolist() == token and plan.expert.tolist() == [0, 0, 2, 2, 2]
    assert plan.offsets.tolist() == [2, 2, 5] and plan.offsets.dtype == torch.int32
    assert plan.slot is None
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


@pytest.mark.parametrize(("d", "f", "dtype", "is_grouped"), [
    (16, 8, FULL, True), (16, 8, HALF, True), (16, 8, torch.float64, False),
    (10, 8, FULL, False), (16, 6, FULL, False),  # no multiples of 16 bytes
])  # fmt: skip
@pytest.mark.parametrize("offs", [(2, 2, 5), (0, 0, 5), (0, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_and_its_gradients_are_its_definition(d, f, dtype, is_grouped, offs, bias):
    expert = torch.tensor([sum(end <= r for end in offs) for r in range(offs[-1])]).long()
    ends = torch.tensor(offs, dtype=torch.int32)
    plan = ops.DispatchPlan(torch.arange(offs[-1]), expert, ends)
    shapes = [(offs[-1], d), (3, f, d), (3, f)][: 2 + bias]
    into = [randn(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    x, weight, bias = into if bias else (*into, None)
    y = grouped_linear(x, weight, bias, plan)
    expected = (weight[expert] @ x[:, :, None]).squeeze(2)
    expected = expected if bias is None else expected + bias[expert]
    atol = 2**-7 if dtype == HALF else 1e-5
    close(y, expected, atol, atol)
    assert ops._has_grouped_mm(x, weight) == (is_grouped and offs[-1] > 0)
    # The gradient of a sum is expanded, not contiguous.
    close(torch.autograd.grad(y.sum(), into), torch.autograd.grad(expected.sum(), into), atol, atol)
    with torch.no_grad():  # without gradients always the loop on a CPU
        close(grouped_linear(x, weight, bias, plan), expected, atol, atol)
        assert not ops._has_grouped_mm(x, weight)


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


class Refused(TorchDispatchMode):
    """No op that waits for the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name() not in ("aten::_local_scalar_dense", "aten::nonzero"), function
        return function(*args, **(kwargs or {}))


@FFNS
@pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason="no simulated GPU here")
def test_where_a_router_bounds_the_experts_a_token_the_host_asks_for_nothing(ffn, monkeypatch):
    cuda_on_cpu.Machine(cuda_on_cpu.compiled()).set(order=2, blocks=3, only=-1)
    monkeypatch.setattr(ops, "_enabled", {"cpu"})
    torch.use_deterministic_algorithms(True)  # what is not written yet is NaN
    layer, found = shake(MoE(ffn(16, 24), TopKRouter(16, 3), 3)).to(HALF), []
    ops.use_sorted_experts(layer)
    x, mask = randn(2, 5, 16, dtype=HALF).requires_grad_(), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False  # padding: fewer rows than N k
    for at_most_k in (True, False, True):
        layer.router.at_most_k = at_most_k
        inputs = (x, *layer.experts.parameters(), layer.router.proj.weight)
        with Refused() if at_most_k else nullcontext():
            y, _ = layer(x, mask, Hints())
            found.append([y, *torch.autograd.grad(y.sum(), inputs)])
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found[0], found[1])) and found[0][0].isfinite().all()
    with pytest.raises(AssertionError), Refused():
        layer.router.at_most_k = False
        layer(x, mask, Hints())
    layer.router.at_most_k, layer.router.top_k = True, 1  # a promise that is not kept
    monkeypatch.setattr(layer.router, "gate", lambda logits, mask, x: logits.exp())
    with pytest.raises(RuntimeError, match="more than top_k experts"):
        layer(x, mask, Hints())


def test_every_sparse_layer_is_sorted_where_that_is_faster():
    model, batch = build(moe={"layers": (0, 1, 2)}), prompts()
    before, _ = model(batch.ids, batch.mask, batch.images)
    ops.use_sorted_experts(model)
    close(model(batch.ids, batch.mask, batch.images)[0], before)
    for kind, d_ff, cls in (("cpu", 4096, Experts), ("cpu", 4097, SortedExperts),
                            ("cuda", 64, SortedExperts)):  # fmt: skip
        ops.use_sorted_experts(model, Experts)
        model.config = SimpleNamespace(decoder=SimpleNamespace(d_ff=d_ff))
        ops.place_experts(model, torch.device(kind))
        assert [type(block.mlp.experts) for block in model.decoder.blocks] == [cls] * 3


def test_what_the_extension_and_grouped_mm_support(monkeypatch):
    monkeypatch.setattr(ops, "_enabled", {"cpu"})
    for supports, shape, dtype, able in (
        (ops.supports, (3, 8, 16), HALF, True), (ops.supports, (3, 8, 12), HALF, False),
        (ops.supports, (3, 8, 16), FULL, False), (ops.supports_rows, (3, 8), HALF, True),
        (ops.supports_rows, (3, 4), HALF, False), (ops.supports_rows, (3, 4), FULL, True),
        (ops.supports_routing, (3, 48), FULL, True), (ops.supports_routing, (3, 49), FULL, False),
    ):  # fmt: skip
        assert supports(torch.empty(*shape, dtype=dtype)) is able
        assert not supports(torch.empty(*shape, dtype=dtype, device="meta"))
    x, weight = torch.empty(5, 16, device="meta"), torch.empty(3, 8, 16, device="meta")
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ops._has_grouped_mm(x, weight) is (capability >= (9, 0))


def test_what_the_compilation_lacks_is_told_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert [line.split()[0] for line in ops.lacking_tools()] == ["ninja", "nvcc"]
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    for release, found in (("12.8", ["the toolkit is CUDA 12.8, torch was built with 13.0"]),
                           ("13.1", [])):  # fmt: skip
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V1")
        nvcc.chmod(0o755)
        assert ops.lacking_tools() == found


def test_memory_does_not_grow_with_the_number_of_shapes_that_were_multiplied():
    class Heap(ctypes.Structure):  # of which uordblks is what is allocated
        _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefg", "uordblks", "h", "i")]

    if (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        pytest.skip("glibc's from 2.33 on")
    mallinfo.restype, w, grown = Heap, randn(64, 64, dtype=HALF), []
    for rows in range(1, 401):
        randn(rows, 64, dtype=HALF) @ w
        grown.append(mallinfo().uordblks)
    assert grown[-1] - grown[199] < 10e6  # else 100 MB, where bf16 matmuls are compiled
