"""Judges of the assignments on noise, capacity, the z-loss and expert choice: see judging.py."""

import math

import torch
from judging import (
    MASK,
    N_EXPERTS,
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

from routers import Router

LOGITS = 1.5 * randn(*MASK.shape, N_EXPERTS, seed=1)


# 1, noisy top-k


def noise_is_absent_in_evaluation(cls: type[Router]) -> None:
    router = make(cls)
    first, second = decide(router, LOGITS).gates, decide(router, LOGITS).gates
    assert torch.equal(first, second), (
        "There is noise in evaluation: two calls in eval mode differ. Draw it only if "
        "self.training (`gate`)."
    )


def gates_are_a_softmax_over_the_kept(cls: type[Router]) -> None:
    gates = decide(make(cls, 1), LOGITS).gates
    likeliest = on_real(top_k_of(LOGITS.softmax(dim=-1), 1))
    same_visits(gates, likeliest, "At k = 1 the visit is not the largest logit's (`gate`).")
    assert not (gates[MASK].amax(dim=-1) == 1).all(), (
        "At k = 1 every gate is 1: a softmax over one logit leaves the router no gradient. Keep "
        "the probability among all E there (`gate`)."
    )
    close(gates, likeliest, "At k = 1 the gate is not the probability among all E (`gate`).")
    for k in (2, N_EXPERTS):
        gates = decide(make(cls, k), LOGITS).gates
        kept = top_k_of(LOGITS.exp(), k)
        wanted = on_real(kept / kept.sum(dim=-1, keepdim=True))
        same_visits(gates, wanted, f"At k = {k} the visits are not the k largest logits (`gate`).")
        close(gates, wanted, f"At k = {k} the gates are not a softmax over the kept logits: the "
              "softmax comes after the choice (`gate`).")  # fmt: skip


def noise_has_the_softplus_of_its_own_weights_as_deviation(cls: type[Router]) -> None:
    router, wanted = make(cls, N_EXPERTS, training=True), torch.tensor([0.2, 0.5, 1.0, 2.0])
    with torch.no_grad():
        router.noise.weight.zero_()
        router.noise.weight[:, -1] = wanted.expm1().log()  # softplus undoes it
    logits = randn(1, 1, N_EXPERTS, seed=2).expand(8, 1000, N_EXPERTS)
    gates = decide(router, logits, torch.ones(8, 1000).bool()).gates
    noise = gates.clamp(min=1e-30).log() - logits
    noise = noise - noise[..., :1]  # a softmax shows differences only
    found = noise[..., 1:].flatten(0, 1).std(dim=0)
    deviation = (wanted[1:] ** 2 + wanted[0] ** 2).sqrt()
    close(found / deviation, torch.ones(3), "In training the noise of an expert does not have the "
          "standard deviation softplus(x W_noise), with W_noise = self.noise (`gate`); this is "
          "their quotient.", atol=0.1)  # fmt: skip


def noise_takes_part_in_the_choice(cls: type[Router]) -> None:
    router = make(cls, 1, training=True)
    logits = torch.tensor([0.1, 0.0, 0.0, 0.0]).expand(1, 200, N_EXPERTS)
    visits = (decide(router, logits, torch.ones(1, 200).bool()).gates != 0).sum(dim=(0, 1))
    assert (visits > 0).all(), (
        f"Of nearly equal logits the same experts win each time (visits {visits.tolist()}): add "
        "the noise before the choice of the k largest (`gate`)."
    )


def penalty_is_the_variation_of_importance(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        importance = sum(gates)  # (E,)
        mean = sum(importance) / N_EXPERTS
        return router.weight * sum((i - mean) ** 2 for i in importance) / N_EXPERTS / mean**2

    check_penalty(cls, definition, "weight * CV^2 of the summed gates, not of the visits "
                  "(`penalty`)")  # fmt: skip


# 2, Switch


def one_expert_with_its_raw_probability(cls: type[Router]) -> None:
    gates = decide(make(cls), LOGITS).gates
    wanted = on_real(top_k_of(LOGITS.softmax(dim=-1), 1))
    same_visits(gates, wanted, "In evaluation each real token visits its likeliest expert; is one "
                "dropped, or are there more (`gate`)?")  # fmt: skip
    close(gates, wanted, "The gate is not the raw probability p of the expert: rescaled to 1 it "
          "leaves the router no gradient (`gate`).")  # fmt: skip


def crowd(n: int, n_padding: int = 0) -> tuple[Tensor, Tensor]:
    """-> logits (1, T, E) that all want expert 0, the later the more, and the mask."""
    logits = torch.zeros(1, n + n_padding, N_EXPERTS)
    logits[0, :, 0] = torch.linspace(1, 3, n + n_padding)  # padding wants it most
    return logits, (torch.arange(n + n_padding) < n)[None]


def an_expert_takes_its_capacity_only(cls: type[Router]) -> None:
    for factor, taken in ((1.0, 2), (1.25, 3), (2.0, 4), (8.0, 8)):
        router = make(cls, training=True)
        router.capacity_factor = factor
        found = int((decide(router, *crowd(8)).gates != 0).sum())
        assert found == taken, (
            f"In training, of 8 tokens that all want one of 4 experts at factor {factor}, "
            f"{found} are taken, not ceil({factor} * 8 / 4) = {taken}: see the capacity (`gate`)."
        )


def capacity_counts_real_tokens(cls: type[Router]) -> None:
    gates = decide(make(cls, training=True), *crowd(4, n_padding=8)).gates
    found = int((gates != 0).sum())
    assert found == 2, (
        f"Of 4 real tokens beside 8 of padding {found} are taken, not ceil(1.25 * 4 / 4) = 2: the "
        "capacity counts real tokens only, and padding takes no place (`gate`)."
    )


def capacity_is_of_each_sample(cls: type[Router]) -> None:
    one, mask = crowd(8)
    two = torch.cat([one, one + torch.tensor([0.5, 0, 0, 0])])
    taken = (decide(make(cls, training=True), two, mask.expand(2, -1)).gates != 0).sum(dim=(1, 2))
    assert taken.tolist() == [3, 3], (
        f"Two samples, each of which has room for 3, get {taken.tolist()}: the capacity is of "
        "each sample, or a batch changes what its samples get (`gate`)."
    )


def the_least_probable_are_dropped(cls: type[Router]) -> None:
    gates = decide(make(cls, training=True), *crowd(8)).gates
    taken = gates[0, :, 0].nonzero().flatten().tolist()
    assert taken == [5, 6, 7], (
        f"Positions {taken} are taken, but 5, 6 and 7 have the largest probability: the least "
        "probable are dropped first, not the last to come (`gate`)."
    )
    logits, _ = crowd(8)
    wanted = logits.softmax(dim=-1)[0, taken, 0]
    close(gates[0, taken, 0], wanted, "Who is taken keeps its raw probability (`gate`).")


def penalty_is_share_times_probability(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        probs, n = logits.softmax(dim=-1), len(logits)
        total = 0.0
        for e in range(N_EXPERTS):
            f = sum(int(p.argmax()) == e for p in probs) / n
            total = total + f * probs[:, e].sum() / n
        return router.weight * N_EXPERTS * total

    check_penalty(cls, definition, "weight * E * sum of f_e P_e, f_e the share of top-1 choices "
                  "without gradient (`penalty`)")  # fmt: skip


def penalty_counts_the_dropped_too(cls: type[Router]) -> None:
    router, (logits, mask) = make(cls, training=True), crowd(8)
    found = decide(router, logits, mask, with_penalty=True).penalty
    probs = logits[0].softmax(dim=-1)
    close(found, router.weight * N_EXPERTS * probs[:, 0].mean(), "f_e counts the top-1 choices "
          "before any is dropped: take them from the logits (`penalty`).")  # fmt: skip


# 3, z-loss


def gates_are_the_usual_top_k(cls: type[Router]) -> None:
    for k in (1, 2, 3):
        kept = top_k_of(LOGITS.softmax(dim=-1), k)
        wanted = on_real(kept / kept.sum(dim=-1, keepdim=True) if k > 1 else kept)
        close(decide(make(cls, k), LOGITS).gates, wanted, f"At k = {k} the gates are not the k "
              "largest probabilities, rescaled to sum to 1 if k > 1 (`gate`).")  # fmt: skip


def penalty_is_the_mean_squared_logsumexp(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        return router.weight * sum(row.exp().sum().log() ** 2 for row in logits) / len(logits)

    check_penalty(cls, definition, "weight * the mean of logsumexp(logits)^2, of the logits "
                  "themselves (`penalty`)")  # fmt: skip


def penalty_survives_large_logits(cls: type[Router]) -> None:
    router = make(cls, training=True)
    logits, mask = torch.full((1, 1, N_EXPERTS), 1e3), torch.ones(1, 1).bool()
    penalty = decide(router, logits, mask, with_penalty=True).penalty
    close(penalty, router.weight * (1e3 + math.log(4)) ** 2, "The penalty overflows where it is "
          "needed: use logsumexp, which subtracts the largest logit (`penalty`).", 1)  # fmt: skip


# 4, expert choice


def says_that_it_looks_ahead(cls: type[Router]) -> None:
    assert not cls.causal, (
        "Who is picked depends on later tokens, so the class has to declare causal = False; "
        "generate() relies on it."
    )


def picks(logits: Tensor, mask: Tensor, k: int) -> Tensor:
    """The definition, sample by sample and expert by expert."""
    gates, probs = torch.zeros_like(logits), logits.softmax(dim=-1)
    for b in range(len(logits)):
        real = mask[b].nonzero().flatten().tolist()
        for e in range(N_EXPERTS):
            wish = sorted(real, key=lambda t: -probs[b, t, e])
            for t in wish[: math.ceil(k * len(real) / N_EXPERTS)]:
                gates[b, t, e] = probs[b, t, e]
    return gates


def padding_is_never_picked(cls: type[Router]) -> None:
    logits = LOGITS.clone()
    logits[~MASK] = torch.tensor([9.0, 0.0, 0.0, 0.0])  # padding that expert 0 would love
    load = (decide(make(cls), logits).gates != 0).sum(dim=1)[:, 0]
    wanted = (picks(logits, MASK, 2) != 0).sum(dim=1)[:, 0]
    assert torch.equal(load, wanted), (
        f"Where padding has the largest score an expert has the loads {load.tolist()}, not "
        f"{wanted.tolist()}: padding takes places; exclude it before the choice (`gate`)."
    )


def every_expert_takes_exactly_its_capacity(cls: type[Router]) -> None:
    for k in (1, 2):
        load = (decide(make(cls, k), LOGITS).gates != 0).sum(dim=1)  # (B, E)
        real = MASK.sum(dim=1).tolist()
        wanted = [[math.ceil(k * n / N_EXPERTS)] * N_EXPERTS for n in real]
        assert load.tolist() == wanted, (
            f"At k = {k} samples of {real} real tokens load their experts {load.tolist()}, not "
            f"exactly C = ceil(k * real / E), {wanted}: experts pick, sample by sample (`gate`)."
        )


def picked_tokens_have_their_probability(cls: type[Router]) -> None:
    gates, wanted = decide(make(cls), LOGITS).gates, picks(LOGITS, MASK, 2)
    same_visits(gates, wanted, "An expert does not take its likeliest tokens (`gate`).")
    close(gates, wanted, "The gate is the softmax over the experts, not over the tokens, and is "
          "not rescaled (`gate`).")  # fmt: skip


def samples_choose_alone(cls: type[Router]) -> None:
    router = make(cls)
    for b in range(len(MASK)):
        alone = decide(router, LOGITS[b : b + 1], MASK[b : b + 1]).gates
        together = decide(router, LOGITS, MASK).gates[b : b + 1]
        same_visits(alone, together, "A sample alone is routed otherwise than in a batch: pick "
                    "along the positions of one sample (`gate`).")  # fmt: skip


def it_trains_the_router(cls: type[Router]) -> None:
    router = make(cls)
    gates, weight = decide(router, LOGITS).gates, router.proj.weight
    grad = torch.autograd.grad(gates.sum(), weight)[0] if gates.requires_grad else None
    assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, (
        "No gradient reaches the router through its gates: a gate of 1 or a detached one teaches "
        "nothing (`gate`)."
    )


CHECKS = {
    1: (noise_is_absent_in_evaluation, gates_are_a_softmax_over_the_kept,
        noise_has_the_softplus_of_its_own_weights_as_deviation, noise_takes_part_in_the_choice,
        penalty_is_the_variation_of_importance),
    2: (one_expert_with_its_raw_probability, an_expert_takes_its_capacity_only,
        capacity_counts_real_tokens, capacity_is_of_each_sample, the_least_probable_are_dropped,
        penalty_is_share_times_probability, penalty_counts_the_dropped_too, it_trains_the_router),
    3: (gates_are_the_usual_top_k, penalty_is_the_mean_squared_logsumexp,
        penalty_survives_large_logits),
    4: (padding_is_never_picked, every_expert_takes_exactly_its_capacity, samples_choose_alone,
        picked_tokens_have_their_probability, says_that_it_looks_ahead, it_trains_the_router),
}  # fmt: skip
