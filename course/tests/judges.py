"""The checks of the assignments: what the page asks for, compared with slow definitions.

A check is a function of a router class; those of assignment 1 are in the class A1. Where one fails,
its docstring is the sentence for the student, with the AssertionError's message after it.
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
RISING = torch.zeros(1, 12, E)  # all to expert 0, the last positions most of all
RISING[0, :, 0] = torch.linspace(1, 3, 12)


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
    few = [[float(f"{v:.4g}") for v in t.flatten()[:8].tolist()] for t in (found, expected)]
    assert is_close and found.isfinite().all(), f"{message} Found {few[0]}, expected {few[1]}."


def same_gates(found: Tensor, expected: Tensor, message: str = "") -> None:
    """The same experts, and then the same values, of gates (B, T, E); expected 0 on padding."""
    expected = torch.where(MASK[..., None], expected, 0.0)
    differ = ((found != 0) != (expected != 0)).nonzero().tolist()
    where = ", ".join(f"sample {b}, position {t}, expert {e}" for b, t, e in differ[:2])
    assert not differ, f"{message} The routing differs at {where}."
    close(found, expected, message)


def check_gates(cls: type[Router], definition: Callable[[int], Tensor]) -> None:
    for k in (1, 2, 3):
        gates = gates_of(make(cls, k))
        assert not gates[MASK].amax(dim=-1).eq(1).all(), f"At k = {k} every gate is 1: no gradient."
        same_gates(gates, definition(k), f"At k = {k}:")


def check_penalty(cls: type[Router], definition: Callable[..., Tensor]) -> None:
    """Value and gradient, without padding first; definition: (router, gates (R, E), logits)."""
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


def expert_choice(logits: Tensor, k: int) -> Tensor:
    """The definition, sample by sample and expert by expert."""
    gates, probs = torch.zeros_like(logits), logits.softmax(dim=-1)
    for b in range(len(logits)):
        real = MASK[b].nonzero().flatten().tolist()
        for e in range(E):
            ranked = sorted(real, key=lambda t: -probs[b, t, e])
            for t in ranked[: math.ceil(k * len(real) / E)]:
                gates[b, t, e] = probs[b, t, e]
    return gates


class A1:  # noisy top-k
    def gates_are_a_softmax_over_the_k_kept_logits(cls: type[Router]) -> None:
        """Softmax over the k kept logits, after the choice; at k = 1 over all E (`gate`)."""
        check_gates(cls, lambda k: top_k_gates(LOGITS.softmax(dim=-1), k))

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
        equal, real = torch.zeros(1, 200, E), torch.ones(1, 200).bool()
        is_chosen = (gates_of(make(cls, 1, training=True), equal, real) != 0).any(dim=1)
        assert is_chosen.all(), "With equal logits the same is always chosen: add the noise first."

    def penalty_is_the_variation_of_importance(cls: type[Router]) -> None:
        """weight * CV^2 of the sums of the gates, not of token counts (`penalty`)."""
        check_penalty(cls, lambda router, gates, _: router.weight
                      * sum(gates).var(correction=0) / sum(gates).mean() ** 2)  # fmt: skip


class A2:  # Switch
    def one_expert_with_its_raw_probability(cls: type[Router]) -> None:
        """In evaluation no token is dropped; the gate is the raw probability, not 1 (`gate`)."""
        check_gates(cls, lambda _: top_k(LOGITS.softmax(dim=-1), 1))

    def an_expert_takes_its_capacity_only(cls: type[Router]) -> None:
        """In training one expert keeps at most ceil(capacity_factor * real / E) tokens (`gate`)."""
        logits, router = RISING[:, :8], make(cls, training=True)
        for factor, capacity in ((1.0, 2), (2.0, 4), (8.0, 8), (1.25, 3)):
            router.capacity_factor = factor
            gates = gates_of(router, logits, torch.ones(1, 8).bool())
            close((gates != 0).sum(), capacity, f"8 tokens, factor {factor}:")
        likeliest = logits.softmax(dim=-1)[..., 0] * (torch.arange(8) > 4)
        close(gates[..., 0], likeliest, "The least probable tokens are dropped first.")
        kept = gates_of(router, RISING, (torch.arange(12) < 4)[None]) != 0
        close(kept.sum(), 2, "The capacity counts real tokens only, and padding uses none of it:")
        two = torch.cat([logits, logits + torch.tensor([0.5, 0, 0, 0])])
        kept = gates_of(router, two, torch.ones(2, 8).bool()) != 0
        close(kept.sum(dim=(1, 2)), torch.tensor([3, 3]), "The capacity is per sample:")

    def penalty_is_share_times_probability(cls: type[Router]) -> None:
        """weight * E * sum of f_e P_e, f_e the share of top-1 choices (`penalty`)."""
        check_penalty(cls, lambda router, _, z: router.weight
                      * load_balancing_loss(top_k(z.softmax(dim=-1), 1), z))  # fmt: skip
        router = make(cls, training=True)
        expected = router.weight * E * RISING[0].softmax(dim=-1)[:, 0].mean()
        message = "f_e counts the choices before any is dropped: use the logits."
        close(router(features(RISING), torch.ones(1, 12).bool()).penalty, expected, message)


class A3:  # z-loss
    def gates_are_the_usual_top_k(cls: type[Router]) -> None:
        """The k largest probabilities, rescaled to sum to 1 if k > 1 (`gate`)."""
        check_gates(cls, lambda k: top_k_gates(LOGITS.softmax(dim=-1), k))

    def penalty_is_the_mean_squared_logsumexp(cls: type[Router]) -> None:
        """weight * the mean of logsumexp(logits)^2, of the logits themselves (`penalty`)."""
        check_penalty(cls, lambda router, gates, logits: router.weight * z_loss(logits))
        router, large = make(cls, training=True), features(torch.full((1, 1, E), 1e3))
        found, expected = router(large, torch.ones(1, 1).bool()).penalty, (1e3 + math.log(E)) ** 2
        close(found, router.weight * expected, "The penalty overflows: use logsumexp.", atol=1)


class A4:  # expert choice
    def padding_is_never_selected(cls: type[Router]) -> None:
        """With the largest logits on padding, padding is selected: exclude it first (`gate`)."""
        logits = torch.where(MASK[..., None], LOGITS, torch.tensor([9.0, 0.0, 0.0, 0.0]))
        load = (gates_of(make(cls), logits) != 0).sum(dim=1)
        close(load, (expert_choice(LOGITS, 2) != 0).sum(dim=1), "Tokens of each expert:")

    def selected_tokens_have_their_probability(cls: type[Router]) -> None:
        """The gate is the softmax over the experts, not over the tokens, not rescaled (`gate`)."""
        check_gates(cls, lambda k: expert_choice(LOGITS, k))


class A5:  # balance without a loss
    def the_bias_changes_the_choice_of_sigmoids_only(cls: type[Router]) -> None:
        """Gates are sigmoid(logits), neither a softmax nor rescaled, nor with the bias (`gate`)."""
        check_gates(cls, lambda k: top_k(LOGITS.sigmoid(), k))
        router, scores = make(cls), LOGITS.sigmoid()
        router.bias.copy_(torch.tensor([0.6, 0.0, -0.6, 0.0]))
        gates, is_chosen = gates_of(router), top_k(scores + router.bias + 1, 2) != 0
        message = "The bias is added to the scores, not to the logits."
        same_gates((gates != 0).float(), is_chosen.float(), message)
        close(gates, torch.where(gates != 0, scores, 0.0), "The bias is in the gates.")

    def the_bias_counteracts_the_load(cls: type[Router]) -> None:
        """Add rate * sign(mean load - load) to the bias (`update`)."""
        router = make(cls, training=True)
        for times in (1, 2):
            router.update(torch.tensor([1.4, 0.5, 0.1, 0.0]))
            assert router.bias[0] < 0, "The sign is wrong: a high load has to lower the bias."
            expected = times * router.rate * torch.tensor([-1.0, 0.0, 1.0, 1.0])
            close(router.bias, expected, f"After {times} updates:", 1e-7)


class A6:  # sigmoid gates
    def sigmoids_are_rescaled(cls: type[Router]) -> None:
        """The k kept sigmoids over their sum if k > 1; a softmax gives other values (`gate`)."""
        check_gates(cls, lambda k: top_k_gates(LOGITS.sigmoid(), k))

    def sums_to_one_is_declared(cls: type[Router]) -> None:
        """sums_to_one does not match the gates: declare it as a property of top_k."""
        assert [make(cls, k).sums_to_one for k in (1, 2, 3)] == [False, True, True]


class A7:  # one route per question
    def generation_keeps_the_route(cls: type[Router]) -> None:
        """A generated token gets gates of its own: return previous.gates, if not None (`gate`)."""
        router, real = make(cls), torch.ones(2, 1).bool()
        last = Routing(gates_of(router, prompt=PROMPT)[:2, -1:], LOGITS[:2, -1:])
        close(gates_of(router, 5 * randn(2, 1, E, seed=7), real, previous=last), last.gates)

    def the_prompt_alone_decides(cls: type[Router]) -> None:
        """Pool over mask & prompt, over all real positions if prompt is None (`gate`)."""
        router = make(cls)
        for where, prompt, name in ((MASK & ~PROMPT, PROMPT, "Answer tokens change"),
                                    (~MASK, PROMPT | ~MASK, "Padding changes")):  # fmt: skip
            logits = LOGITS.clone()
            logits[where] = torch.tensor([0.0, 0.0, 0.0, 50.0])
            gates = gates_of(router, logits, prompt=prompt)
            close(gates, gates_of(router, prompt=PROMPT), f"{name} the route.")
        close(gates_of(router, prompt=None), gates_of(router, prompt=MASK), "With prompt = None:")

    def the_route_follows_the_mean_logits(cls: type[Router]) -> None:
        """The route is top-k of the mean logits' softmax: the softmax after the mean (`gate`)."""
        means = torch.stack([sum(LOGITS[b, PROMPT[b]]) / PROMPT[b].sum() for b in range(3)])
        expected = top_k_gates(means.softmax(dim=-1)[:, None], 2).expand_as(LOGITS)
        same_gates(gates_of(make(cls), prompt=PROMPT), expected, "All positions are routed alike.")

    def penalty_is_local_and_global_entropy(cls: type[Router]) -> None:
        """weight * (mean entropy of a token + log E - entropy of the mean): minimise the first."""
        found = make(cls, training=True).penalty(LOGITS, LOGITS, MASK, LOGITS)
        if isinstance(found, float):
            pytest.skip("optional, not implemented")

        def definition(router: Router, _, logits: Tensor) -> Tensor:
            probs = logits.softmax(dim=-1)
            each, mean = torch.special.entr(probs).sum(dim=-1), sum(probs) / len(probs)
            return router.weight * (each.mean() + math.log(E) - torch.special.entr(mean).sum())

        check_penalty(cls, definition)


class A8:  # ReLU
    def gates_are_relu(cls: type[Router]) -> None:
        """The gates are relu(logits): there is no top-k and no rescaling (`gate`)."""
        check_gates(cls, lambda k: LOGITS.clamp(min=0))

    def penalty_is_the_mean_l1_norm(cls: type[Router]) -> None:
        """coefficient * the mean over real tokens of the sum of a token's gates (`penalty`)."""
        check_penalty(cls, lambda r, gates, _: r.coefficient * sum(gates).sum() / len(gates))

    def the_coefficient_aims_at_k_experts_per_token(cls: type[Router]) -> None:
        """coefficient *= factor^sign(sum of load - k) (`update`)."""
        for load, power in (([1, 0.9, 0.8, 0.7], 1), ([0.4, 0, 0.3, 0.1], -1), ([0.5] * 4, 0)):
            router = make(cls)
            router.coefficient.fill_(0.5)
            router.update(torch.tensor(load))
            message = f"From 0.5, with {sum(load):.1f} experts per token and k = 2:"
            close(router.coefficient, 0.5 * router.factor**power, message, 1e-6)


# Assignment -> its checks, by name.
CHECKS = {n: {f"a{n}_{name}": check for name, check in vars(checks).items() if callable(check)}
          for n, checks in enumerate((A1, A2, A3, A4, A5, A6, A7, A8), 1)}  # fmt: skip
