"""Every check of the contract fails on some router with a bug, and none on a correct one.

python -m pytest course/tests/test_contract.py
"""

import pytest
import torch
import torch.nn.functional as F

import moe
from course.tests.test_router import CHECKS, LEVELS, Case
from routers import ROUTERS, Router, Routing, TopKRouter, load_balancing_loss, top_k_gates

museum = pytest.importorskip("course.tests.test_museum", reason="its answers are withheld")
OF_THE_LAYER = "the_layer_matches_its_definition"


def top_k(router, logits):
    return top_k_gates(logits.softmax(dim=-1), router.top_k)


def gate(function):
    return {"gate": lambda self, logits, mask, x: function(self, logits)}


def penalty(function):
    return {"penalty": lambda self, gates, logits, mask, x: function(gates, logits, mask)}


def own_forward(self, x, mask, hints=None):
    logits = self.proj(x).float()
    return Routing(top_k(self, logits).masked_fill(~mask[..., None], 0.0), logits)


def turn(logits):
    """(T, E): 1 where the position modulo E is the expert."""
    return torch.eye(logits.shape[-1])[torch.arange(logits.shape[1]) % logits.shape[-1]]


# A check, and what makes a top-k router that it has to fail on; the museum has the others.
BROKEN = [
    ("gates_are_fp32_of_the_right_shape", gate(lambda r, z: top_k(r, z.double()))),
    ("gates_are_finite_and_not_negative", gate(lambda r, z: z)),
    ("no_token_is_routed_to_more_than_k_experts", gate(lambda r, z: z.softmax(dim=-1))),
    ("no_token_is_routed_to_more_than_k_experts",  # with equal logits, where all reach the k-th
     gate(lambda r, z: z.softmax(dim=-1) * (z >= z.topk(r.top_k).values[..., -1:]))),
    ("every_real_token_is_routed_to_an_expert",
     gate(lambda r, z: F.threshold(top_k(r, z), 0.7, 0.0))),
    ("gates_sum_to_one_where_declared", {"sums_to_one": True}),  # at k = 1 it is a probability
    ("a_single_token_or_none_works",
     penalty(lambda g, z, mask: (z[mask] - z[mask].mean(dim=0)).square().sum() / (mask.sum() - 1))),
    ("one_expert_and_all_experts_work",  # with k = E there is no next best
     gate(lambda r, z: F.relu(z - z.topk(r.top_k + 1).values[..., -1:]))),
    ("large_and_equal_logits_give_finite_values",
     gate(lambda r, z: top_k_gates(z.exp() / z.exp().sum(dim=-1, keepdim=True), r.top_k))),
    ("autocast_changes_nothing", {"forward": own_forward}),
    ("padding_on_either_side_gives_the_same_gates", gate(lambda r, z: top_k(r, z + 3 * turn(z)))),
    ("decoding_token_by_token_gives_the_same_gates", gate(lambda r, z: top_k(r, z.cumsum(dim=1)))),
    ("generation_works_or_is_refused", gate(lambda r, z: top_k(r, z.cumsum(dim=1)))),
    ("permuting_the_experts_permutes_the_gates", gate(lambda r, z: top_k(r, z + 2 * turn(z)[0]))),
    ("the_penalty_is_a_finite_scalar", penalty(lambda g, z, mask: z.logsumexp(dim=-1) * mask)),
    ("the_penalty_is_not_smaller_at_collapse_than_at_balance",
     penalty(lambda g, z, mask: -load_balancing_loss(Routing(g, z), mask))),
    ("the_balance_loss_is_1_at_balance_and_e_at_collapse", gate(lambda r, z: top_k(r, -z))),
    ("update_changes_buffers_only", {"update": lambda self, load: self.proj.bias.data.sub_(load)}),
]  # fmt: skip


class Sinkhorn(Router):
    """Chooses by logits balanced over the real tokens of the batch; the gates are sigmoids."""

    causal = batch_invariant = False

    def gate(self, logits, mask, x):
        plan, padding = logits, ~mask[..., None]
        for _ in range(5):
            plan = plan.masked_fill(padding, float("-inf"))
            total = plan.flatten(0, 1).logsumexp(dim=0)  # (E,), -inf if there are no tokens
            plan = (plan - total.clamp(min=-1e9)).masked_fill(padding, 0.0).log_softmax(dim=-1)
        return logits.sigmoid() * (top_k(self, plan) != 0)


def failing(cls, checks, monkeypatch, level="token"):
    monkeypatch.setitem(ROUTERS, "mine", cls)
    return museum.failed(Case("mine", level), *checks)


@pytest.mark.parametrize(("check", "body"), BROKEN, ids=[check for check, _ in BROKEN])
def test_the_named_check_fails_on_a_broken_router(check, body, monkeypatch):
    assert failing(type("Broken", (TopKRouter,), body), {check}, monkeypatch).keys() == {check}


def test_the_layer_fails_its_check_if_its_output_is_not_its_definition(monkeypatch):
    forward = moe.Experts.forward
    monkeypatch.setattr(moe.Experts, "forward", lambda *args: 1.01 * forward(*args))
    (message,) = failing(TopKRouter, {OF_THE_LAYER}, monkeypatch).values()
    assert "meta(x) + sum over e of gates[e]" in message


def test_every_check_fails_on_some_router():
    named = {OF_THE_LAYER, *(answer.check for answer in museum.ANSWERS.values())}
    assert {c.__name__ for c in CHECKS} == named | {check for check, _ in BROKEN}


@pytest.mark.parametrize("level", LEVELS)
def test_no_check_fails_on_a_sound_router_that_needs_the_whole_batch(level, monkeypatch):
    checks = {c.__name__ for c in CHECKS} - {museum.IN_A_PROCESS}  # it needs a router with a file
    assert len(checks) == 30 and failing(Sinkhorn, checks, monkeypatch, level) == {}
