"""Gates and losses equal their definitions, and padding has no part in them.

python -m pytest tests/test_routers.py
"""

import pytest
import torch

from routers import (
    ROUTERS,
    Hints,
    OracleRouter,
    Router,
    Routing,
    TopKRouter,
    get_router,
    load_balancing_loss,
    router_z_loss,
    top_k_gates,
)
from tests import reference
from tests.conftest import build, collate, randn, shake

LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
# Three samples: no padding, padded on the left, on the right. The second prompt covers padding.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
X = randn(3, 5, 16)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@LEVELS
@pytest.mark.parametrize(("n_experts", "k"), [(4, 1), (4, 2), (4, 4), (1, 1)])
@pytest.mark.parametrize("name", ["topk", "modality", "random"])
def test_gates_are_the_k_largest_probabilities_and_0_on_padding(name, level, n_experts, k):
    router = shake(ROUTERS[name](16, n_experts, top_k=k, level=level))
    gates, logits, penalty = router(X, MASK, Hints(prompt=PROMPT))
    expected = reference.router_gates(router, X, MASK, PROMPT)
    assert torch.equal(gates != 0, expected != 0)
    assert (gates != 0).sum(dim=-1).tolist() == (k * MASK).tolist()
    close(gates, expected)
    assert logits.shape == (3, 5, n_experts) and penalty == 0.0
    close(top_k_gates(logits.softmax(dim=-1), k)[MASK], expected[MASK])


def test_what_each_router_declares():
    """frozen, needs, sums_to_one (k = 1, k = 2), causal, batch_invariant, at_most_k, may_drop."""
    found = {"": Router(16, 4), **{name: cls(16, 4) for name, cls in ROUTERS.items()}}
    learned = (False, (), False, True, True, True, True, False)
    assert {name: (r.frozen, r.needs, type(r)(16, 4, 1).sums_to_one, r.sums_to_one, r.causal,
                   r.batch_invariant, r.at_most_k, r.may_drop) for name, r in found.items()} == {
        "": (False, (), False, False, True, True, True, False),
        "topk": learned,
        "modality": (True, *learned[1:]),
        "random": (True, *learned[1:]),
        "oracle": (True, ("modality",), True, True, True, True, False, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
@LEVELS
def test_a_router_that_says_so_gives_gates_that_sum_to_one_and_always_the_same(name, level):
    for k in (1, 2):
        router = shake(ROUTERS[name](16, 4, top_k=k, level=level)).train()
        hints = Hints(prompt=PROMPT, modality=torch.tensor([2, -1, 0]))
        gates = router(X, MASK, hints).gates
        assert torch.equal(router.eval()(X, MASK, hints).gates, gates)
        is_one = (gates[MASK].sum(dim=-1) - 1).abs().max() < 1e-5
        assert router.sums_to_one == is_one


@LEVELS
def test_gates_stay_fp32_and_the_same_under_bf16_autocast(level):
    router = shake(TopKRouter(16, 4, level=level))
    plain = router(X, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        cast, rough = router(X, MASK), router(X.bfloat16(), MASK)
    assert torch.equal(plain.logits, cast.logits) and torch.equal(plain.gates, cast.gates)
    assert rough.gates.dtype == rough.logits.dtype == torch.float32
    close(rough.logits, router(X.bfloat16().float(), MASK).logits)


def test_a_sequence_level_decision_is_of_the_prompt_and_of_all_real_tokens_without_one():
    router = shake(TopKRouter(16, 4, level="sequence"))
    before = router(X, MASK, Hints(prompt=PROMPT))
    noisy = torch.where((MASK & PROMPT)[..., None], X, 100.0)
    after = router(noisy, MASK, Hints(prompt=PROMPT))
    assert torch.equal(before.gates, after.gates) and torch.equal(before.logits, after.logits)
    assert len({tuple((gates != 0).tolist()) for gates in before.gates[[0, 2], 0]}) == 2
    close(router(X, MASK).gates, reference.router_gates(router, X, MASK, MASK))
    nothing = router(X, MASK, Hints(prompt=PROMPT & False)).logits  # the mean of no positions: 0
    close(nothing, router.proj.bias.expand(3, 5, 4))


def test_a_previous_decision_is_kept_at_sequence_level_and_ignored_at_token_level():
    x, real = randn(3, 2, 16, seed=9), torch.ones(3, 2).bool()
    for level in ("sequence", "token"):
        router = shake(TopKRouter(16, 4, level=level))
        before = router(X, MASK[:1].expand(3, 5))
        previous = Routing(before.gates[:, -1:], before.logits[:, -1:], 7.0)
        after = router(x, real, Hints(previous=previous))
        expected = before if level == "sequence" else router(x, real)
        assert torch.equal(after.gates, expected.gates[:, :2])
        assert torch.equal(after.logits, expected.logits[:, :2])
        assert after.penalty == 0.0


@LEVELS
def test_the_oracle_sends_a_sample_to_its_modality_and_an_unknown_one_everywhere(level):
    router = shake(OracleRouter(16, 4, level=level))
    gates = router(X, MASK, Hints(modality=torch.tensor([2, -1, 0]))).gates
    expected = torch.tensor([[0, 0, 1, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    assert torch.equal(gates, expected[:, None] * MASK[..., None])
    assert torch.equal(router(X, MASK, Hints()).gates, 0.25 * MASK[..., None].expand(3, 5, 4))
    router = shake(OracleRouter(16, 2, level=level))  # fewer experts share the modalities
    gates = router(X, MASK, Hints(modality=torch.tensor([0, 3, 2]))).gates
    expected = torch.tensor([[1, 0], [0, 1], [1, 0]])
    assert torch.equal(gates, expected[:, None] * MASK[..., None])


class Own(Router):
    """NaN on padding; its penalty is the mean gate of expert 0 over real tokens."""

    def gate(self, logits, mask, x):
        assert logits.shape == (*mask.shape, 4) and x.shape == (*mask.shape, 16)
        return logits.softmax(dim=-1).masked_fill(~mask[..., None], float("nan"))

    def penalty(self, gates, logits, mask, x):
        assert not gates[~mask].any()
        return gates[..., 0].sum() / mask.sum()


@LEVELS
def test_a_penalty_is_computed_in_training_only_and_padding_never_counts(level):
    router, hints = shake(Own(16, 4, level=level)), Hints(prompt=PROMPT)
    evaluated = router.eval()(X, MASK, hints)
    assert evaluated.penalty == 0.0 and not evaluated.gates[~MASK].any()
    routing = router.train()(X, MASK, hints)
    gates = routing.gates[MASK] if level == "token" else routing.gates.amax(dim=1)
    close(routing.penalty, gates[:, 0].mean())
    routing.penalty.backward()
    assert router.proj.weight.grad.any()


def test_a_router_without_a_gate_is_not_implemented_and_has_no_penalty():
    router = Router(16, 4)
    assert (router.top_k, router.level) == (2, "token")
    assert router.penalty(X, X, MASK, X) == 0.0 and router.update(torch.ones(4)) is None
    with pytest.raises(NotImplementedError):
        router(X, MASK)


FILE = """
import torch
from routers import Router

class First(Router):
    def gate(self, logits, mask, x):
        return torch.zeros_like(logits).index_fill(-1, torch.tensor([0]), 1.0)

class Other:
    pass

def function():
    pass
"""


def test_routers_are_found_by_name_or_loaded_from_a_file(tmp_path):
    assert {name: get_router(name) for name in ROUTERS} == ROUTERS
    assert set(ROUTERS) == {"modality", "topk", "random", "oracle"}
    (tmp_path / "mine.py").write_text(FILE)
    cls = get_router(f"{tmp_path}/mine.py:First")
    assert issubclass(cls, Router) and cls.__name__ == "First"
    model = build(moe={"router": f"{tmp_path}/mine.py:First"})
    batch = collate([([1, 2, 3], [-100, -100, 3])])
    _, routings = model(batch.ids, batch.mask, batch.images)
    assert [r.gates.tolist() for r in routings] == [[[[1, 0, 0, 0]] * 3]] * 2


NEITHER, NO_CLASS = "neither one of modality, topk, random, oracle nor FILE.py:Class", "no subclass"


@pytest.mark.parametrize(("spec", "message"), [
    ("best", NEITHER), ("", NEITHER), ("missing.py:First", NEITHER), ("FILE.py", NEITHER),
    ("FILE.txt:First", NEITHER), ("FOLDER.py:First", NEITHER),
    ("FILE.py:Absent", NO_CLASS), ("FILE.py:Other", NO_CLASS), ("FILE.py:function", NO_CLASS),
    ("FILE.py:", NO_CLASS), ("FILE.py:Router", NO_CLASS),
])  # fmt: skip
def test_a_router_that_is_none_is_refused_by_name(tmp_path, spec, message):
    (tmp_path / "FILE.py").write_text(FILE)
    (tmp_path / "FILE.txt").write_text(FILE)
    (tmp_path / "FOLDER.py").mkdir()
    spec = spec if spec in ("best", "") else f"{tmp_path}/{spec}"
    with pytest.raises(ValueError, match=message) as error:
        get_router(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_losses_are_their_equations_over_real_tokens_and_reach_the_router(k):
    router = shake(TopKRouter(16, 4, top_k=k))
    routing = router(X.masked_fill(~MASK[..., None], 100.0), MASK)
    gates, logits = routing.gates[MASK], routing.logits[MASK]
    for loss, expected in (
        (load_balancing_loss(routing, MASK), reference.load_balancing_loss(gates, logits)),
        (router_z_loss(routing, MASK), reference.z_loss(logits)),
    ):
        close(loss, expected)
        into = list(router.parameters())
        found = torch.autograd.grad(loss, into, retain_graph=True)
        close(found, torch.autograd.grad(expected, into, retain_graph=True))
        assert found[0].abs().max() > 1e-4


def test_the_balancing_loss_is_one_when_balanced_e_at_collapse_and_zero_without_any_routed():
    mask = torch.ones(1, 4).bool()
    for experts, expected in (([0, 1, 2, 3], 1.0), ([0, 0, 0, 0], 4.0), ([0], 4.0)):
        routing = Routing(torch.eye(4)[None, experts], 50.0 * torch.eye(4)[None, experts])
        close(load_balancing_loss(routing, mask[:, : len(experts)]), torch.tensor(expected))
    idle = Routing(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 1e3))
    assert load_balancing_loss(idle, mask) == 0
    assert router_z_loss(idle, mask).item() == pytest.approx(1002774.5)  # exp would overflow
