"""The sparse layer equals its equation, routers their definition, and upcycling changes nothing.

python -m pytest tests/test_moe.py
"""

import copy
import math

import pytest
import torch

import routers
from config import IMAGE_ID, MoEConfig
from engine.lora import add_to_ffn
from engine.older import ResidualMoE, add_residual, has_residual
from model import make_sparse
from moe import MLP, Experts, GatedMLP, upcycle
from ops import SortedExperts, use_sorted_experts
from routers import (
    Hints,
    ModalityRouter,
    OracleRouter,
    RandomRouter,
    Router,
    Routing,
    TopKRouter,
    get_router,
    load_balancing_loss,
    router_z_loss,
    top_k_gates,
)

FAMILIES = {"phi": MLP, "stablelm": GatedMLP}
BOTH = pytest.mark.parametrize("family", FAMILIES)
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
PATHS = pytest.mark.parametrize("experts", [Experts, SortedExperts])
CHOICES = pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])

# Three samples, as the released code cannot: no padding, padded on the left, on the right.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The definition, one token at a time.


def naive_ffn(family, weights, x):
    """x (D,) through one FFN, weights {"fc1.weight": ...}."""
    if family == "phi":
        h = weights["fc1.weight"] @ x + weights["fc1.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return weights["fc2.weight"] @ h + weights["fc2.bias"]
    gate = weights["gate.weight"] @ x
    return weights["down.weight"] @ (gate * torch.sigmoid(gate) * (weights["up.weight"] @ x))


def naive_gates(router, x, mask, prompt):
    """The gates (B, T, E) of a top-k router, token by token."""
    weight, bias = router.proj.weight.float(), router.proj.bias.float()
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = x[b, t] if router.level == "token" else x[b, mask[b] & prompt[b]].mean(dim=0)
            p = (weight @ seen.float() + bias).softmax(dim=0)
            best = p.argsort(descending=True)[: router.top_k]
            chosen = p[best] / p[best].sum() if router.top_k > 1 else p[best]
            gates = torch.zeros(len(p)).index_put((best,), chosen)
            rows.append(gates if mask[b, t] else torch.zeros_like(gates))
    return torch.stack(rows).view(*x.shape[:2], -1)


def naive_layer(family, layer, x, gates):
    """y = meta(x) + sum over e of gates[e] * expert_e(x), for every token and every expert."""
    meta, experts = dict(layer.meta.named_parameters()), dict(layer.experts.named_parameters())
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            y = naive_ffn(family, meta, x[b, t])
            for e in range(gates.shape[-1]):
                expert = {name: stacked[e] for name, stacked in experts.items()}
                y = y + gates[b, t, e].to(x.dtype) * naive_ffn(family, expert, x[b, t])
            rows.append(y)
    return torch.stack(rows).view_as(x)


def make_layer(
    shake, family, experts=Experts, router_class=TopKRouter, d_model=16, n_experts=4, k=2,
    level="token",
):  # fmt: skip
    """A sparse layer with different experts and nonzero biases everywhere."""
    mlp = FAMILIES[family](d_model, 24)
    router = router_class(d_model, n_experts, top_k=k, level=level)
    layer = shake(upcycle(mlp, router, n_experts, "released"))
    use_sorted_experts(layer, experts)
    return layer


@BOTH
@PATHS
@LEVELS
@CHOICES
@pytest.mark.parametrize(
    ("d_model", "dtype"), [(16, torch.float32), (10, torch.float32), (16, torch.float64)]
)
def test_the_layer_and_all_its_gradients_equal_the_triple_loop(
    shake, family, experts, level, n_experts, k, d_model, dtype
):
    layer = make_layer(shake, family, experts, TopKRouter, d_model, n_experts, k, level).to(dtype)
    x = randn(*MASK.shape, d_model, seed=1).to(dtype).requires_grad_()
    y, routing = layer(x, MASK, Hints(prompt=PROMPT))
    gates = naive_gates(layer.router, x, MASK, PROMPT)
    assert torch.equal((routing.gates != 0).int(), (gates != 0).int())
    assert (routing.gates[MASK] != 0).sum(dim=-1).eq(k).all()
    torch.testing.assert_close(routing.gates, gates, atol=1e-5, rtol=0)
    expected = naive_layer(family, layer, x, gates)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)

    names, params = zip(*layer.named_parameters(), strict=True)
    into = (x, *params)
    direction = randn(*y.shape, seed=2).to(dtype)
    ours = torch.autograd.grad((y * direction).sum(), into)
    theirs = torch.autograd.grad((expected * direction).sum(), into)
    for name, a, b in zip(("x", *names), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert n_experts == 1 or a.abs().max() > 0, name


@BOTH
@PATHS
def test_for_any_gates_the_experts_are_exact_in_fp64(shake, family, experts):
    layer = make_layer(shake, family, experts).double()
    x = randn(3, 5, 16, seed=1).double().requires_grad_()
    gates = torch.where(randn(3, 5, 4, seed=2) > 0, randn(3, 5, 4, seed=3), 0.0).double()
    y = layer.meta(x) + layer.experts(x.flatten(0, 1), gates.flatten(0, 1)).view_as(x)
    expected = naive_layer(family, layer, x, gates)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    into = (x, *layer.meta.parameters(), *layer.experts.parameters())
    ours = torch.autograd.grad(y.square().sum(), into)
    theirs = torch.autograd.grad(expected.square().sum(), into)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@BOTH
@PATHS
@pytest.mark.parametrize("d_model", [16, 10])
def test_idle_experts_get_zero_gradients_not_none(shake, family, experts, d_model):
    layer = make_layer(shake, family, experts, OracleRouter, d_model)
    x = randn(*MASK.shape, d_model, seed=1)
    layer(x, MASK, Hints(modality=torch.tensor([1, 1, 1])))[0].sum().backward()
    for name, param in layer.experts.named_parameters():
        largest = param.grad.flatten(1).abs().amax(dim=1)
        assert (largest > 0).tolist() == [False, True, False, False], name


@BOTH
@PATHS
def test_padding_is_routed_to_no_expert_and_still_gives_gradients(shake, family, experts):
    layer = make_layer(shake, family, experts)
    x = randn(2, 3, 16)
    y, routing = layer(x, torch.zeros(2, 3).bool(), Hints())
    assert torch.equal(routing.gates, torch.zeros(2, 3, 4))
    torch.testing.assert_close(y, layer.meta(x), atol=1e-6, rtol=0)
    y.sum().backward()
    for name, param in layer.experts.named_parameters():
        assert torch.equal(param.grad, torch.zeros_like(param)), name


@BOTH
@PATHS
@LEVELS
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_gives_an_empty_result(shake, family, experts, level, shape):
    layer = make_layer(shake, family, experts, level=level)
    y, routing = layer(torch.zeros(*shape, 16), torch.zeros(shape).bool(), Hints())
    assert y.shape == (*shape, 16)
    assert routing.gates.shape == routing.logits.shape == (*shape, 4)


@BOTH
@PATHS
@LEVELS
def test_samples_do_not_change_each_other_in_a_batch_of_three(shake, family, experts, level):
    layer = make_layer(shake, family, experts, level=level)
    x = randn(*MASK.shape, 16)
    y, routing = layer(x, MASK, Hints(prompt=PROMPT))
    for b in range(3):
        one = slice(b, b + 1)
        alone, its_routing = layer(x[one], MASK[one], Hints(prompt=PROMPT[one]))
        assert torch.equal(its_routing.gates != 0, routing.gates[one] != 0)
        torch.testing.assert_close(alone, y[one], atol=1e-5, rtol=0)


@BOTH
@PATHS
def test_the_layer_under_bf16_autocast_is_near_and_takes_the_same_routes(shake, family, experts):
    layer, x = make_layer(shake, family, experts), randn(*MASK.shape, 16)
    y, routing = layer(x, MASK, Hints())
    with torch.autocast("cpu", torch.bfloat16):
        rough, same = layer(x, MASK, Hints())
    # The loop adds the experts' outputs up in the dtype of x, the sorted layer in theirs.
    assert rough.dtype == (x.dtype if experts is Experts else torch.bfloat16)
    assert torch.equal(same.gates, routing.gates)
    torch.testing.assert_close(rough.float(), y, atol=0.05, rtol=0.05)
    assert not torch.equal(rough.float(), y)


# Routers


@CHOICES
@LEVELS
def test_gates_are_the_raw_top_probability_or_sum_to_one_and_zero_on_padding(
    shake, n_experts, k, level
):
    router = shake(TopKRouter(16, n_experts, top_k=k, level=level))
    routing = router(randn(*MASK.shape, 16), MASK, Hints(prompt=PROMPT))
    assert routing.gates.shape == routing.logits.shape == (*MASK.shape, n_experts)
    assert torch.equal(routing.gates[~MASK], torch.zeros(5, n_experts))
    probs = routing.logits[MASK].softmax(dim=-1)
    if k == 1:
        torch.testing.assert_close(routing.gates[MASK].sum(-1), probs.amax(-1))
    else:
        torch.testing.assert_close(routing.gates[MASK].sum(-1), torch.ones(10))
    chosen = (routing.gates[MASK] != 0).int()
    best = torch.zeros_like(chosen).scatter(-1, probs.argsort(-1, descending=True)[:, :k], 1)
    assert torch.equal(chosen, best)


def test_two_chosen_probabilities_are_rescaled_and_one_is_not():
    probs = torch.tensor([[[0.5, 0.1, 0.3, 0.1]]])
    assert routers.top_k_gates(probs, 1).tolist() == [[[0.5, 0, 0, 0]]]
    expected = torch.tensor([[[5 / 8, 0, 3 / 8, 0]]])
    torch.testing.assert_close(routers.top_k_gates(probs, 2), expected)
    torch.testing.assert_close(routers.top_k_gates(probs, 4), probs)


@LEVELS
def test_gates_stay_fp32_and_the_same_under_bf16_autocast(shake, level):
    router, x = shake(TopKRouter(16, 4, level=level)), randn(*MASK.shape, 16)
    plain = router(x, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x, MASK)
        rough = router(x.bfloat16(), MASK)
    for routing in (plain, cast, rough):
        assert routing.gates.dtype == routing.logits.dtype == torch.float32
    assert torch.equal(plain.logits, cast.logits)
    assert torch.equal(plain.gates, cast.gates)


@pytest.mark.parametrize("name", routers.ROUTERS)
@LEVELS
def test_a_router_decides_the_same_each_time_in_training_and_in_evaluation(shake, name, level):
    router, x = shake(routers.ROUTERS[name](16, 4, level=level)), randn(*MASK.shape, 16)
    hints = Hints(prompt=PROMPT, modality=torch.tensor([2, -1, 0]))
    first = router.train()(x, MASK, hints)
    torch.manual_seed(1)
    assert torch.equal(router(x, MASK, hints).gates, first.gates)
    assert torch.equal(router.eval()(x, MASK, hints).gates, first.gates)


@pytest.mark.parametrize("name", routers.ROUTERS)
@pytest.mark.parametrize("k", [1, 2])
def test_sums_to_one_is_declared_by_the_routers_whose_gates_do(shake, name, k):
    router = shake(routers.ROUTERS[name](16, 4, top_k=k))
    routing = router(randn(*MASK.shape, 16), MASK, Hints(modality=torch.tensor([2, -1, 0])))
    is_one = bool((routing.gates[MASK].sum(dim=-1) - 1).abs().max() < 1e-5)
    assert router.sums_to_one == is_one


def test_all_but_the_learned_router_are_frozen():
    frozen = {name: router.frozen for name, router in routers.ROUTERS.items()}
    assert frozen == {"modality": True, "topk": False, "random": True, "oracle": True}


@PATHS
@pytest.mark.parametrize("k", [1, 2])
def test_the_learned_router_gets_a_gradient_through_its_gates(shake, experts, k):
    layer = make_layer(shake, "phi", experts, k=k)
    layer(randn(*MASK.shape, 16), MASK, Hints())[0].sum().backward()
    assert layer.router.proj.weight.grad.abs().max() > 1e-3
    assert layer.router.proj.bias.grad.abs().max() > 1e-3


def test_modality_and_random_routers_choose_as_topk_does(shake):
    x, expected = randn(*MASK.shape, 16), shake(TopKRouter(16, 4))(randn(*MASK.shape, 16), MASK)
    for cls in (ModalityRouter, RandomRouter):
        assert torch.equal(shake(cls(16, 4))(x, MASK).gates, expected.gates)


def test_a_sequence_level_router_decides_once_a_sample_on_its_pooled_prompt(shake):
    router, x = shake(TopKRouter(16, 4, level="sequence")), randn(*MASK.shape, 16)
    gates = router(x, MASK, Hints(prompt=PROMPT)).gates
    by_token = shake(TopKRouter(16, 4))
    for b in range(3):
        pooled = x[b, PROMPT[b]].mean(dim=0)[None, None]
        decision = by_token(pooled, torch.ones(1, 1).bool()).gates[0, 0]
        for t in range(5):
            wanted = decision if MASK[b, t] else torch.zeros(4)
            assert torch.equal(gates[b, t] != 0, wanted != 0)
            torch.testing.assert_close(gates[b, t], wanted, atol=1e-6, rtol=0)
    chosen = {tuple((gates[b, 0] != 0).tolist()) for b in (0, 2)}
    assert len(chosen) == 2  # or nothing was tested


def test_without_a_prompt_hint_a_sequence_level_router_pools_all_real_tokens(shake):
    router, x = shake(TopKRouter(16, 4, level="sequence")), randn(*MASK.shape, 16)
    expected = router(x, MASK, Hints(prompt=MASK))
    assert torch.equal(router(x, MASK).logits, expected.logits)
    assert not torch.equal(router(x, MASK, Hints(prompt=PROMPT)).logits, expected.logits)


@pytest.mark.parametrize("what", ["answer tokens", "padding"])
def test_a_sequence_level_decision_does_not_see(shake, what):
    router, x = shake(TopKRouter(16, 4, level="sequence")), randn(*MASK.shape, 16)
    before = router(x, MASK, Hints(prompt=PROMPT))
    x[MASK & ~PROMPT if what == "answer tokens" else ~MASK] = 100.0
    after = router(x, MASK, Hints(prompt=PROMPT))
    assert torch.equal(before.gates, after.gates)
    assert torch.equal(before.logits, after.logits)


def test_a_previous_decision_is_kept_at_sequence_level_and_ignored_at_token_level(shake):
    x, new, real = randn(3, 5, 16), randn(3, 2, 16, seed=9), torch.ones(3, 2).bool()
    mask = torch.ones(3, 5).bool()
    for level in ("sequence", "token"):
        router = shake(TopKRouter(16, 4, level=level))
        before = router(x, mask)
        previous = Routing(before.gates[:, -1:], before.logits[:, -1:])
        after = router(new, real, Hints(previous=previous))
        if level == "sequence":
            assert torch.equal(after.gates, before.gates[:, :2])
            assert torch.equal(after.logits, before.logits[:, :2])
        else:
            assert torch.equal(after.gates, router(new, real).gates)


@LEVELS
def test_the_oracle_sends_a_sample_to_its_modality_and_an_unknown_one_everywhere(shake, level):
    router, x = shake(OracleRouter(16, 4, level=level)), randn(*MASK.shape, 16)
    gates = router(x, MASK, Hints(modality=torch.tensor([2, -1, 0]))).gates
    expected = torch.tensor([[0, 0, 1, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    assert torch.equal(gates, expected[:, None] * MASK[..., None])
    unknown = router(x, MASK, Hints()).gates
    assert torch.equal(unknown, torch.full((3, 5, 4), 0.25) * MASK[..., None])


def test_the_oracle_of_fewer_experts_shares_them_among_the_modalities(shake):
    router = shake(OracleRouter(16, 2))
    hints = Hints(modality=torch.tensor([0, 1, 3]))
    gates = router(randn(3, 1, 16), torch.ones(3, 1).bool(), hints).gates
    assert gates[:, 0].tolist() == [[1, 0], [0, 1], [0, 1]]


# Finding a router


def test_routers_are_found_by_name():
    for name, cls in routers.ROUTERS.items():
        assert get_router(name) is cls


OWN_ROUTER = """
import torch

import routers
from routers import Router

class First(Router):
    sums_to_one = True
    def gate(self, logits, mask, x):
        return torch.zeros_like(logits).index_fill(-1, torch.tensor([0]), 1.0)

class Other:
    pass

def function():
    pass
"""


def test_a_router_of_your_own_is_loaded_from_its_file_and_used(tmp_path, build, collate):
    path = tmp_path / "mine.py"
    path.write_text(OWN_ROUTER)
    cls = get_router(f"{path}:First")
    assert issubclass(cls, Router) and cls.__name__ == "First"
    model = build(moe={"router": f"{path}:First"})
    batch = collate([([1, 2, 3], [-100, -100, 3])])
    _, routings = model(batch.ids, batch.mask, batch.images)
    assert all(r.gates[..., 0].eq(1).all() and r.gates[..., 1:].eq(0).all() for r in routings)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best", "'best' is neither one of modality, topk, random, oracle nor FILE.py:Class"),
        ("", "neither one of"),
        ("missing.py:First", "neither one of"),
        ("{file}", "neither one of"),
        ("{folder}:First", "neither one of"),
        ("{file}:Absent", "no subclass of routers.Router named 'Absent'"),
        ("{file}:Other", "no subclass of routers.Router named 'Other'"),
        ("{file}:function", "no subclass of routers.Router named 'function'"),
        ("{file}:", "no subclass of routers.Router named ''"),
    ],
)
def test_a_router_that_is_none_is_refused_by_name(tmp_path, spec, message):
    path = tmp_path / "mine.py"
    path.write_text(OWN_ROUTER)
    spec = spec.format(file=path, folder=tmp_path)
    with pytest.raises(ValueError) as error:
        get_router(spec)
    assert message in str(error.value) and repr(spec) in str(error.value)


def test_a_router_without_a_gate_is_not_implemented():
    with pytest.raises(NotImplementedError):
        Router(16, 4)(randn(1, 2, 16), torch.ones(1, 2).bool())


# Losses


def routing_of(logits, k=1):
    return Routing(routers.top_k_gates(logits.softmax(dim=-1), k), logits)


def test_the_balancing_loss_is_one_when_balanced_and_e_at_collapse():
    mask = torch.ones(1, 4).bool()
    balanced = routing_of(50.0 * torch.eye(4)[None])
    collapsed = routing_of(50.0 * torch.eye(4)[[0, 0, 0, 0]][None])
    torch.testing.assert_close(load_balancing_loss(balanced, mask), torch.tensor(1.0))
    torch.testing.assert_close(load_balancing_loss(collapsed, mask), torch.tensor(4.0))


def test_the_balancing_loss_of_a_worked_example():
    probs = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])
    # Routed to experts 0, 1 and 1, 2: shares 1/4, 2/4, 1/4. Mean probabilities: 0.3, 0.45, 0.25.
    loss = load_balancing_loss(routing_of(probs.log(), k=2), torch.ones(1, 2).bool())
    torch.testing.assert_close(loss, torch.tensor(3 * (0.3 / 4 + 0.45 / 2 + 0.25 / 4)))


def test_the_z_loss_of_a_worked_example():
    logits = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [math.log(3), -50.0]]])
    loss = router_z_loss(routing_of(logits), torch.ones(1, 3).bool())
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2 + math.log(3) ** 2) / 3
    torch.testing.assert_close(loss, torch.tensor(expected))


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
def test_losses_ignore_padding_and_reach_the_router(shake, loss):
    router, x = shake(TopKRouter(16, 4)), randn(*MASK.shape, 16)
    routing = router(x, MASK)
    with_padding = loss(routing, MASK)
    real = Routing(routing.gates[MASK][None], routing.logits[MASK][None])
    torch.testing.assert_close(with_padding, loss(real, torch.ones(1, 10).bool()))
    with_padding.backward()
    x[~MASK] = 100.0
    assert torch.equal(loss(router(x, MASK), MASK), with_padding)
    assert router.proj.weight.grad.abs().max() > 1e-4


def attributes(module):
    """Every name a module keeps, and the tensors among them that are no parameters."""
    names, tensors = {}, []
    for prefix, part in module.named_modules():
        names[prefix] = sorted(vars(part)), sorted(part._buffers)
        tensors += [n for n, value in vars(part).items() if isinstance(value, (tuple, list))]
        tensors += [n for n, value in vars(part).items() if torch.is_tensor(value)]
    return names, tensors


@BOTH
@PATHS
def test_layer_and_losses_return_values_and_leave_nothing_on_modules(shake, family, experts):
    layer = make_layer(shake, family, experts)
    before = attributes(layer)
    assert before[1] == ["ffn"]  # what one expert computes, without weights
    assert all(param.is_meta for param in layer.experts.ffn[0].parameters())
    _, routing = layer(randn(*MASK.shape, 16), MASK, Hints())
    for loss in (load_balancing_loss, router_z_loss):
        assert loss(routing, MASK).shape == ()
    assert attributes(layer) == before


# From dense to sparse


def dense_and_sparse(shake, family, k, start, router_class=TopKRouter, level="token"):
    dense = shake(FAMILIES[family](16, 24))
    router = shake(router_class(16, 4, top_k=k, level=level), seed=1)
    return dense, upcycle(copy.deepcopy(dense), router, 4, start)


@BOTH
@LEVELS
@pytest.mark.parametrize("router_class", [TopKRouter, ModalityRouter, RandomRouter, OracleRouter])
@pytest.mark.parametrize("k", [1, 2])
def test_the_preserving_start_computes_the_dense_ffn(shake, family, level, router_class, k):
    dense, sparse = dense_and_sparse(shake, family, k, "preserving", router_class, level)
    x = randn(*MASK.shape, 16)
    y, routing = sparse(x, MASK, Hints(modality=torch.tensor([0, 3, -1])))
    assert (routing.gates[MASK] != 0).any(dim=-1).all()
    torch.testing.assert_close(y[MASK], dense(x)[MASK], atol=1e-5, rtol=0)


@BOTH
def test_the_preserving_start_halves_both_parts_or_begins_experts_at_zero(shake, family):
    last = {"phi": "fc2", "stablelm": "down"}[family]
    for k, share in ((2, 0.5), (1, 0.0)):
        dense, sparse = dense_and_sparse(shake, family, k, "preserving")
        for name, trained in dense.named_parameters():
            of_meta = 1 - share if name.startswith(last) else 1
            of_experts = share if name.startswith(last) else 1
            assert torch.equal(sparse.meta.get_parameter(name), trained * of_meta)
            for expert in sparse.experts.get_parameter(name):
                assert torch.equal(expert, trained * of_experts)


@BOTH
def test_the_preserving_start_holds_without_meta_where_gates_add_up_to_one(shake, family):
    dense = shake(FAMILIES[family](16, 24))
    x, before = randn(*MASK.shape, 16), copy.deepcopy(dense)
    router = shake(TopKRouter(16, 4, top_k=2))
    sparse = upcycle(dense, router, 4, "preserving", meta=False)
    y, _ = sparse(x, MASK, Hints())
    torch.testing.assert_close(y[MASK], before(x)[MASK], atol=1e-5, rtol=0)


@BOTH
@pytest.mark.parametrize("kind", ["top-1", "top-2", "soft"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_sorted_layer_equals_the_loop_in_output_and_gradients(shake, family, kind, rank):
    loop = Experts(FAMILIES[family](16, 24), 4)
    if rank:
        add_to_ffn(loop, rank)
    shake(loop)
    assert all(param.any() for param in loop.parameters())  # lora_b too
    fast = copy.deepcopy(loop)
    use_sorted_experts(fast)
    assert type(fast) is SortedExperts and type(loop) is Experts
    gates = torch.rand(30, 4, generator=torch.Generator().manual_seed(1))
    if kind != "soft":
        gates = top_k_gates(gates[None], int(kind[-1]))[0]
    gates[:, 2] = 0  # an expert without tokens
    gates[5] = 0  # a token without experts
    found = []
    for experts in (loop, fast):
        x, g = randn(30, 16).requires_grad_(), gates.clone().requires_grad_()
        y = experts(x, g)
        assert torch.equal(y[5], torch.zeros(16))
        y.square().sum().backward()
        grads = {name: param.grad for name, param in experts.named_parameters()}
        assert any("lora_b" in name for name in grads) == (rank > 0)
        for name, grad in grads.items():
            assert torch.equal(grad[2], torch.zeros_like(grad[2])), name  # zero, not None
            assert all(grad[e].any() for e in (0, 1, 3)), name
        assert torch.equal(x.grad[5], torch.zeros(16)) and not g.grad[gates == 0].any()
        found.append({"y": y, "x": x.grad, "gates": g.grad} | grads)
    for name, expected in found[0].items():
        assert expected.any(), name
        assert (found[1][name] - expected).norm() <= 1e-6 * expected.norm(), name


def test_use_sorted_experts_changes_every_sparse_layer_and_copies_still_work(build):
    model = build(moe={"layers": (0, 1, 2)})
    ids = torch.arange(6)[None]
    inputs = ids, torch.ones(1, 6).bool(), torch.zeros(0, 3, 32, 32)
    before, _ = model(*inputs)
    names = [name for name, _ in model.named_parameters()]
    use_sorted_experts(model)
    twin = copy.deepcopy(model)
    for changed in (model, twin):
        layers = [block.mlp.experts for block in changed.decoder.blocks]
        assert [type(layer) for layer in layers] == [SortedExperts] * 3
        assert [name for name, _ in changed.named_parameters()] == names
        torch.testing.assert_close(changed(*inputs)[0], before, atol=1e-5, rtol=0)
    with torch.no_grad():
        for param in twin.decoder.blocks[1].mlp.experts.parameters():
            param.zero_()
    assert (twin(*inputs)[0] - before).abs().max() > 1e-3  # its experts are its own
    torch.testing.assert_close(model(*inputs)[0], before, atol=1e-5, rtol=0)
    use_sorted_experts(twin, Experts)  # and back
    assert all(type(block.mlp.experts) is Experts for block in twin.decoder.blocks)


def test_the_layer_of_early_tinymed_mixes_experts_with_a_dense_ffn(build, shake):
    model = build(moe={"meta": False})
    add_residual(model)
    moe, x = shake(model).decoder.blocks[0].mlp, randn(2, 5, 32)
    assert type(moe) is ResidualMoE and has_residual(n for n, _ in model.named_parameters())
    y, routing = moe(x, torch.ones(2, 5).bool(), Hints())
    share = moe.coefficient(x).softmax(dim=-1)
    experts = moe.experts(x.flatten(0, 1), routing.gates.flatten(0, 1)).view_as(x)
    expected = share[..., :1] * experts + share[..., 1:] * moe.dense(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@BOTH
def test_experts_that_begin_at_zero_still_learn(shake, family):
    _, sparse = dense_and_sparse(shake, family, 1, "preserving")
    sparse(randn(8, 9, 16), torch.ones(8, 9).bool(), Hints())[0].square().sum().backward()
    last = {"phi": "fc2", "stablelm": "down"}[family]
    grads = sparse.experts.get_parameter(f"{last}.weight").grad
    assert (grads.flatten(1).abs().amax(dim=1) > 0).any()


@BOTH
@pytest.mark.parametrize("k", [1, 2])
def test_the_released_start_adds_the_gates_to_one(shake, family, k):
    dense, sparse = dense_and_sparse(shake, family, k, "released")
    x = randn(*MASK.shape, 16)
    y, routing = sparse(x, MASK, Hints())
    top_p = routing.logits.softmax(dim=-1).amax(dim=-1, keepdim=True)
    times = 1 + top_p if k == 1 else torch.full_like(top_p, 2.0)
    torch.testing.assert_close(y[MASK], (times * dense(x))[MASK], atol=1e-5, rtol=0)


@BOTH
def test_experts_are_copies_in_storage_of_their_own(shake, family):
    dense, sparse = dense_and_sparse(shake, family, 2, "released")
    for name, trained in dense.named_parameters():
        stacked = sparse.experts.get_parameter(name)
        meta = sparse.meta.get_parameter(name)
        assert stacked.shape == (4, *trained.shape) and stacked.is_contiguous()
        assert stacked.untyped_storage().data_ptr() != meta.untyped_storage().data_ptr()
        assert stacked.untyped_storage().nbytes() == 4 * trained.untyped_storage().nbytes()
        with torch.no_grad():
            stacked[1] += 1
        for e in (0, 2, 3):
            assert torch.equal(stacked[e], trained)
        assert torch.equal(meta, trained)
        assert stacked.requires_grad


@pytest.mark.parametrize(("family", "moe_fields"), [
    (family, {"top_k": k, "router": router, "level": level})
    for family in FAMILIES for k in (1, 2)
    for router, level in (("topk", "token"), ("modality", "sequence"), ("oracle", "token"))
])  # fmt: skip
def test_the_model_of_phase_3_begins_with_the_logits_of_phase_2(build, collate, family, moe_fields):
    dense = build(family)
    sparse = copy.deepcopy(dense)
    weights = {"weight": randn(4, 32, seed=5), "bias": randn(4, seed=6)}
    make_sparse(sparse, MoEConfig(**moe_fields), weights)
    ids = [5, *[IMAGE_ID] * 4, 9, 11, 12]
    batch = collate([(ids, [-100] * 6 + ids[6:]), (ids[5:], ids[5:])], modality=[3, -1])
    hints = Hints(prompt=batch.prompt(), modality=batch.modality)
    logits = []
    for model in (dense, sparse):
        hidden, routings = model(batch.ids, batch.mask, batch.images, hints)
        logits.append(model.decoder.lm_head(hidden)[batch.mask])
    assert len(routings) == 2  # of three blocks, those with index 0 and 2
    assert logits[0].std() > 0.5
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    for layer in (0, 2):
        router = sparse.decoder.blocks[layer].mlp.router
        assert torch.equal(router.proj.weight, weights["weight"])
        assert router.proj.weight.data_ptr() != weights["weight"].data_ptr()
    dense_loss, sparse_loss = dense.loss(batch), sparse.loss(batch)
    torch.testing.assert_close(sparse_loss.total, dense_loss.total, atol=1e-4, rtol=0)


class Priced(TopKRouter):
    """Its penalty is the mean gate of expert 0 over the real tokens."""

    def penalty(self, gates, logits, mask, x):
        assert gates.shape == logits.shape == (*mask.shape, 4) and x.shape[:2] == mask.shape
        return gates[..., 0].sum() / mask.sum()


@LEVELS
def test_a_penalty_is_computed_in_training_only(shake, level):
    router, x = shake(Priced(16, 4, level=level)), randn(*MASK.shape, 16)
    assert router.eval()(x, MASK, Hints(prompt=PROMPT)).penalty == 0.0
    routing = router.train()(x, MASK, Hints(prompt=PROMPT))
    real = MASK if level == "token" else torch.ones(3, 1)
    gates = routing.gates if level == "token" else routing.gates.amax(dim=1, keepdim=True)
    torch.testing.assert_close(routing.penalty, gates[..., 0].sum() / real.sum())
    routing.penalty.backward()
    assert router.proj.weight.grad.any()
