"""What every router has to keep, part 3: the penalty, the update and what is saved."""

import pytest
import torch
from contract import Case, ask, changed, competes, listens, same, state, unevenly, usual

from routers import load_balancing_loss


def a_penalty_is_one_finite_number(case: Case) -> None:
    penalty = torch.as_tensor(usual(case.router().train()).penalty)
    assert penalty.shape == (), f"The penalty has shape {tuple(penalty.shape)}, not ()."
    assert penalty.isfinite(), "The penalty is not finite."


def a_penalty_asked_twice_is_the_same(case: Case) -> None:
    router = case.router().train()
    before = state(router)
    first, second = usual(router), usual(router)
    assert torch.equal(*(torch.as_tensor(r.penalty) for r in (first, second))), (
        "The same penalty asked twice differs: what is kept from one step to the next?"
    )
    assert torch.equal(first.gates, second.gates), "Asked twice in training, the gates differ."
    assert not (names := changed(before, router)), (
        f"gate or penalty changed {names}: under activation checkpointing they run twice a step. "
        "What is to be counted comes to `update`."
    )


def a_penalty_teaches(case: Case) -> None:
    router = case.router().train()
    penalty = usual(router).penalty
    if case.cls.frozen or not torch.is_tensor(penalty) or penalty == 0:
        pytest.skip("there is no penalty to learn from")
    assert penalty.requires_grad, "The penalty has no gradient: it counts, and counts are steps."
    penalty.backward()
    slopes = [p.grad.abs().max() for p in router.parameters() if p.grad is not None]
    assert slopes and max(slopes) > 1e-6 * penalty.abs(), (
        "The gradient of the penalty is 0 in every parameter."
    )


def collapse_costs_no_less_than_balance(case: Case) -> None:
    for k in (1, 2):
        router = case.reader(k=k).train()
        balanced = 10 * torch.eye(4)[:, None].expand(4, 3, 4)  # each sample an expert of its own
        prices = [
            torch.as_tensor(ask(router, x).penalty).item()
            for x in (balanced, balanced[:1].expand(4, 3, 4))
        ]
        assert prices[1] >= prices[0] - 1e-5, (
            f"All on one expert costs {prices[1]:.3f}, an even load {prices[0]:.3f}."
        )


def the_balance_loss_is_1_at_balance_and_e_at_collapse(case: Case) -> None:
    if not listens(case) or competes(case) or not case.cls.at_most_k:
        pytest.skip("the k likeliest experts need not be those visited")
    everyone, router = torch.ones(4, 3).bool(), case.reader(k=1)
    balanced = 50 * torch.eye(4)[:, None].expand(4, 3, 4)
    for x, wanted in ((balanced, 1.0), (balanced[:1].expand(4, 3, 4), 4.0)):
        loss = load_balancing_loss(ask(router, x), everyone).item()
        assert abs(loss - wanted) < 1e-3, f"load_balancing_loss is {loss:.3f}, not {wanted}."


def an_update_changes_buffers_only(case: Case) -> None:
    router = case.router()
    before = dict(router.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    unevenly(router, times=3)
    for name, param in router.named_parameters():
        assert torch.equal(param, values[name]), f"`update` changed the parameter {name}."


def an_update_moves_choices_and_not_weights(case: Case) -> None:
    router = case.router(k=4)
    before = usual(router).gates
    unevenly(router)
    after = usual(router).gates
    assert after.isfinite().all() and (after >= 0).all(), "After updates a gate is negative or NaN."
    kept = ((before != 0) == (after != 0)).all(dim=-1)
    assert same(before[kept], after[kept]), (
        "`update` changed the gates of tokens that visit the experts they visited before: a bias "
        "of the selection must not reach the weights of the experts."
    )


def all_that_counts_is_in_the_state_dict(case: Case) -> None:
    old, new = case.router().train(), case.router(seed=1)
    usual(old)
    unevenly(old)
    new.load_state_dict(old.state_dict())
    assert torch.equal(usual(old.eval()).gates, usual(new).gates), (
        "A router that was saved and loaded decides otherwise: keep what changes in a buffer, and "
        "change it in place."
    )
    first, second = (torch.as_tensor(usual(r.train()).penalty) for r in (old, new))
    assert torch.equal(first, second), "A router that was saved and loaded has another penalty."
