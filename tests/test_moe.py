"""The sparse layer equals its equation, and upcycling changes nothing that was learned."""

import copy

import pytest
import torch

from moe import MLP, Experts, MoE, upcycle
from routers import Hints, ModalityRouter, OracleRouter, TopKRouter
from tests import reference
from tests.conftest import FFNS, LEVELS, close, randn, shake
from tests.test_routers import MASK, PROMPT, X

META = pytest.mark.parametrize("meta", [True, False])
HINTS = Hints(prompt=PROMPT, modality=torch.tensor([2, -1, 0]))


@FFNS
@LEVELS
@META
@pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_the_layer_and_all_its_gradients_equal_the_equation(ffn, level, n_experts, k, meta):
    router, x = TopKRouter(16, n_experts, k, level), X.clone().requires_grad_()
    layer = shake(MoE(ffn(16, 24), router, n_experts, meta))  # different experts, biases not 0
    y, routing = layer(x, MASK, HINTS)
    gates = reference.router_gates(layer.router, x, MASK, PROMPT)
    assert torch.equal(routing.gates != 0, gates != 0)
    close(routing.gates, gates)
    expected = reference.sparse_layer(layer, x, gates)
    close(y, expected)
    into, weight = (x, *layer.parameters()), randn(3, 5, 16, seed=2)
    found = torch.autograd.grad((y * weight).sum(), into)
    close(found, torch.autograd.grad((expected * weight).sum(), into))
    assert all(grad.any() for grad in found) or n_experts == 1
    with torch.autocast("cpu", torch.bfloat16):
        rough, same = layer(x, MASK, HINTS)
    assert rough.dtype == torch.float32 and not torch.equal(rough, y)
    assert torch.equal(same.gates, routing.gates) and torch.equal(same.logits, routing.logits)
    grads = torch.autograd.grad((rough * weight).sum(), into)
    for a, b in zip((rough, *grads), (y, *found), strict=True):  # NaN is not <= either
        assert (a - b).norm() <= 0.03 * b.norm()


@FFNS
def test_experts_are_exact_in_fp64_for_any_gates_and_idle_ones_get_zero_gradients(ffn):
    experts = shake(Experts(ffn(16, 24), 3)).double()
    x, gates = randn(8, 16, dtype=torch.float64).requires_grad_(), randn(8, 3, seed=1).double()
    gates[:, 1] = gates[5] = 0  # an expert without a token, a token without an expert
    stacked = dict(experts.named_parameters())
    both, into = (experts(x, gates), reference.experts(stacked, x, gates)), (x, *stacked.values())
    found, exact = ((y, *torch.autograd.grad(y.square().sum(), into)) for y in both)
    close(found, exact, 1e-11, 1e-11)  # 0 for the idle expert, and not None


def dense_and_sparse(ffn, start, k=2, router=TopKRouter, level="token", meta=True):
    dense = shake(ffn(16, 24))
    its_router = shake(router(16, 4, top_k=k, level=level), seed=1)
    return dense, upcycle(copy.deepcopy(dense), its_router, 4, start, meta)


@FFNS
@LEVELS
@META
@pytest.mark.parametrize("router", [TopKRouter, ModalityRouter, OracleRouter])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("start", ["preserving", "released"])
def test_upcycled_layers_compute_multiples_of_the_dense_ffn(ffn, level, router, k, start, meta):
    dense, sparse = dense_and_sparse(ffn, start, k, router, level, meta)
    y, routing = sparse(X, MASK, HINTS)
    times = 1.0  # with half of it, or nothing, from the experts
    if start == "released" or not meta:
        times = routing.gates.sum(dim=-1, keepdim=True) + meta
    close(y[MASK], (times * dense(X))[MASK])
    y.square().sum().backward()  # an output layer of 0 learns, too
    assert sparse.experts.get_parameter("fc2.weight" if ffn is MLP else "down.weight").grad.any()


@FFNS
@pytest.mark.parametrize(("start", "k", "share"),
    [("preserving", 2, 0.5), ("preserving", 1, 0.0), ("released", 2, 1.0)])  # fmt: skip
def test_experts_are_copies_with_scaled_output_layers(ffn, start, k, share):
    dense, sparse = dense_and_sparse(ffn, start, k)
    for name, trained in dense.named_parameters():
        is_output = name.startswith(("fc2", "down"))
        stacked, meta = (part.get_parameter(name) for part in (sparse.experts, sparse.meta))
        assert torch.equal(meta, trained * (0.5 if is_output and share == 0.5 else 1))
        expected = trained * (share if is_output else 1)
        assert torch.equal(stacked, torch.stack([expected] * 4)) and stacked.is_leaf
        stacked.data[1] += 1  # of one expert alone
        assert torch.equal(stacked[0], expected) and torch.equal(stacked[3], expected)


@FFNS
def test_a_fresh_expert_is_initialised_as_a_linear_layer_with_an_output_of_zero(ffn):
    torch.manual_seed(0)
    dense, sparse = dense_and_sparse(ffn, "fresh")
    close(sparse(X, MASK, HINTS)[0], dense(X))
    for name, param in sparse.experts.named_parameters():
        if name.startswith(("fc2", "down")):
            assert not param.any()
        else:
            assert not torch.equal(param[0], param[1])
            assert all(0.9 < m * 16**0.5 <= 1 for m in (param.max(), -param.min()))
