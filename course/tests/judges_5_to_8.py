"""Checks of the assignments on biases, sigmoids, one route a question, ReLU: see judging.py."""

import math

import pytest
import torch
from torch import Tensor

from course.tests.judging import (
    MASK,
    N_EXPERTS,
    PROMPT,
    check_buffer,
    check_penalty,
    close,
    make,
    on_real,
    randn,
    route,
    same_experts,
    top_k_of,
)
from routers import Hints, Router, Routing

LOGITS = 1.5 * randn(*MASK.shape, N_EXPERTS, seed=1)


# 5, balance without a loss


def scores_are_sigmoids(cls: type[Router]) -> None:
    for k in (1, 2):
        expected = on_real(top_k_of(LOGITS.sigmoid(), k))
        gates = route(make(cls, k), LOGITS).gates
        same_experts(gates, expected, f"With bias 0 and k = {k} a token is not routed to the "
                     "experts with its k largest scores (`gate`).")  # fmt: skip
        close(gates, expected, "With bias 0 the gates are not sigmoid(logits): neither a softmax "
              "nor rescaled (`gate`).")  # fmt: skip


def the_bias_takes_part_in_the_choice(cls: type[Router]) -> None:
    router, bias = make(cls), torch.tensor([0.6, 0.0, -0.6, 0.0])
    router.bias.copy_(bias)
    gates = route(router, LOGITS).gates
    expected = on_real(top_k_of(LOGITS.sigmoid() + bias + 1, 2))
    same_experts(gates, expected, "The experts are not those with the k largest sigmoid(logits) + "
                 "bias: the bias is added to the scores, not to the logits (`gate`).")  # fmt: skip


def the_bias_is_not_in_the_gates(cls: type[Router]) -> None:
    router = make(cls)
    router.bias.copy_(torch.tensor([0.6, 0.0, -0.6, 0.0]))
    gates = route(router, LOGITS).gates
    close(gates, torch.where(gates != 0, LOGITS.sigmoid(), 0.0), "The bias is in the gates: it "
          "changes the choice only, and the gate is the score without it (`gate`).")  # fmt: skip


def the_bias_counteracts_the_load(cls: type[Router]) -> None:
    router = make(cls)
    router.update(torch.tensor([1.4, 0.5, 0.1, 0.0]))
    expected = router.rate * torch.tensor([-1.0, 0.0, 1.0, 1.0])
    equation = "rate * sign(mean load - load) (`update`)."
    assert router.bias[0] < 0, (
        "The bias of an expert with more than the mean load is raised: the sign is wrong. Add "
        f"{equation}"
    )
    close(router.bias, expected, f"After one update from 0 the bias is not {equation}", 1e-7)
    router.update(torch.tensor([1.4, 0.5, 0.1, 0.0]))
    close(router.bias, 2 * expected, "The second update does not add to the first (`update`).",
          1e-7)  # fmt: skip


def the_bias_is_a_buffer(cls: type[Router]) -> None:
    check_buffer(cls, "bias")


def gate_does_not_change_the_bias(cls: type[Router]) -> None:
    router = make(cls, training=True)
    route(router, LOGITS)
    assert router.bias.eq(0).all(), (
        "The bias changed in `gate`, which may be computed twice for one step: change it in "
        "`update`."
    )


# 6, sigmoid gates


def sigmoids_are_rescaled(cls: type[Router]) -> None:
    for k in (2, 3, N_EXPERTS):
        kept = top_k_of(LOGITS.sigmoid(), k)
        expected = on_real(kept / kept.sum(dim=-1, keepdim=True))
        gates = route(make(cls, k), LOGITS).gates
        same_experts(gates, expected, f"At k = {k} a token is not routed to the experts with its k "
                     "largest scores (`gate`).")  # fmt: skip
        sums = gates[MASK].sum(dim=-1)
        close(sums, torch.ones_like(sums), f"At k = {k} the gates of a token do not sum to 1: "
              "divide by the sum over the k kept, not over all (`gate`).")  # fmt: skip
        close(gates, expected, f"At k = {k} the gates are not sigmoid(logits) over the sum of the "
              "k kept sigmoids; a softmax gives other values (`gate`).")  # fmt: skip


def one_expert_keeps_a_gradient(cls: type[Router]) -> None:
    router = make(cls, 1)
    gates = route(router, LOGITS).gates
    assert not gates[MASK].sum(dim=-1).eq(1).all(), (
        "At k = 1 every gate is 1 whatever the logits, so the router gets no gradient: do not "
        "rescale a single score (`gate`)."
    )
    close(gates, on_real(top_k_of(LOGITS.sigmoid(), 1)), "At k = 1 the gate is not the score "
          "(`gate`).")  # fmt: skip


def sums_to_one_is_declared(cls: type[Router]) -> None:
    for k in (1, 2, 3):
        assert make(cls, k).sums_to_one == (k > 1), (
            f"At k = {k} sums_to_one is {make(cls, k).sums_to_one}, which does not match the "
            "gates. `upcycle` uses it at the start of phase 3; declare it as a property of top_k."
        )


# 7, one route per question


def gates_of(cls: type[Router], logits: Tensor, k: int = 2) -> Tensor:
    return route(make(cls, k), logits, MASK, Hints(prompt=PROMPT)).gates


def all_positions_of_a_sample_are_routed_alike(cls: type[Router]) -> None:
    gates = gates_of(cls, LOGITS)
    for b in range(len(MASK)):
        rows = gates[b, MASK[b]]
        assert torch.equal(rows, rows[:1].expand_as(rows)), (
            f"The positions of sample {b} have different gates: decide once, then expand the gates "
            "(B, 1, E) over T (`gate`)."
        )


def the_answer_does_not_change_the_route(cls: type[Router]) -> None:
    changed, gates = LOGITS.clone(), gates_of(cls, LOGITS)
    changed[MASK & ~PROMPT] = torch.tensor([0.0, 0.0, 0.0, 50.0])
    close(gates_of(cls, changed), gates, "Answer tokens change the route: pool over mask & prompt "
          "(`gate`).")  # fmt: skip


def padding_does_not_change_the_route(cls: type[Router]) -> None:
    changed, gates = LOGITS.clone(), gates_of(cls, LOGITS)
    changed[~MASK] = torch.tensor([0.0, 0.0, 0.0, 50.0])
    found = route(make(cls), changed, MASK, Hints(prompt=PROMPT | ~MASK)).gates
    close(found, gates, "Padding changes the route: pool over mask & prompt, real positions only "
          "(`gate`).")  # fmt: skip


def the_route_follows_the_mean_logits(cls: type[Router]) -> None:
    for k in (1, 2):
        expected = torch.zeros_like(LOGITS)
        for b in range(len(MASK)):
            mean = sum(LOGITS[b, PROMPT[b]]) / int(PROMPT[b].sum())
            kept = top_k_of(mean.softmax(dim=-1)[None, None], k)
            expected[b] = kept / kept.sum() if k > 1 else kept
        close(gates_of(cls, LOGITS, k), on_real(expected), f"At k = {k} the route is not top-k of "
              "the softmax of the mean logits: divide by the number of prompt positions, and take "
              "the softmax after the mean (`gate`).")  # fmt: skip


def no_prompt_hint_pools_all_real_positions(cls: type[Router]) -> None:
    gates = route(make(cls), LOGITS, MASK, Hints()).gates
    expected = route(make(cls), LOGITS, MASK, Hints(prompt=MASK)).gates
    close(gates, expected, "With prompt = None the logits are not averaged over all real positions "
          "(`gate`).")  # fmt: skip


def generation_keeps_the_route(cls: type[Router]) -> None:
    router = make(cls)
    before = route(router, LOGITS[:2], MASK[:2], Hints(prompt=PROMPT[:2]))
    last = Routing(before.gates[:, -1:], before.logits[:, -1:])
    new = randn(2, 1, N_EXPERTS, seed=7) * 5
    after = route(router, new, torch.ones(2, 1).bool(), Hints(previous=last)).gates
    close(after, last.gates, "A generated token gets gates of its own: if `previous` is not None, "
          "return previous.gates for all positions (`gate`).")  # fmt: skip


def penalty_is_local_and_global_entropy(cls: type[Router]) -> None:
    router = make(cls, training=True)
    if cls.penalty is Router.penalty or isinstance(
        router.penalty(gates_of(cls, LOGITS), LOGITS, MASK, LOGITS), float
    ):
        pytest.skip("optional, not implemented")

    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        def entropy(p: Tensor) -> Tensor:
            return -sum(q * q.log() for q in p)

        probs = logits.softmax(dim=-1)
        local = sum(entropy(p) for p in probs) / len(probs)
        return router.weight * (local + math.log(N_EXPERTS) - entropy(sum(probs) / len(probs)))

    check_penalty(cls, definition, "weight * (mean entropy of a token + log E - entropy of the "
                  "mean): it minimises the first entropy and maximises the second "
                  "(`penalty`)")  # fmt: skip


# 8, ReLU


def gates_are_relu(cls: type[Router]) -> None:
    for k in (1, 2):
        gates = route(make(cls, k), LOGITS).gates
        close(gates, on_real(LOGITS.clamp(min=0)), "The gates are not relu(logits): there is no "
              "top-k and no rescaling, k is only a target (`gate`).")  # fmt: skip


def penalty_is_the_mean_l1_norm(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        return router.coefficient * sum(g.sum() for g in gates) / len(gates)

    check_penalty(cls, definition, "coefficient * the mean over real tokens of the sum of a "
                  "token's gates (`penalty`)")  # fmt: skip


def the_coefficient_aims_at_k_experts_per_token(cls: type[Router]) -> None:
    for load, power, message in (
        ([1.0, 0.9, 0.8, 0.7], 1, "With more than k experts per token the penalty must get "
         "stronger"),
        ([0.4, 0.0, 0.3, 0.1], -1, "With fewer than k experts per token the penalty must get "
         "weaker"),
        ([0.5, 0.5, 0.5, 0.5], 0, "At exactly k experts per token the penalty must not change"),
    ):  # fmt: skip
        router = make(cls)
        router.coefficient.fill_(0.5)
        router.update(torch.tensor(load))
        close(router.coefficient, 0.5 * router.factor**power,
              f"{message}: coefficient *= factor^sign(sum of load - k), from 0.5 (`update`).",
              1e-6)  # fmt: skip


def the_coefficient_is_a_buffer(cls: type[Router]) -> None:
    check_buffer(cls, "coefficient")


def at_most_k_is_declared_false(cls: type[Router]) -> None:
    assert not getattr(cls, "at_most_k", True), (
        "A token may be routed to more than k experts here, so the class has to declare "
        "at_most_k = False."
    )


CHECKS = {
    5: (scores_are_sigmoids, the_bias_is_a_buffer, the_bias_takes_part_in_the_choice,
        the_bias_is_not_in_the_gates, gate_does_not_change_the_bias,
        the_bias_counteracts_the_load),
    6: (one_expert_keeps_a_gradient, sigmoids_are_rescaled, sums_to_one_is_declared),
    7: (generation_keeps_the_route, the_answer_does_not_change_the_route,
        padding_does_not_change_the_route, all_positions_of_a_sample_are_routed_alike,
        the_route_follows_the_mean_logits, no_prompt_hint_pools_all_real_positions,
        penalty_is_local_and_global_entropy),
    8: (gates_are_relu, penalty_is_the_mean_l1_norm, the_coefficient_is_a_buffer,
        the_coefficient_aims_at_k_experts_per_token, at_most_k_is_declared_false),
}  # fmt: skip
