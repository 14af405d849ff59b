"""The checks of the assignments: what the page asks for, compared with slow definitions.

A check is a function of a router class; those of assignment 1 are in the class A1. Where one fails,
its docstring is the sentence for the student, with the AssertionError's message after it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from routers import Hints, Router, Routing
from tests.conftest import randn
from tests.reference import load_balancing_loss, top_k, top_k_gates, z_loss

E = 4  # experts
# Three samples of 8 positions: unpadded, padded on the left, padded on the right; their prompts.
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [1] * 3 + [0] * 5]).bool()
PROMPT = torch.tensor([[1] * 5 + [0] * 3, [0] * 3 + [1] * 2 + [0] * 3, [1] * 2 + [0] * 6]).bool()
SEEDS = range(8)  # each gives another batch of random logits
LOGITS = 1.5 * randn(*MASK.shape, E, seed=1)
RISING = torch.zeros(1, 12, E)  # all to expert 0, the last positions most of all
RISING[0, :, 0] = torch.linspace(1, 3, 12)


def make(cls: type[Router], k: int = 2, training: bool = False) -> Router:
    """A router whose logits are the first E features of x, negated; one more feature is 1."""
    torch.manual_seed(0)
    router = cls(E + 1, E, top_k=k)
    with torch.no_grad():
        router.proj.weight.copy_(-torch.eye(E, E + 1))
        router.proj.bias.zero_()
    return router.train(training)


def features(logits: Tensor) -> Tensor:
    """logits (B, T, E) -> the x (B, T, E + 1) that has them."""
    return torch.cat([-logits, torch.ones_like(logits[..., :1])], dim=-1)


def gates_of(router: Router, logits: Tensor = LOGITS, mask: Tensor = MASK, **hints) -> Tensor:
    """The gates for these logits. Without the penalty, which may not be written yet."""
    router.penalty = lambda *_: 0.0
    gates = router(features(logits), mask, Hints(**hints)).gates
    del router.penalty
    shape = tuple(gates.shape)
    assert shape == logits.shape, f"gates have shape {shape}, not (B, T, E) = {(*logits.shape,)}."
    assert gates.isfinite().all() and (gates >= 0).all(), "A gate is NaN, infinite or negative."
    return gates


def close(found: Tensor, expected: Tensor | float, message: str = "", atol: float = 1e-5) -> None:
    """Equal up to atol; the message shows the first row that differs."""
    found, expected = found.detach(), torch.as_tensor(expected).detach()
    shapes = f"{message} Found {tuple(found.shape)}, expected {tuple(expected.shape)}."
    assert found.shape == expected.shape, shapes
    rows = [t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (found, expected)]
    if wrong := (~((rows[0] - rows[1]).abs() <= atol)).any(dim=1).nonzero().tolist():
        few = [[float(f"{v:.4g}") for v in t[wrong[0][0]][:8].tolist()] for t in rows]
        raise AssertionError(f"{message} Found {few[0]}, expected {few[1]}.".strip())


def draws() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random logits (B, T, E), mask and prompt (B, T), at first without padding; a single token."""
    for seed in SEEDS:
        chance, n_positions = Random(seed), 1 if seed == 3 else 7 + 3 * (seed % 4)
        logits = 1.5 * randn(1 + seed % 3, n_positions, E, seed=seed)
        mask, prompt = torch.zeros(2, *logits.shape[:2]).bool()
        for b in range(len(logits)):
            n = chance.randint(1, n_positions) if seed > 1 else n_positions  # real tokens
            start = chance.randint(0, n_positions - n)
            mask[b, start : start + n] = True
            prompt[b, start : start + chance.randint(1, n)] = True
        yield logits.requires_grad_(), mask, prompt


def same_gates(found: Tensor, expected: Tensor, mask: Tensor, message: str = "") -> None:
    """The same experts, and then the same values, of gates (B, T, E); expected 0 on padding."""
    expected = torch.where(mask[..., None], expected, 0.0)
    differ = ((found != 0) != (expected != 0)).nonzero().tolist()
    where = ", ".join(f"sample {b}, position {t}, expert {e}" for b, t, e in differ[:2])
    assert not differ, f"{message} The routing differs at {where}."
    close(found[mask], expected[mask], message)


def for_each_k(cls: type[Router], training: bool = False) -> list[Router]:
    return [make(cls, k, training) for k in (1, 2, 3)]


def check_gates(routers: Iterable[Router], definition: Callable[..., Tensor]) -> None:
    """Values, gradient. definition: (router, logits (n, E), prompt (n,)), one sample's -> gates."""
    for router in routers:
        for logits, mask, prompt in draws():
            expected = torch.zeros_like(logits)
            found = gates_of(router, logits, mask, prompt=prompt)
            for b, real in enumerate(mask):
                expected[b, real] = definition(router, logits[b, real], prompt[b, real])
            k = f"At k = {router.top_k}{' in training' if router.training else ''}"
            assert not found[mask].amax(dim=-1).eq(1).all(), f"{k} every gate is 1: no gradient."
            same_gates(found, expected, mask, f"{k}{'' if mask.all() else ', with padding'}:")
            weights = randn(*found.shape, seed=len(found))
            both = [(weights * gates).sum() for gates in (found, expected)]
            same_gradient(*both, logits, f"{k}: the gradient of the gates differs (a .detach()?).")


def same_gradient(found: Tensor, expected: Tensor, x: Tensor, message: str) -> None:
    assert found.requires_grad, "There is no gradient at all."
    both = [torch.autograd.grad(y, x, retain_graph=True, allow_unused=True)[0]
            for y in (found, expected)]  # fmt: skip
    scale = both[1].abs().max().clamp(min=1e-2)
    close(*((0 * x if slope is None else slope) / scale for slope in both), message, 1e-3)


def check_penalty(cls: type[Router], definition: Callable[..., Tensor]) -> None:
    """Value and gradient; definition: (router, gates (R, E), logits (R, E))."""
    for n, (logits, mask, _) in enumerate(draws()):
        x, message = features(logits), "" if mask.all() else "The penalty counts padding."
        router = make(cls, 1 + n % 3)
        for name in ("weight", "coefficient"):
            if hasattr(router, name):
                setattr(router, name, value := torch.tensor(0.1 * (n + 1)))
                assert getattr(router, name) == value, f"{name} has to stay what it is set to."
        gates = router(x, mask, Hints(prompt=mask)).gates  # in evaluation: no noise, none dropped
        found = torch.as_tensor(router.train().penalty(gates, logits, mask, x))
        expected = definition(router, gates[mask], logits[mask])
        close(found, expected, message, 1e-4 * abs(expected.item()))
        same_gradient(found, expected, logits, f"{message} The gradient differs.")


def served(logits: Tensor, capacity: int, is_top_1: bool) -> Tensor:
    """Gates (n, E): each expert takes the most probable of its tokens, or of all tokens."""
    gates, probs = torch.zeros_like(logits), logits.softmax(dim=-1)
    for e in range(E):
        queue = [t for t in range(len(logits)) if not is_top_1 or probs[t].argmax() == e]
        queue.sort(key=lambda t: -probs[t, e])
        for t in queue[:capacity]:
            gates[t, e] = probs[t, e]
    return gates


def switch(router: Router, logits: Tensor, _) -> Tensor:
    capacity = math.ceil(router.capacity_factor * len(logits) / E)
    return served(logits, capacity if router.training else len(logits), is_top_1=True)


def check_queues(router: Router) -> None:
    """How many tokens each expert keeps; a wrong rank of the tokens is named."""
    wrong, is_shared = "", True  # one queue for all experts
    for logits, mask, _ in draws():
        gates = gates_of(router, logits, mask)
        for b, real in enumerate(mask):
            kept = (gates[b] != 0).sum(dim=0).tolist()
            right = (switch(router, logits[b, real], None) != 0).sum(dim=0).tolist()
            capacity = math.ceil(router.capacity_factor * int(real.sum()) / E)
            is_shared &= sum(kept) == min(capacity, int(real.sum()))
            if kept != right:
                wrong = wrong or f"At C = {capacity} the experts keep {kept} tokens, not {right}."
    why = ("Rank a token in its own expert's queue, not among all tokens." if is_shared else
           "Is it one argsort? That gives the tokens in order, not the rank of each.")  # fmt: skip
    assert not wrong, f"{wrong} {why}"


def set_noise(router: Router, values: Tensor | float) -> None:
    """Make x W_noise these values (E,), for all x."""
    with torch.no_grad():
        router.noise.weight.zero_()[:, -1] = values


class A1:  # noisy top-k
    def gates_are_a_softmax_over_the_k_kept_logits(cls: type[Router]) -> None:
        """Softmax over the k kept logits, after the choice; at k = 1 over all E (`gate`)."""
        routers = [*for_each_k(cls), *for_each_k(cls, training=True)]
        for router in routers:
            set_noise(router, -20.0)  # next to none
        check_gates(routers, lambda r, z, _: top_k_gates(z.softmax(dim=-1), r.top_k))

    def noise_has_the_softplus_of_its_own_weights_as_deviation(cls: type[Router]) -> None:
        """The deviation of the noise is softplus(x W_noise), W_noise = self.noise (`gate`)."""
        router, deviation = make(cls, E, training=True), torch.tensor([0.2, 0.5, 1.0, 2.0])
        set_noise(router, deviation.expm1().log())  # the inverse of softplus
        logits = randn(1, 1, E, seed=2).expand(8, 1000, E)
        noise = gates_of(router, logits, torch.ones(8, 1000).bool()).clamp(min=1e-30).log() - logits
        noise = (noise[..., 1:] - noise[..., :1]).flatten(0, 1)  # a softmax: differences
        expected = (deviation[1:] ** 2 + deviation[0] ** 2).sqrt()
        close(noise.std(dim=0) / expected, torch.ones(3), "The ratio of the two:", atol=0.1)
        close(noise.mean(dim=0) / expected, torch.zeros(3), "The mean of the noise:", atol=0.1)
        equal, real = torch.zeros(1, 200, E), torch.ones(1, 200).bool()
        is_chosen = (gates_of(make(cls, 1, training=True), equal, real) != 0).any(dim=1)
        assert is_chosen.all(), "With equal logits the same is always chosen: add the noise first."

    def the_noise_has_a_gradient(cls: type[Router]) -> None:
        """The noise is learned: its deviation needs a gradient, so nothing is detached (`gate`)."""
        for seed in SEEDS:
            router, logits = make(cls, E, training=True), randn(1, 1, E, seed=seed)
            set_noise(router, raw := randn(E, seed=seed + 100))  # x W_noise
            h = gates_of(router, logits, torch.ones(1, 1).bool())[0, 0].log()
            weight = router.noise.weight
            (slope,) = torch.autograd.grad(h[1:].sum() - 3 * h[0] + 0 * weight.sum(), weight)
            assert slope.any(), "W_noise gets no gradient at all."
            # Each expert's own N(0, 1) number follows from its slope; so does the gate from them.
            normal = slope[:, -1] / raw.sigmoid() / torch.tensor([-3.0, 1, 1, 1])
            h_expected = logits[0, 0] + normal * F.softplus(raw)
            message = "The gradient is not that of N(0, 1) * softplus(x W_noise)."
            close(h - h[0], h_expected - h_expected[0], message, 1e-3)

    def penalty_is_the_variation_of_importance(cls: type[Router]) -> None:
        """weight * CV^2 of the sums of the gates, not of token counts (`penalty`)."""
        check_penalty(cls, lambda router, gates, _: router.weight
                      * sum(gates).var(correction=0) / sum(gates).mean() ** 2)  # fmt: skip


class A2:  # Switch
    def one_expert_with_its_raw_probability(cls: type[Router]) -> None:
        """In evaluation no token is dropped; the gate is the raw probability, not 1 (`gate`)."""
        check_gates(for_each_k(cls), switch)

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
        for router.capacity_factor in (0.5, 1.0, 1.25, 2.0):
            check_queues(router)
            check_gates([router], switch)

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
        check_gates(for_each_k(cls), lambda r, z, _: top_k_gates(z.softmax(dim=-1), r.top_k))

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
        expected = (MASK.sum(dim=1, keepdim=True) * 2 / E).ceil().long().expand(-1, E)
        close(load, expected, "Tokens of each expert:")

    def selected_tokens_have_their_probability(cls: type[Router]) -> None:
        """The gate is the softmax over the experts, not over the tokens, not rescaled (`gate`)."""
        check_gates(for_each_k(cls), lambda r, z, _:
                    served(z, math.ceil(r.top_k * len(z) / E), is_top_1=False))  # fmt: skip


class A5:  # balance without a loss
    def the_bias_changes_the_choice_of_sigmoids_only(cls: type[Router]) -> None:
        """Gates are sigmoid(logits), neither a softmax nor rescaled, nor with the bias (`gate`)."""

        def biased(router: Router, z: Tensor, _) -> Tensor:
            scores = z.sigmoid()
            return torch.where(top_k(scores + router.bias + 1, router.top_k) != 0, scores, 0.0)

        check_gates(routers := for_each_k(cls), biased)
        router, scores = make(cls), LOGITS.sigmoid()
        router.bias.copy_(torch.tensor([0.6, 0.0, -0.6, 0.0]))
        gates, is_chosen = gates_of(router), top_k(scores + router.bias + 1, 2) != 0
        message = "The bias is added to the scores, not to the logits."
        same_gates((gates != 0).float(), is_chosen.float(), MASK, message)
        close(gates, torch.where(gates != 0, scores, 0.0), "The bias is in the gates.")
        for router in routers:
            router.bias.copy_(0.3 * randn(E, seed=router.top_k))
        check_gates(routers, biased)

    def the_bias_counteracts_the_load(cls: type[Router]) -> None:
        """Add rate * sign(mean load - load) to the bias (`update`)."""
        router, expected = make(cls, training=True), torch.zeros(E)
        loads = [torch.tensor([1.4, 0.5, 0.1, 0.0]), *(randn(E, seed=s).abs() for s in SEEDS)]
        for n, load in enumerate(loads, 1):
            router.rate = 0.001 * n
            router.update(load)
            message = "The sign is wrong: a high load has to lower the bias."
            assert n > 1 or router.bias[0] < 0, message
            for e in range(E):
                expected[e] += router.rate * torch.sign(sum(load) / E - load[e])
            close(router.bias, expected, f"After {n} updates:", 1e-6)


class A6:  # sigmoid gates
    def sigmoids_are_rescaled(cls: type[Router]) -> None:
        """The k kept sigmoids over their sum if k > 1; a softmax gives other values (`gate`)."""
        check_gates(for_each_k(cls), lambda r, z, _: top_k_gates(z.sigmoid(), r.top_k))

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
        gates = gates_of(make(cls), prompt=PROMPT)[0]
        close(gates, gates[:1].expand_as(gates), "All positions are routed alike.")
        check_gates(for_each_k(cls), lambda r, z, prompt: top_k_gates(
            (sum(z[prompt]) / sum(prompt)).softmax(0)[None], r.top_k).expand_as(z))  # fmt: skip

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
        check_gates(for_each_k(cls), lambda r, z, _: z.clamp(min=0))

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
