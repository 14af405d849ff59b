"""Checks of the assignments on noise, capacity, the z-loss and expert choice: see judging.py."""

import math

import torch
from torch import Tensor

from course.tests.judging import (
    MASK,
    N_EXPERTS,
    check_penalty,
    close,
    make,
    on_real,
    randn,
    route,
    same_experts,
    top_k_of,
)
from routers import Router

LOGITS = 1.5 * randn(*MASK.shape, N_EXPERTS, seed=1)


# 1, noisy top-k


def noise_is_absent_in_evaluation(cls: type[Router]) -> None:
    router = make(cls)
    first, second = route(router, LOGITS).gates, route(router, LOGITS).gates
    assert torch.equal(first, second), (
        "There is noise in evaluation: two calls in eval mode give different gates. Add it only "
        "if self.training (`gate`)."
    )


def gates_are_a_softmax_over_the_k_kept_logits(cls: type[Router]) -> None:
    gates = route(make(cls, 1), LOGITS).gates
    largest = on_real(top_k_of(LOGITS.softmax(dim=-1), 1))
    same_experts(gates, largest, "At k = 1 the expert is not that of the largest logit (`gate`).")
    assert not (gates[MASK].amax(dim=-1) == 1).all(), (
        "At k = 1 every gate is 1: a softmax over one logit leaves the router no gradient. Keep "
        "the probability among all E there (`gate`)."
    )
    close(gates, largest, "At k = 1 the gate is not the probability among all E (`gate`).")
    for k in (2, N_EXPERTS):
        gates = route(make(cls, k), LOGITS).gates
        kept = top_k_of(LOGITS.exp(), k)
        expected = on_real(kept / kept.sum(dim=-1, keepdim=True))
        same_experts(gates, expected, f"At k = {k} the experts are not those of the k largest "
                     "logits (`gate`).")  # fmt: skip
        close(gates, expected, f"At k = {k} the gates are not a softmax over the k kept logits: "
              "take the softmax after the choice (`gate`).")  # fmt: skip


def noise_has_the_softplus_of_its_own_weights_as_deviation(cls: type[Router]) -> None:
    router, deviation = make(cls, N_EXPERTS, training=True), torch.tensor([0.2, 0.5, 1.0, 2.0])
    with torch.no_grad():
        router.noise.weight.zero_()
        router.noise.weight[:, -1] = deviation.expm1().log()  # the inverse of softplus
    logits = randn(1, 1, N_EXPERTS, seed=2).expand(8, 1000, N_EXPERTS)
    gates = route(router, logits, torch.ones(8, 1000).bool()).gates
    noise = gates.clamp(min=1e-30).log() - logits
    noise = noise - noise[..., :1]  # a softmax shows differences only
    found = noise[..., 1:].flatten(0, 1).std(dim=0)
    expected = (deviation[1:] ** 2 + deviation[0] ** 2).sqrt()
    close(found / expected, torch.ones(3), "In training the noise of an expert does not have the "
          "standard deviation softplus(x W_noise), with W_noise = self.noise (`gate`); shown is "
          "the ratio of the two.", atol=0.1)  # fmt: skip


def noise_is_added_before_the_choice(cls: type[Router]) -> None:
    router = make(cls, 1, training=True)
    logits = torch.tensor([0.1, 0.0, 0.0, 0.0]).expand(1, 200, N_EXPERTS)
    n_tokens = (route(router, logits, torch.ones(1, 200).bool()).gates != 0).sum(dim=(0, 1))
    assert (n_tokens > 0).all(), (
        "With nearly equal logits the same expert is always chosen (tokens per expert "
        f"{n_tokens.tolist()}): add the noise before the choice of the k largest (`gate`)."
    )


def penalty_is_the_variation_of_importance(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        importance = sum(gates)  # (E,)
        mean = sum(importance) / N_EXPERTS
        return router.weight * sum((i - mean) ** 2 for i in importance) / N_EXPERTS / mean**2

    check_penalty(cls, definition, "weight * CV^2 of the sums of the gates, not of token counts "
                  "(`penalty`)")  # fmt: skip


# 2, Switch


def one_expert_with_its_raw_probability(cls: type[Router]) -> None:
    gates = route(make(cls), LOGITS).gates
    expected = on_real(top_k_of(LOGITS.softmax(dim=-1), 1))
    same_experts(gates, expected, "In evaluation each real token is routed to the expert with its "
                 "largest probability and to no other; none is dropped (`gate`).")  # fmt: skip
    close(gates, expected, "The gate is not the raw probability p of the expert: rescaled to 1 it "
          "leaves the router no gradient (`gate`).")  # fmt: skip


def all_to_expert_0(n: int, n_padding: int = 0) -> tuple[Tensor, Tensor]:
    """-> logits (1, T, E), largest for expert 0 and growing with the position, and the mask."""
    logits = torch.zeros(1, n + n_padding, N_EXPERTS)
    logits[0, :, 0] = torch.linspace(1, 3, n + n_padding)  # largest on the padding at the end
    return logits, (torch.arange(n + n_padding) < n)[None]


def an_expert_takes_its_capacity_only(cls: type[Router]) -> None:
    for factor, capacity in ((1.0, 2), (1.25, 3), (2.0, 4), (8.0, 8)):
        router = make(cls, training=True)
        router.capacity_factor = factor
        found = int((route(router, *all_to_expert_0(8)).gates != 0).sum())
        assert found == capacity, (
            "In training, 8 tokens have their largest logit at one of 4 experts; at capacity "
            f"factor {factor}, {found} of them are kept, not ceil({factor} * 8 / 4) = {capacity}: "
            "see the capacity (`gate`)."
        )


def capacity_counts_real_tokens(cls: type[Router]) -> None:
    gates = route(make(cls, training=True), *all_to_expert_0(4, n_padding=8)).gates
    found = int((gates != 0).sum())
    assert found == 2, (
        f"Of 4 real tokens beside 8 of padding {found} are kept, not ceil(1.25 * 4 / 4) = 2: the "
        "capacity counts real tokens only, and padding uses none of it (`gate`)."
    )


def capacity_is_per_sample(cls: type[Router]) -> None:
    one, mask = all_to_expert_0(8)
    two = torch.cat([one, one + torch.tensor([0.5, 0, 0, 0])])
    kept = (route(make(cls, training=True), two, mask.expand(2, -1)).gates != 0).sum(dim=(1, 2))
    assert kept.tolist() == [3, 3], (
        f"Two samples with a capacity of 3 each keep {kept.tolist()} tokens: the capacity is per "
        "sample, so that samples of a batch do not affect each other (`gate`)."
    )


def the_least_probable_are_dropped(cls: type[Router]) -> None:
    gates = route(make(cls, training=True), *all_to_expert_0(8)).gates
    kept = gates[0, :, 0].nonzero().flatten().tolist()
    assert kept == [5, 6, 7], (
        f"Positions {kept} are kept, but 5, 6 and 7 have the largest probability: the least "
        "probable tokens are dropped first, not the last positions (`gate`)."
    )
    logits, _ = all_to_expert_0(8)
    expected = logits.softmax(dim=-1)[0, kept, 0]
    close(gates[0, kept, 0], expected, "The gate of a token that is kept is not its raw "
          "probability (`gate`).")  # fmt: skip


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


def penalty_counts_dropped_tokens(cls: type[Router]) -> None:
    router, (logits, mask) = make(cls, training=True), all_to_expert_0(8)
    found = route(router, logits, mask, with_penalty=True).penalty
    probs = logits[0].softmax(dim=-1)
    close(found, router.weight * N_EXPERTS * probs[:, 0].mean(), "f_e does not count the top-1 "
          "choices before any is dropped: compute it from the logits (`penalty`).")  # fmt: skip


# 3, z-loss


def gates_are_the_usual_top_k(cls: type[Router]) -> None:
    for k in (1, 2, 3):
        kept = top_k_of(LOGITS.softmax(dim=-1), k)
        expected = on_real(kept / kept.sum(dim=-1, keepdim=True) if k > 1 else kept)
        close(route(make(cls, k), LOGITS).gates, expected, f"At k = {k} the gates are not the k "
              "largest probabilities, rescaled to sum to 1 if k > 1 (`gate`).")  # fmt: skip


def penalty_is_the_mean_squared_logsumexp(cls: type[Router]) -> None:
    def definition(router: Router, gates: Tensor, logits: Tensor) -> Tensor:
        return router.weight * sum(row.exp().sum().log() ** 2 for row in logits) / len(logits)

    check_penalty(cls, definition, "weight * the mean of logsumexp(logits)^2, of the logits "
                  "themselves (`penalty`)")  # fmt: skip


def penalty_does_not_overflow(cls: type[Router]) -> None:
    router = make(cls, training=True)
    logits, mask = torch.full((1, 1, N_EXPERTS), 1e3), torch.ones(1, 1).bool()
    penalty = route(router, logits, mask, with_penalty=True).penalty
    close(penalty, router.weight * (1e3 + math.log(4)) ** 2, "The penalty overflows for large "
          "logits: use logsumexp, which subtracts the largest logit (`penalty`).", 1)  # fmt: skip


# 4, expert choice


def causal_is_declared_false(cls: type[Router]) -> None:
    assert not cls.causal, (
        "Whether a token is selected depends on later tokens, so the class has to declare causal = "
        "False; generate() relies on it."
    )


def expert_choice(logits: Tensor, mask: Tensor, k: int) -> Tensor:
    """The definition, sample by sample and expert by expert."""
    gates, probs = torch.zeros_like(logits), logits.softmax(dim=-1)
    for b in range(len(logits)):
        real = mask[b].nonzero().flatten().tolist()
        for e in range(N_EXPERTS):
            ranked = sorted(real, key=lambda t: -probs[b, t, e])
            for t in ranked[: math.ceil(k * len(real) / N_EXPERTS)]:
                gates[b, t, e] = probs[b, t, e]
    return gates


def padding_is_never_selected(cls: type[Router]) -> None:
    logits = LOGITS.clone()
    logits[~MASK] = torch.tensor([9.0, 0.0, 0.0, 0.0])  # expert 0's largest logits are on padding
    load = (route(make(cls), logits).gates != 0).sum(dim=1)[:, 0]
    expected = (expert_choice(logits, MASK, 2) != 0).sum(dim=1)[:, 0]
    assert torch.equal(load, expected), (
        "With the largest logits on padding, an expert takes "
        f"{load.tolist()} real tokens of the samples, not {expected.tolist()}: padding is "
        "selected in their place. Exclude it before the choice (`gate`)."
    )


def every_expert_takes_exactly_its_capacity(cls: type[Router]) -> None:
    for k in (1, 2):
        load = (route(make(cls, k), LOGITS).gates != 0).sum(dim=1)  # (B, E)
        real = MASK.sum(dim=1).tolist()
        expected = [[math.ceil(k * n / N_EXPERTS)] * N_EXPERTS for n in real]
        assert load.tolist() == expected, (
            f"At k = {k}, in samples of {real} real tokens, the experts take {load.tolist()} "
            f"tokens, not exactly C = ceil(k * real / E), {expected}: each expert selects, sample "
            "by sample (`gate`)."
        )


def selected_tokens_have_their_probability(cls: type[Router]) -> None:
    gates, expected = route(make(cls), LOGITS).gates, expert_choice(LOGITS, MASK, 2)
    same_experts(gates, expected, "An expert does not take the tokens with its largest "
                 "probabilities (`gate`).")  # fmt: skip
    close(gates, expected, "The gate is not the softmax over the experts: it is not over the "
          "tokens, and is not rescaled (`gate`).")  # fmt: skip


def samples_are_independent(cls: type[Router]) -> None:
    router = make(cls)
    for b in range(len(MASK)):
        alone = route(router, LOGITS[b : b + 1], MASK[b : b + 1]).gates
        in_batch = route(router, LOGITS, MASK).gates[b : b + 1]
        same_experts(alone, in_batch, "A sample is routed differently alone and in a batch: select "
                     "among the positions of one sample (`gate`).")  # fmt: skip


def gates_have_a_gradient_in_the_router(cls: type[Router]) -> None:
    router = make(cls)
    gates, weight = route(router, LOGITS).gates, router.proj.weight
    grad = torch.autograd.grad(gates.sum(), weight)[0] if gates.requires_grad else None
    assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, (
        "No gradient reaches the router through its gates: a gate of 1, or a detached one, has "
        "none (`gate`)."
    )


CHECKS = {
    1: (noise_is_absent_in_evaluation, gates_are_a_softmax_over_the_k_kept_logits,
        noise_has_the_softplus_of_its_own_weights_as_deviation, noise_is_added_before_the_choice,
        penalty_is_the_variation_of_importance),
    2: (one_expert_with_its_raw_probability, an_expert_takes_its_capacity_only,
        capacity_counts_real_tokens, capacity_is_per_sample, the_least_probable_are_dropped,
        penalty_is_share_times_probability, penalty_counts_dropped_tokens,
        gates_have_a_gradient_in_the_router),
    3: (gates_are_the_usual_top_k, penalty_is_the_mean_squared_logsumexp,
        penalty_does_not_overflow),
    4: (padding_is_never_selected, every_expert_takes_exactly_its_capacity,
        samples_are_independent, selected_tokens_have_their_probability, causal_is_declared_false,
        gates_have_a_gradient_in_the_router),
}  # fmt: skip
