"""The router contract, part 3: the penalty, the update and the state that is saved."""

import pytest
import torch

from course.tests.contract import (
    Case,
    changed,
    copy_state,
    route,
    route_samples,
    same_gates,
    tokens_compete,
    update_with_uneven_load,
    uses_logits,
)
from routers import load_balancing_loss


def the_penalty_is_a_finite_scalar(case: Case) -> None:
    penalty = torch.as_tensor(route_samples(case.router().train()).penalty)
    assert penalty.shape == (), f"The penalty has shape {tuple(penalty.shape)}, not ()."
    assert penalty.isfinite(), "The penalty is NaN or infinite."


def a_second_forward_pass_gives_the_same_result(case: Case) -> None:
    router = case.router().train()
    before = copy_state(router)
    first, second = route_samples(router), route_samples(router)
    assert torch.equal(*(torch.as_tensor(r.penalty) for r in (first, second))), (
        "Two forward passes on the same input give different penalties. Check for values kept "
        "from one call to the next."
    )
    assert torch.equal(first.gates, second.gates), (
        "In training two forward passes on the same input and seed give different gates."
    )
    assert not (names := changed(before, router)), (
        f"gate or penalty changed {names}. Under activation checkpointing both run twice per "
        "step; change the state in `update`, which gets the load of each expert."
    )


def the_penalty_has_a_gradient(case: Case) -> None:
    router = case.router().train()
    penalty = route_samples(router).penalty
    if case.cls.frozen or not torch.is_tensor(penalty) or penalty == 0:
        pytest.skip("the router is frozen, or has no penalty")
    assert penalty.requires_grad, (
        "The penalty has no gradient. Counts, such as (gates != 0).sum(), are not differentiable: "
        "use the gates or the probabilities."
    )
    penalty.backward()
    slopes = [p.grad.abs().max() for p in router.parameters() if p.grad is not None]
    assert slopes and max(slopes) > 1e-6 * penalty.abs(), (
        "The gradient of the penalty is 0 for every parameter of the router."
    )


def the_penalty_is_not_smaller_at_collapse_than_at_balance(case: Case) -> None:
    for k in (1, 2):
        router = case.identity_router(k=k).train()
        balanced = 10 * torch.eye(4)[:, None].expand(4, 3, 4)  # each sample an expert of its own
        penalties = [
            torch.as_tensor(route(router, x).penalty).item()
            for x in (balanced, balanced[:1].expand(4, 3, 4))
        ]
        assert penalties[1] >= penalties[0] - 1e-5, (
            f"The penalty is {penalties[1]:.3f} if all tokens are routed to one expert, and "
            f"{penalties[0]:.3f} if the load is balanced: it rewards collapse. Check its sign."
        )


def the_balance_loss_is_1_at_balance_and_e_at_collapse(case: Case) -> None:
    if not uses_logits(case) or tokens_compete(case) or not case.cls.at_most_k:
        pytest.skip("a token's experts need not be those with its k largest logits")
    mask, router = torch.ones(4, 3).bool(), case.identity_router(k=1)
    balanced = 50 * torch.eye(4)[:, None].expand(4, 3, 4)
    cases = ((balanced, 1.0, "balanced"), (balanced[:1].expand(4, 3, 4), 4.0, "all on one expert"))
    for x, expected, load in cases:
        loss = load_balancing_loss(route(router, x), mask).item()
        assert abs(loss - expected) < 1e-3, (
            f"With the load {load}, load_balancing_loss is {loss:.3f}, not {expected}. Check that "
            "each token is routed to the expert with its largest logit."
        )


def update_changes_buffers_only(case: Case) -> None:
    router = case.router()
    before = dict(router.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    update_with_uneven_load(router, times=3)
    for name, param in router.named_parameters():
        assert torch.equal(param, values[name]), (
            f"`update` changed the parameter {name}. Parameters belong to the optimizer: register "
            "a buffer."
        )


def update_changes_the_choice_and_not_the_gate_values(case: Case) -> None:
    router = case.router(k=4)
    before = route_samples(router).gates
    update_with_uneven_load(router)
    after = route_samples(router).gates
    assert after.isfinite().all() and (after >= 0).all(), (
        "After 50 updates a gate is negative, NaN or infinite."
    )
    is_same_choice = ((before != 0) == (after != 0)).all(dim=-1)
    assert same_gates(before[is_same_choice], after[is_same_choice]), (
        "`update` changed the gate values of tokens that are routed to the same experts as "
        "before. A bias may change which experts are chosen, but must not be part of the gates."
    )


def the_state_dict_holds_the_whole_state(case: Case) -> None:
    old, new = case.router().train(), case.router(seed=1)
    route_samples(old)
    update_with_uneven_load(old)
    new.load_state_dict(old.state_dict())
    assert torch.equal(route_samples(old.eval()).gates, route_samples(new).gates), (
        "After saving and loading the state_dict the gates differ. Keep what `update` changes in "
        "a buffer (register_buffer), and change it in place."
    )
    first, second = (torch.as_tensor(route_samples(r.train()).penalty) for r in (old, new))
    assert torch.equal(first, second), (
        "After saving and loading the state_dict the penalty differs. Keep what `update` changes "
        "in a buffer (register_buffer), and change it in place."
    )
