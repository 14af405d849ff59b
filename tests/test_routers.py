"""Gates and losses equal their definitions, and padding has no part in them."""

import pytest
import torch

import routers
from routers import ROUTERS, Hints, OracleRouter, Router, Routing, TopKRouter, get_router
from tests import reference
from tests.conftest import LEVELS, build, close, collate, randn, shake

# Three samples: no padding, padded on the left, on the right. The third prompt is all padding.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
X = randn(3, 5, 16)


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
    with torch.autocast("cpu", torch.bfloat16):  # in fp32 all the same
        assert torch.equal(router(X, MASK, Hints(prompt=PROMPT)).gates, gates)
    assert logits.shape == (3, 5, n_experts) and penalty == 0.0
    assert router.frozen is (name != "topk") and router.sums_to_one is (k > 1)


@LEVELS
@pytest.mark.parametrize(("modality", "expected"), [
    ([2, -1, 0], [[0, 0, 1, 0], [0.25] * 4, [1, 0, 0, 0]]), (None, [[0.25] * 4] * 3),
    ([0, 3, 2], [[1, 0], [0, 1], [1, 0]]),  # fewer experts share the modalities
])  # fmt: skip
def test_the_oracle_sends_a_sample_to_its_modality_or_everywhere(level, modality, expected):
    router = shake(OracleRouter(16, len(expected[0]), level=level))
    gates = router(X, MASK, Hints(modality=modality and torch.tensor(modality))).gates
    assert torch.equal(gates, torch.tensor(expected)[:, None] * MASK[..., None])
    assert router.frozen and router.sums_to_one


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
    later = Own(16, 4, level="once")(X, MASK, hints._replace(first=routing))
    assert later is routing  # its penalty counts in each block, as those of others do


FILE = """
import torch
from routers import Router

class First(Router):
    needs = ("ids",)

    def gate(self, logits, mask, x, ids):
        return torch.nn.functional.one_hot(ids % 4, 4).float()
"""


def test_routers_are_found_by_name_or_loaded_from_a_file(tmp_path):
    assert {name: get_router(name) for name in ROUTERS} == ROUTERS and Router(16, 4).top_k == 2
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    model, batch = build(moe={"router": f"{file}:First"}), collate([([1, 2, 3], [-100, -100, 3])])
    _, routings = model(batch.ids, batch.mask, batch.images)
    assert [r.gates.argmax(dim=-1).tolist() for r in routings] == [[[1, 2, 3]]] * 2
    for spec in ("best", "missing.py:First", str(file), f"{file}:Absent", f"{file}:Router"):
        with pytest.raises(ValueError, match=f"^'{spec}'(: the file has no subclass| is neither)"):
            get_router(spec)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_losses_are_their_equations_over_real_tokens_reach_the_router_and_do_not_overflow(k):
    router = shake(TopKRouter(16, 4, top_k=k))
    routing = router(X.masked_fill(~MASK[..., None], 100.0), MASK)
    gates, logits = routing.gates[MASK], routing.logits[MASK]
    for loss, expected in (
        (routers.load_balancing_loss(routing, MASK), reference.load_balancing_loss(gates, logits)),
        (routers.router_z_loss(routing, MASK), reference.z_loss(logits))):  # fmt: skip
        close(loss, expected)
        found, exact = (torch.autograd.grad(value, [*router.parameters()], retain_graph=True)
                        for value in (loss, expected))  # fmt: skip
        close(found, exact)
        assert found[0].abs().max() > 1e-4
    mask = torch.ones(1, 4).bool()
    for experts, expected in (([0, 1, 2, 3], 1.0), ([0, 0, 0, 0], 4.0)):
        routing = Routing(torch.eye(4)[None, experts], 50.0 * torch.eye(4)[None, experts])
        close(routers.load_balancing_loss(routing, mask), torch.tensor(expected))
    idle = Routing(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 1e3))
    assert routers.load_balancing_loss(idle, mask) == 0
    assert routers.router_z_loss(idle, mask).item() == pytest.approx(1002774.5)  # exp overflows
