"""The checks of the assignments: what the page asks for, compared with slow definitions.

A check is a function of a router class; those of assignment 1 are in the class A1. Where one fails,
its docstring is the sentence for the student, with the numbers of the AssertionError after it.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from routers import Hints, Router, Routing
from tests.conftest import randn
from tests.reference import load_balancing_loss, top_k, top_k_gates, z_loss

E = 4  # experts
# Three samples of 8 positions: unpadded, padded on the left, padded on the right; their prompts.
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [1] * 3 + [0] * 5]).bool()
PROMPT = torch.tensor([[1] * 5 + [0] * 3, [0] * 3 + [1] * 2 + [0] * 3, [1] * 2 + [0] * 6]).bool()
LOGITS = 1.5 * randn(*MASK.shape, E, seed=1)


def make(cls: type[Router], k: int = 2, training: bool = False) -> Router:
    """A router whose logits are the first E features of x; one more feature is 1."""
    torch.manual_seed(0)
    router = cls(E + 1, E, top_k=k)
    with torch.no_grad():
        router.proj.weight.copy_(torch.eye(E, E + 1))
        router.proj.bias.zero_()
    return router.train(training)


def features(logits: Tensor) -> Tensor:
    """logits (B, T, E) -> the x (B, T, E + 1) that has them."""
    return torch.cat([logits, torch.ones_like(logits[..., :1])], dim=-1)


def gates_of(router: Router, logits: Tensor = LOGITS, mask: Tensor = MASK, **hints) -> Tensor:
    """The gates for these logits. Without the penalty, which may not be written yet."""
    router.penalty = lambda *_: 0.0
    gates = router(features(logits), mask, Hints(**hints)).gates
    del router.penalty
    return gates


def close(found: Tensor, expected: Tensor | float, message: str = "", atol: float = 1e-5) -> None:
    found, expected = found.detach(), torch.as_tensor(expected).detach()
    is_close = found.shape == expected.shape and not ((found - expected).abs() > atol).any()
    assert is_close and found.isfinite().all(), (
        f"{message} Found {numbers(found)}, expected {numbers(expected)}."
    )


def numbers(values: Tensor) -> str:
    """A few of them, for a message."""
    few = ", ".join(f"{v:.4g}" for v in values.flatten()[:8].tolist())
    return few if values.dim() == 0 else f"[{few}{', ...' if values.numel() > 8 else ''}]"


def same_gates(found: Tensor, expected: Tensor, message: str = "") -> None:
    """The same experts, and then the same values, of gates (B, T, E); expected 0 on padding."""
    expected = torch.where(MASK[..., None], expected, 0.0)
    differ = ((found != 0) != (expected != 0)).nonzero().tolist()
    where = ", ".join(f"sample {b}, position {t}, expert {e}" for b, t, e in differ[:2])
    assert not differ, f"{message} The routing differs at {where}."
    close(found, expected, message)


def check_penalty(cls: type[Router], definition: Callable[..., Tensor]) -> None:
    """Value, then gradient by the logits; definition: (router, gates (R, E), logits) -> penalty.

    First without padding, so that with padding the message can name it as the mistake.
    """
    for mask, message in ((torch.ones_like(MASK), ""), (MASK, "The penalty counts padding.")):
        x = features(1.5 * randn(*MASK.shape, E, seed=3)).requires_grad_()
        router = make(cls)
        gates = router(x, mask, Hints(prompt=mask)).gates  # in evaluation: no noise, none dropped
        found = torch.as_tensor(router.train().penalty(gates, x[..., :E], mask, x))
        expected = definition(router, gates[mask], x[..., :E][mask])
        close(found, expected, message, 1e-4 * abs(expected.item()))
        assert found.requires_grad, "The penalty has no gradient."
        both = (torch.autograd.grad(p, x, retain_graph=True)[0] for p in (found, expected))
        close(*both, f"{message} The gradient differs.", 1e-4)


def check_buffer(cls: type[Router], name: str) -> None:
    router = make(cls)
    assert name in router.state_dict() and name in dict(router.named_buffers())


def check_gate_at_k_1(cls: type[Router], scores: Tensor) -> None:
    gates = gates_of(make(cls, 1))
    assert not gates[MASK].amax(dim=-1).eq(1).all(), "At k = 1 every gate is 1: no gradient."
    same_gates(gates, top_k(scores, 1), "At k = 1 the gate is not the score itself.")


def top_1(logits: Tensor) -> Tensor:
    return top_k(logits.softmax(dim=-1), 1)


def all_to_expert_0(n: int, n_padding: int = 0) -> tuple[Tensor, Tensor]:
    """-> logits (1, T, E), largest for expert 0 and growing with the position, and the mask."""
    logits = torch.zeros(1, n + n_padding, E)
    logits[0, :, 0] = torch.linspace(1, 3, n + n_padding)  # largest on the padding at the end
    return logits, (torch.arange(n + n_padding) < n)[None]


def expert_choice(logits: Tensor, k: int = 2) -> Tensor:
    """The definition, sample by sample and expert by expert."""
    gates, probs = torch.zeros_like(logits), logits.softmax(dim=-1)
    for b in range(len(logits)):
        real = MASK[b].nonzero().flatten().tolist()
        for e in range(E):
            ranked = sorted(real, key=lambda t: -probs[b, t, e])
            for t in ranked[: math.ceil(k * len(real) / E)]:
                gates[b, t, e] = probs[b, t, e]
    return gates


def load_of(gates: Tensor) -> Tensor:
    return (gates != 0).sum(dim=1)  # (B, E)


BIAS = torch.tensor([0.6, 0.0, -0.6, 0.0])


def gates_with_bias(cls: type[Router]) -> Tensor:
    router = make(cls)
    router.bias.copy_(BIAS)
    return gates_of(router)


def gates_for(cls: type[Router], logits: Tensor, prompt: Tensor = PROMPT, k: int = 2) -> Tensor:
    return gates_of(make(cls, k), logits, prompt=prompt)


def with_logits_at(where: Tensor) -> Tensor:
    logits = LOGITS.clone()
    logits[where] = torch.tensor([0.0, 0.0, 0.0, 50.0])
    return logits


def entropy(p: Tensor) -> Tensor:
    return -sum(q * q.log() for q in p)


class A1:  # noisy top-k
    def noise_is_absent_in_evaluation(cls: type[Router]) -> None:
        """There is noise in evaluation: add it only if self.training (`gate`)."""
        router = make(cls)
        assert torch.equal(gates_of(router), gates_of(router))

    def gates_are_a_softmax_over_the_k_kept_logits(cls: type[Router]) -> None:
        """Softmax over the k kept logits, after the choice; at k = 1 over all E (`gate`)."""
        check_gate_at_k_1(cls, LOGITS.softmax(dim=-1))
        for k in (2, E):
            expected = top_k_gates(LOGITS.exp(), k)
            same_gates(gates_of(make(cls, k)), expected, f"It is not over the k = {k} kept logits.")

    def noise_has_the_softplus_of_its_own_weights_as_deviation(cls: type[Router]) -> None:
        """The deviation of the noise is softplus(x W_noise), W_noise = self.noise (`gate`)."""
        router, deviation = make(cls, E, training=True), torch.tensor([0.2, 0.5, 1.0, 2.0])
        with torch.no_grad():
            router.noise.weight.zero_()
            router.noise.weight[:, -1] = deviation.expm1().log()  # the inverse of softplus
        logits = randn(1, 1, E, seed=2).expand(8, 1000, E)
        noise = gates_of(router, logits, torch.ones(8, 1000).bool()).clamp(min=1e-30).log() - logits
        found = (noise[..., 1:] - noise[..., :1]).flatten(0, 1).std(dim=0)  # a softmax: differences
        expected = (deviation[1:] ** 2 + deviation[0] ** 2).sqrt()
        close(found / expected, torch.ones(3), "The ratio of the two:", atol=0.1)

    def noise_is_added_before_the_choice(cls: type[Router]) -> None:
        """With nearly equal logits the same expert is always chosen: add noise first (`gate`)."""
        logits = torch.tensor([0.1, 0.0, 0.0, 0.0]).expand(1, 200, E)
        gates = gates_of(make(cls, 1, training=True), logits, torch.ones(1, 200).bool())
        assert (gates != 0).any(dim=1).all()

    def penalty_is_the_variation_of_importance(cls: type[Router]) -> None:
        """weight * CV^2 of the sums of the gates, not of token counts (`penalty`)."""

        def definition(router: Router, gates: Tensor, _) -> Tensor:
            mean = sum(importance := sum(gates)) / E
            return router.weight * sum((i - mean) ** 2 for i in importance) / E / mean**2

        check_penalty(cls, definition)


class A2:  # Switch
    def one_expert_with_its_raw_probability(cls: type[Router]) -> None:
        """In evaluation no token is dropped; the gate is the raw probability, not 1 (`gate`)."""
        same_gates(gates_of(make(cls)), top_1(LOGITS))

    def an_expert_takes_its_capacity_only(cls: type[Router]) -> None:
        """In training one expert keeps at most ceil(capacity_factor * real / E) tokens (`gate`)."""
        for factor, capacity in ((1.0, 2), (1.25, 3), (2.0, 4), (8.0, 8)):
            router = make(cls, training=True)
            router.capacity_factor = factor
            kept = (gates_of(router, *all_to_expert_0(8)) != 0).sum()
            close(kept, capacity, f"8 tokens, factor {factor}:")

    def capacity_counts_real_tokens(cls: type[Router]) -> None:
        """The capacity counts real tokens only, and padding uses none of it (`gate`)."""
        kept = gates_of(make(cls, training=True), *all_to_expert_0(4, n_padding=8)) != 0
        close(kept.sum(), 2, "4 real tokens beside 8 of padding:")

    def capacity_is_per_sample(cls: type[Router]) -> None:
        """The capacity is per sample: samples of a batch do not affect each other (`gate`)."""
        one, mask = all_to_expert_0(8)
        two = torch.cat([one, one + torch.tensor([0.5, 0, 0, 0])])
        kept = gates_of(make(cls, training=True), two, mask.expand(2, -1)) != 0
        close(kept.sum(dim=(1, 2)), torch.tensor([3, 3]), "Tokens kept of two samples:")

    def the_least_probable_are_dropped(cls: type[Router]) -> None:
        """The least probable tokens are dropped first, and the others keep their gate (`gate`)."""
        logits, mask = all_to_expert_0(8)
        kept = logits[0].softmax(dim=-1)[:, 0] * (torch.arange(8) > 4)
        close(gates_of(make(cls, training=True), logits, mask)[0, :, 0], kept)

    def penalty_is_share_times_probability(cls: type[Router]) -> None:
        """weight * E * sum of f_e P_e, f_e the share of top-1 choices (`penalty`)."""
        check_penalty(cls, lambda router, _, z: router.weight * load_balancing_loss(top_1(z), z))

    def penalty_counts_dropped_tokens(cls: type[Router]) -> None:
        """f_e counts the top-1 choices before any is dropped: use the logits (`penalty`)."""
        router, (logits, mask) = make(cls, training=True), all_to_expert_0(8)
        expected = router.weight * E * logits[0].softmax(dim=-1)[:, 0].mean()
        close(router(features(logits), mask).penalty, expected)

    def gates_have_a_gradient_in_the_router(cls: type[Router]) -> None:
        """No gradient reaches the router: a gate of 1, or a detached one, has none (`gate`)."""
        router = make(cls)
        gates = gates_of(router)
        assert gates.requires_grad
        assert torch.autograd.grad(gates.sum(), router.proj.weight)[0].abs().max() > 0


class A3:  # z-loss
    def gates_are_the_usual_top_k(cls: type[Router]) -> None:
        """The k largest probabilities, rescaled to sum to 1 if k > 1 (`gate`)."""
        for k in (1, 2, 3):
            expected = top_k_gates(LOGITS.softmax(dim=-1), k)
            same_gates(gates_of(make(cls, k)), expected, f"At k = {k}:")

    def penalty_is_the_mean_squared_logsumexp(cls: type[Router]) -> None:
        """weight * the mean of logsumexp(logits)^2, of the logits themselves (`penalty`)."""
        check_penalty(cls, lambda router, gates, logits: router.weight * z_loss(logits))

    def penalty_does_not_overflow(cls: type[Router]) -> None:
        """The penalty overflows for large logits: use logsumexp (`penalty`)."""
        router = make(cls, training=True)
        found = router(features(torch.full((1, 1, E), 1e3)), torch.ones(1, 1).bool()).penalty
        close(found, router.weight * (1e3 + math.log(E)) ** 2, atol=1)


class A4:  # expert choice
    def padding_is_never_selected(cls: type[Router]) -> None:
        """With the largest logits on padding, padding is selected: exclude it first (`gate`)."""
        logits = LOGITS.clone()
        logits[~MASK] = torch.tensor([9.0, 0.0, 0.0, 0.0])
        close(load_of(gates_of(make(cls), logits))[:, 0], load_of(expert_choice(logits))[:, 0])

    def every_expert_takes_exactly_its_capacity(cls: type[Router]) -> None:
        """Each expert selects C = ceil(k * real / E) tokens, sample by sample (`gate`)."""
        for k in (1, 2):
            expected = [[math.ceil(k * n / E)] * E for n in MASK.sum(dim=1).tolist()]
            close(load_of(gates_of(make(cls, k))), torch.tensor(expected), f"At k = {k}:")

    def samples_are_independent(cls: type[Router]) -> None:
        """Select among the positions of one sample, not of the batch (`gate`)."""
        router = make(cls)
        alone = [gates_of(router, LOGITS[b : b + 1], MASK[b : b + 1]) for b in range(len(MASK))]
        same_gates(gates_of(router), torch.cat(alone))

    def selected_tokens_have_their_probability(cls: type[Router]) -> None:
        """The gate is the softmax over the experts, not over the tokens, not rescaled (`gate`)."""
        same_gates(gates_of(make(cls)), expert_choice(LOGITS))

    def causal_is_declared_false(cls: type[Router]) -> None:
        """A token's selection depends on later tokens: the class has to declare causal = False."""
        assert not cls.causal

    gates_have_a_gradient_in_the_router = A2.gates_have_a_gradient_in_the_router


class A5:  # balance without a loss
    def scores_are_sigmoids(cls: type[Router]) -> None:
        """With bias 0 the gates are sigmoid(logits): neither a softmax nor rescaled (`gate`)."""
        for k in (1, 2):
            same_gates(gates_of(make(cls, k)), top_k(LOGITS.sigmoid(), k), f"At k = {k}:")

    def the_bias_is_a_buffer(cls: type[Router]) -> None:
        """`bias` is not a buffer, so no checkpoint holds it: use register_buffer."""
        check_buffer(cls, "bias")

    def the_bias_takes_part_in_the_choice(cls: type[Router]) -> None:
        """The bias is added to the scores, not to the logits, to choose the experts (`gate`)."""
        chosen = top_k(LOGITS.sigmoid() + BIAS + 1, 2) != 0
        same_gates((gates_with_bias(cls) != 0).float(), chosen.float())

    def the_bias_is_not_in_the_gates(cls: type[Router]) -> None:
        """The bias is in the gates: it changes the choice only (`gate`)."""
        gates = gates_with_bias(cls)
        close(gates, torch.where(gates != 0, LOGITS.sigmoid(), 0.0))

    def gate_does_not_change_the_bias(cls: type[Router]) -> None:
        """The bias changed in `gate`, which may be computed twice a step: use `update`."""
        router = make(cls, training=True)
        gates_of(router)
        assert router.bias.eq(0).all()

    def the_bias_counteracts_the_load(cls: type[Router]) -> None:
        """Add rate * sign(mean load - load) to the bias (`update`)."""
        router = make(cls)
        for times in (1, 2):
            router.update(torch.tensor([1.4, 0.5, 0.1, 0.0]))
            assert router.bias[0] < 0, "The sign is wrong: a high load has to lower the bias."
            expected = times * router.rate * torch.tensor([-1.0, 0.0, 1.0, 1.0])
            close(router.bias, expected, f"After {times} updates:", 1e-7)


class A6:  # sigmoid gates
    def one_expert_keeps_a_gradient(cls: type[Router]) -> None:
        """Do not rescale a single score (`gate`)."""
        check_gate_at_k_1(cls, LOGITS.sigmoid())

    def sigmoids_are_rescaled(cls: type[Router]) -> None:
        """The k kept sigmoids over their sum (`gate`)."""
        for k in (2, 3, E):
            gates = gates_of(make(cls, k))
            sums = gates[MASK].sum(dim=-1)
            close(sums, torch.ones_like(sums), "Divide by the sum over the k kept, not over all.")
            expected = top_k_gates(LOGITS.sigmoid(), k)
            same_gates(gates, expected, f"At k = {k}; a softmax gives other values.")

    def sums_to_one_is_declared(cls: type[Router]) -> None:
        """sums_to_one does not match the gates: declare it as a property of top_k."""
        for k in (1, 2, 3):
            assert make(cls, k).sums_to_one == (k > 1), f"At k = {k}."


class A7:  # one route per question
    def generation_keeps_the_route(cls: type[Router]) -> None:
        """A generated token gets gates of its own: return previous.gates, if not None (`gate`)."""
        last = Routing(gates_for(cls, LOGITS)[:2, -1:], LOGITS[:2, -1:])
        new, real = 5 * randn(2, 1, E, seed=7), torch.ones(2, 1).bool()
        close(gates_of(make(cls), new, real, previous=last), last.gates)

    def the_answer_does_not_change_the_route(cls: type[Router]) -> None:
        """Answer tokens change the route: pool over mask & prompt (`gate`)."""
        close(gates_for(cls, with_logits_at(MASK & ~PROMPT)), gates_for(cls, LOGITS))

    def padding_does_not_change_the_route(cls: type[Router]) -> None:
        """Padding changes the route: pool over mask & prompt, real positions only (`gate`)."""
        close(gates_for(cls, with_logits_at(~MASK), PROMPT | ~MASK), gates_for(cls, LOGITS))

    def all_positions_of_a_sample_are_routed_alike(cls: type[Router]) -> None:
        """Positions of a sample have different gates: decide once, then expand over T (`gate`)."""
        gates = gates_for(cls, LOGITS)
        for b in range(len(MASK)):
            assert len(gates[b, MASK[b]].unique(dim=0)) == 1, f"In sample {b}."

    def the_route_follows_the_mean_logits(cls: type[Router]) -> None:
        """The route is top-k of the mean logits' softmax: the softmax after the mean (`gate`)."""
        means = torch.stack([sum(LOGITS[b, PROMPT[b]]) / PROMPT[b].sum() for b in range(3)])
        for k in (1, 2):
            expected = top_k_gates(means.softmax(dim=-1)[:, None], k).expand_as(LOGITS)
            same_gates(gates_for(cls, LOGITS, k=k), expected, f"At k = {k}:")

    def no_prompt_hint_pools_all_real_positions(cls: type[Router]) -> None:
        """With prompt = None the logits are averaged over all real positions (`gate`)."""
        close(gates_for(cls, LOGITS, prompt=None), gates_for(cls, LOGITS, prompt=MASK))

    def penalty_is_local_and_global_entropy(cls: type[Router]) -> None:
        """weight * (mean entropy of a token + log E - entropy of the mean): minimise the first."""
        found = make(cls, training=True).penalty(LOGITS, LOGITS, MASK, LOGITS)
        if isinstance(found, float):
            pytest.skip("optional, not implemented")

        def definition(router: Router, _, logits: Tensor) -> Tensor:
            probs = logits.softmax(dim=-1)
            local = sum(map(entropy, probs)) / len(probs)
            return router.weight * (local + math.log(E) - entropy(sum(probs) / len(probs)))

        check_penalty(cls, definition)


class A8:  # ReLU
    def gates_are_relu(cls: type[Router]) -> None:
        """The gates are relu(logits): there is no top-k and no rescaling (`gate`)."""
        for k in (1, 2):
            same_gates(gates_of(make(cls, k)), LOGITS.clamp(min=0), f"At k = {k}:")

    def penalty_is_the_mean_l1_norm(cls: type[Router]) -> None:
        """coefficient * the mean over real tokens of the sum of a token's gates (`penalty`)."""
        check_penalty(cls, lambda r, gates, _: r.coefficient * sum(gates).sum() / len(gates))

    def the_coefficient_is_a_buffer(cls: type[Router]) -> None:
        """`coefficient` is not a buffer, so no checkpoint holds it: use register_buffer."""
        check_buffer(cls, "coefficient")

    def the_coefficient_aims_at_k_experts_per_token(cls: type[Router]) -> None:
        """coefficient *= factor^sign(sum of load - k) (`update`)."""
        for load, power in (([1, 0.9, 0.8, 0.7], 1), ([0.4, 0, 0.3, 0.1], -1), ([0.5] * 4, 0)):
            router = make(cls)
            router.coefficient.fill_(0.5)
            router.update(torch.tensor(load))
            message = f"From 0.5, with {sum(load):.1f} experts per token and k = 2:"
            close(router.coefficient, 0.5 * router.factor**power, message, 1e-6)

    def at_most_k_is_declared_false(cls: type[Router]) -> None:
        """A token may have more than k experts: the class has to declare at_most_k = False."""
        assert not cls.at_most_k


CHECKS = {  # assignment -> its checks, by name
    n: {f"a{n}_{name}": check for name, check in vars(checks).items() if callable(check)}
    for n, checks in enumerate((A1, A2, A3, A4, A5, A6, A7, A8), 1)
}
