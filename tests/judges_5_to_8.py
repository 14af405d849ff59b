"""Judges of the assignments on biases, sigmoids, one route a question and ReLU: see judging.py."""

import math

import pytest
import torch
from judging import (
    MASK,
    N_EXPERTS,
    PROMPT,
    check_buffer,
    check_penalty,
    close,
    decide,
    make,
    on_real,
    randn,
    same_visits,
    top_k_of,
)
from torch import Tensor

from routers import Hints, Router

LOGITS = 1.5 * randn(*MASK.shape, N_EXPERTS, seed=1)


# 5, balance without a loss


def scores_are_sigmoids(cls: type[Router]) -> None:
    for k in (1, 2):
        wanted = on_real(top_k_of(LOGITS.sigmoid(), k))
        gates = decide(make(cls, k), LOGITS).gates
        same_visits(gates, wanted, f"With bias 0 and k = {k}, a token visits its k best (`gate`).")
        close(gates, wanted, "With bias 0 the gates are sigmoid(logits), neither a softmax nor "
              "rescaled (`gate`).")  # fmt: skip


def the_bias_decides_who_is_visited(cls: type[Router]) -> None:
    router, bias = make(cls), torch.tensor([0.6, 0.0, -0.6, 0.0])
    router.bias.copy_(bias)
    gates = decide(router, LOGITS).gates
    wanted = on_real(top_k_of(LOGITS.sigmoid() + bias + 1, 2))
    same_visits(gates, wanted, "The k largest of sigmoid(logits) + bias are visited; the bias is "
                "added to the scores, not to the logits (`gate`).")  # fmt: skip


def the_bias_is_not_in_the_weights(cls: type[Router]) -> None:
    router = make(cls)
    router.bias.copy_(torch.tensor([0.6, 0.0, -0.6, 0.0]))
    gates = decide(router, LOGITS).gates
    close(gates, torch.where(gates != 0, LOGITS.sigmoid(), 0.0), "The bias is in the gates: it "
          "chooses, but the gate of a visit is the score without it (`gate`).")  # fmt: skip


def the_bias_goes_against_the_load(cls: type[Router]) -> None:
    router = make(cls)
    router.update(torch.tensor([1.4, 0.5, 0.1, 0.0]))
    wanted = router.rate * torch.tensor([-1.0, 0.0, 1.0, 1.0])
    where = "is not rate * sign(mean visits - visits) (`update`)."
    assert router.bias[0] < 0, (
        f"An expert with too many visits gets a larger bias: the sign is the wrong way; it {where}"
    )
    close(router.bias, wanted, f"After one update from 0 the bias {where}", 1e-7)
    router.update(torch.tensor([1.4, 0.5, 0.1, 0.0]))
    close(router.bias, 2 * wanted, "The second update does not add to the first (`update`).", 1e-7)


def the_bias_is_a_buffer(cls: type[Router]) -> None:
    check_buffer(cls, "bias")


def gates_leave_the_bias_as_it_is(cls: type[Router]) -> None:
    router = make(cls, training=True)
    decide(router, LOGITS)
    assert router.bias.eq(0).all(), (
        "The bias changed in `gate`, which may be computed twice for one step: change it in "
        "`update`."
    )


# 6, sigmoid gates


def sigmoids_are_rescaled(cls: type[Router]) -> None:
    for k in (2, 3, N_EXPERTS):
        kept = top_k_of(LOGITS.sigmoid(), k)
        wanted = on_real(kept / kept.sum(dim=-1, keepdim=True))
        gates = decide(make(cls, k), LOGITS).gates
        same_visits(gates, wanted, f"At k = {k} a token visits its k largest scores (`gate`).")
        sums = gates[MASK].sum(dim=-1)
        close(sums, torch.ones_like(sums), f"At k = {k} the gates of a token do not sum to 1: "
              "divide by the sum over the kept, not over all (`gate`).")  # fmt: skip
        close(gates, wanted, f"At k = {k} the gates are not sigmoid(logits) over the sum of the "
              "kept sigmoids; a softmax gives other ones (`gate`).")  # fmt: skip


def one_expert_still_teaches(cls: type[Router]) -> None:
    router = make(cls, 1)
    gates = decide(router, LOGITS).gates
    assert not gates[MASK].sum(dim=-1).eq(1).all(), (
        "At k = 1 every gate is 1 whatever the logits, so the router gets no gradient: do not "
        "rescale a single score (`gate`)."
    )
    close(gates, on_real(top_k_of(LOGITS.sigmoid(), 1)), "At k = 1 the gate is the score (`gate`).")


def sums_to_one_is_declared(cls: type[Router]) -> None:
    for k in (1, 2, 3):
        assert make(cls, k).sums_to_one == (k > 1), (
            f"At k = {k} sums_to_one is {make(cls, k).sums_to_one}, but the gates say otherwise: "
            "`upcycle` starts from it; declare it as a property of top_k."
        )


# 7, one route a question


def route(cls: type[Router], logits: Tensor, k: int = 2) -> Tensor:
    return decide(make(cls, k), logits, MASK, Hints(prompt=PROMPT)).gates


def one_decision_serves_a_sample(cls: type[Router]) -> None:
    gates = route(cls, LOGITS)
    for b in range(len(MASK)):
        rows = gates[b, MASK[b]]
        assert torch.equal(rows, rows[:1].expand_as(rows)), (
            f"The positions of sample {b} take different routes: decide once, then expand the "
            "decision (B, 1, E) over T (`gate`)."
        )


def the_answer_has_no_say(cls: type[Router]) -> None:
    changed, gates = LOGITS.clone(), route(cls, LOGITS)
    changed[MASK & ~PROMPT] = torch.tensor([0.0, 0.0, 0.0, 50.0])
    close(route(cls, changed), gates, "Answer tokens change the route: pool over mask & prompt "
          "(`gate`).")  # fmt: skip


def padding_has_no_say(cls: type[Router]) -> None:
    changed, gates = LOGITS.clone(), route(cls, LOGITS)
    changed[~MASK] = torch.tensor([0.0, 0.0, 0.0, 50.0])
    same = decide(make(cls), changed, MASK, Hints(prompt=PROMPT | ~MASK)).gates
    close(same, gates, "Padding changes the route: pool over mask & prompt, real positions only "
          "(`gate`).")  # fmt: skip


def the_mean_logits_decide(cls: type[Router]) -> None:
    for k in (1, 2):
        wanted = torch.zeros_like(LOGITS)
        for b in range(len(MASK)):
            mean = sum(LOGITS[b, PROMPT[b]]) / int(PROMPT[b].sum())
            kept = top_k_of(mean.softmax(dim=-1)[None, None], k)
            wanted[b] = kept / kept.sum() if k > 1 else kept
        close(route(cls, LOGITS, k), on_real(wanted), f"At k = {k} the route is not top-k of the "
              "softmax of the mean logits: divide by the number of prompt positions, and take the "
              "softmax after the mean (`gate`).")  # fmt: skip


def it_decides_without_a_prompt_hint(cls: type[Router]) -> None:
    gates = decide(make(cls), LOGITS, MASK, Hints()).gates
    wanted = decide(make(cls), LOGITS, MASK, Hints(prompt=MASK)).gates
    close(gates, wanted, "With prompt = None all real positions are pooled (`gate`).")


def the_route_is_kept_while_answering(cls: type[Router]) -> None:
    router = make(cls)
    before = decide(router, LOGITS[:2], MASK[:2], Hints(prompt=PROMPT[:2]))
    new = randn(2, 1, N_EXPERTS, seed=7) * 5
    after = decide(router, new, torch.ones(2, 1).bool(), Hints(held=before.last())).gates
    close(after, before.gates[:, -1:], "A generated token takes a route of its own: if `held` is "
          "given, return held.gates for all positions (`gate`).")  # fmt: skip


def penalty_is_local_and_global_entropy(cls: type[Router]) -> None:
    router = make(cls, training=True)
    if cls.penalty is Router.penalty or isinstance(
        router.penalty(route(cls, LOGITS), LOGITS, MASK, LOGITS), float
    ):
        pytest.skip("optional, not implemented")

    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        def entropy(p: Tensor) -> Tensor:
            return -sum(q * q.log() for q in p)

        probs = logits.softmax(dim=-1)
        local = sum(entropy(p) for p in probs) / len(probs)
        return router.weight * (local + math.log(N_EXPERTS) - entropy(sum(probs) / len(probs)))

    check_penalty(cls, definition, "weight * (mean entropy of a token + log E - entropy of the "
                  "mean): one is wanted small, the other large (`penalty`)")  # fmt: skip


# 8, ReLU


def gates_are_relu(cls: type[Router]) -> None:
    for k in (1, 2):
        gates = decide(make(cls, k), LOGITS).gates
        close(gates, on_real(LOGITS.clamp(min=0)), "The gates are not relu(logits): nothing is "
              "chosen and nothing rescaled, k is only a target (`gate`).")  # fmt: skip


def penalty_is_the_mean_l1_norm(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        return router.coefficient * sum(g.sum() for g in gates) / len(gates)

    check_penalty(cls, definition, "coefficient * the mean over real tokens of the sum of a "
                  "token's gates (`penalty`)")  # fmt: skip


def the_coefficient_steers_towards_k_visits(cls: type[Router]) -> None:
    for visits, power, says in (
        ([1.0, 0.9, 0.8, 0.7], 1, "More than k visits a token have to make the penalty stronger"),
        ([0.4, 0.0, 0.3, 0.1], -1, "Fewer than k visits a token have to make the penalty weaker"),
        ([0.5, 0.5, 0.5, 0.5], 0, "At exactly k visits a token the penalty stays"),
    ):
        router = make(cls)
        router.coefficient.fill_(0.5)
        router.update(torch.tensor(visits))
        close(router.coefficient, 0.5 * router.factor**power,
              f"{says}: coefficient *= factor^sign(sum of visits - k), from 0.5 (`update`).",
              1e-6)  # fmt: skip


def the_coefficient_is_a_buffer(cls: type[Router]) -> None:
    check_buffer(cls, "coefficient")


def the_target_is_no_bound(cls: type[Router]) -> None:
    assert not getattr(cls, "at_most_k", True), (
        "A token may visit more than k experts here, so the class declares at_most_k = False."
    )


CHECKS = {
    5: (scores_are_sigmoids, the_bias_is_a_buffer, the_bias_decides_who_is_visited,
        the_bias_is_not_in_the_weights, gates_leave_the_bias_as_it_is,
        the_bias_goes_against_the_load),
    6: (one_expert_still_teaches, sigmoids_are_rescaled, sums_to_one_is_declared),
    7: (the_route_is_kept_while_answering, the_answer_has_no_say, padding_has_no_say,
        one_decision_serves_a_sample, the_mean_logits_decide, it_decides_without_a_prompt_hint,
        penalty_is_local_and_global_entropy),
    8: (gates_are_relu, penalty_is_the_mean_l1_norm, the_coefficient_is_a_buffer,
        the_coefficient_steers_towards_k_visits, the_target_is_no_bound),
}  # fmt: skip
