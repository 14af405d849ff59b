"""The sparse layer equals its equation, and upcycling changes nothing that was learned.

python -m pytest tests/test_moe.py
"""

import copy

import pytest
import torch

from moe import MLP, Experts, GatedMLP, MoE, upcycle
from routers import Hints, ModalityRouter, OracleRouter, TopKRouter
from tests import reference
from tests.conftest import randn, shake

FFNS = pytest.mark.parametrize("ffn", [MLP, GatedMLP])
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
HINTS = Hints(prompt=PROMPT, modality=torch.tensor([2, -1, 0]))
X = randn(3, 5, 16)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


def random_layer(ffn, router=TopKRouter, n_experts=4, k=2, level="token", meta=True):
    """Different experts, and nonzero biases everywhere."""
    return shake(MoE(ffn(16, 24), router(16, n_experts, k, level), n_experts, meta))


@FFNS
@LEVELS
@pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("meta", [True, False])
def test_the_layer_and_all_its_gradients_equal_the_equation(ffn, level, n_experts, k, meta):
    layer, x = random_layer(ffn, TopKRouter, n_experts, k, level, meta), X.clone().requires_grad_()
    y, routing = layer(x, MASK, HINTS)
    gates = reference.router_gates(layer.router, x, MASK, PROMPT)
    assert torch.equal(routing.gates != 0, gates != 0)
    close(routing.gates, gates)
    expected = reference.sparse_layer(layer, x, gates)
    close(y, expected)

    names, params = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad((y * randn(3, 5, 16, seed=2)).sum(), (x, *params))
    exact = torch.autograd.grad((expected * randn(3, 5, 16, seed=2)).sum(), (x, *params))
    close(found, exact)
    assert all(grad.any() for grad in found) or n_experts == 1, names


@FFNS
def test_experts_are_exact_in_fp64_for_any_gates_and_idle_ones_get_zero_gradients(ffn):
    experts = shake(Experts(ffn(16, 24), 3)).double()
    x, gates = randn(8, 16, dtype=torch.float64).requires_grad_(), randn(8, 3, seed=1).double()
    gates[:, 1] = 0  # no token
    gates[5] = 0  # no expert
    stacked = dict(experts.named_parameters())
    y, expected = experts(x, gates), reference.experts(stacked, x, gates)
    close(y, expected, 1e-12)
    assert y.dtype == torch.float64 and not y[5].any()
    into = (x, *stacked.values())
    found = torch.autograd.grad(y.square().sum(), into)
    close(found, torch.autograd.grad(expected.square().sum(), into), 1e-11)
    learns = [[bool(one.any()) for one in grad] for grad in found[1:]]
    assert learns == [[True, False, True]] * len(stacked)  # 0 for the idle expert, and not None


@FFNS
@LEVELS
def test_padding_alone_and_an_empty_batch(ffn, level):
    layer, mask = random_layer(ffn, level=level), torch.zeros(3, 5).bool()
    y, routing = layer(X, mask, Hints())
    assert not routing.gates.any()
    close(y, layer.meta(X))
    y.sum().backward()
    assert not any(param.grad.any() for param in layer.experts.parameters())
    for shape in ((0, 5), (2, 0)):
        y, routing = layer(torch.zeros(*shape, 16), torch.zeros(shape).bool(), Hints())
        assert y.shape == (*shape, 16)
        assert routing.gates.shape == routing.logits.shape == (*shape, 4)


@FFNS
def test_the_layer_under_bf16_autocast_is_near_and_takes_the_same_routes(ffn):
    layer = random_layer(ffn)
    y, routing = layer(X, MASK, HINTS)
    with torch.autocast("cpu", torch.bfloat16):
        rough, same = layer(X, MASK, HINTS)
    assert rough.dtype == torch.float32 and torch.equal(same.gates, routing.gates)
    assert not torch.equal(rough, y)
    close(rough, y, 0.05)


@FFNS
def test_a_forward_pass_leaves_nothing_on_the_modules(ffn):
    layer = random_layer(ffn)
    kept = {n: (sorted(vars(m)), len(list(m.buffers()))) for n, m in layer.named_modules()}
    layer(X, MASK, HINTS)
    assert kept == {n: (sorted(vars(m)), len(list(m.buffers()))) for n, m in layer.named_modules()}
    assert not any(torch.is_tensor(v) for m in layer.modules() for v in vars(m).values())
    assert all(param.is_meta for param in layer.experts.ffn[0].parameters())


# From dense to sparse


def dense_and_sparse(ffn, start, k=2, router=TopKRouter, level="token", meta=True):
    dense = shake(ffn(16, 24))
    its_router = shake(router(16, 4, top_k=k, level=level), seed=1)
    return dense, upcycle(copy.deepcopy(dense), its_router, 4, start, meta)


@FFNS
@LEVELS
@pytest.mark.parametrize("router", [TopKRouter, ModalityRouter, OracleRouter])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("start", ["preserving", "fresh"])
def test_two_starts_compute_the_dense_ffn(ffn, level, router, k, start):
    dense, sparse = dense_and_sparse(ffn, start, k, router, level)
    y, routing = sparse(X, MASK, HINTS)
    assert (routing.gates[MASK] != 0).any(dim=-1).all()
    close(y[MASK], dense(X)[MASK])


@FFNS
@pytest.mark.parametrize(("k", "start"), [(1, "released"), (2, "released"), (2, "preserving")])
@pytest.mark.parametrize("meta", [True, False])
def test_plain_copies_multiply_the_dense_ffn_by_the_sum_of_the_gates_plus_meta(ffn, k, start, meta):
    dense, sparse = dense_and_sparse(ffn, start, k, meta=meta)
    y, routing = sparse(X, MASK, HINTS)
    times = routing.gates.sum(dim=-1, keepdim=True) + (meta and start == "released")
    close(y[MASK], (times * dense(X))[MASK])


@FFNS
@pytest.mark.parametrize(("k", "of_experts", "of_meta"), [(2, 0.5, 0.5), (1, 0.0, 1.0)])
def test_the_preserving_start_scales_output_layers_only(ffn, k, of_experts, of_meta):
    dense, sparse = dense_and_sparse(ffn, "preserving", k)
    for name, trained in dense.named_parameters():
        is_output = name.startswith(("fc2", "down"))
        assert torch.equal(sparse.meta.get_parameter(name), trained * (of_meta if is_output else 1))
        for expert in sparse.experts.get_parameter(name):
            assert torch.equal(expert, trained * (of_experts if is_output else 1))


@FFNS
def test_a_fresh_expert_is_initialised_as_a_linear_layer_with_an_output_of_zero(ffn):
    torch.manual_seed(0)
    dense, sparse = dense_and_sparse(ffn, "fresh")
    for name, param in sparse.experts.named_parameters():
        if name.startswith(("fc2", "down")):
            assert not param.any()
        else:
            assert not torch.equal(param[0], param[1])
            assert 0.9 * 16**-0.5 < param.max() <= 16**-0.5
            assert -(16**-0.5) <= param.min() < 0.9 * -(16**-0.5)
    assert all(torch.equal(sparse.meta.get_parameter(n), p) for n, p in dense.named_parameters())
    assert MoE(dense, sparse.router, 4).meta is upcycle(dense, sparse.router, 4, "fresh").meta


@FFNS
@pytest.mark.parametrize("start", ["preserving", "fresh"])
def test_experts_that_begin_at_zero_still_learn(ffn, start):
    _, sparse = dense_and_sparse(ffn, start, k=1)
    sparse(X, MASK, HINTS)[0].square().sum().backward()
    last = sparse.experts.get_parameter("fc2.weight" if ffn is MLP else "down.weight")
    assert not last.any() and last.grad.any()


@FFNS
def test_experts_are_copies_in_storage_of_their_own(ffn):
    dense, sparse = dense_and_sparse(ffn, "released")
    for name, trained in dense.named_parameters():
        stacked, meta = (part.get_parameter(name) for part in (sparse.experts, sparse.meta))
        assert stacked.shape == (4, *trained.shape) and stacked.requires_grad and stacked.is_leaf
        with torch.no_grad():
            stacked[1] += 1
        assert all(torch.equal(stacked[e], trained) for e in (0, 2, 3))
        assert torch.equal(meta, trained) and torch.equal(stacked[1], trained + 1)
