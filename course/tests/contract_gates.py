"""The router contract, part 2: the gates."""

import pytest
import torch

from course.tests.contract import (
    MASK,
    PROMPT,
    Case,
    digests_in_a_new_process,
    randn,
    route,
    route_samples,
    routes_per_sample,
    same_gates,
    tokens_compete,
    uses_logits,
)
from routers import Routing

# Values


def gates_are_fp32_of_the_right_shape(case: Case) -> None:
    routing = route_samples(case.router())
    for name in ("gates", "logits"):
        value = getattr(routing, name)
        shape = tuple(value.shape)
        assert shape == (3, 6, 4), f"{name} have shape {shape}; expected (B, T, E) = (3, 6, 4)."
        assert value.dtype == torch.float32, f"{name} are {value.dtype}; expected torch.float32."


def gates_are_finite_and_not_negative(case: Case) -> None:
    for router in (case.router(), case.router().train()):
        gates = route_samples(router).gates
        assert gates.isfinite().all(), "A gate is NaN or infinite. Check for 0 / 0 and log(0)."
        assert (gates >= 0).all(), (
            "A gate is negative, so the layer would subtract that expert's output."
        )


def no_token_is_routed_to_more_than_k_experts(case: Case) -> None:
    if not case.cls.at_most_k:
        pytest.skip("at_most_k = False: a token may be routed to more than k experts")
    for k in (1, 2, 3):
        n_experts = (route_samples(case.router(k=k)).gates != 0).sum(dim=-1)
        assert (n_experts <= k).all(), (
            f"A token is routed to {n_experts.max()} experts, but top_k is {k}. If that is "
            "intended, set at_most_k = False."
        )
    n_experts = (route(case.identity_router(), torch.zeros(2, 3, 4)).gates != 0).sum(dim=-1)
    assert (n_experts <= 2).all(), (
        "With equal logits a token is routed to more than top_k experts. Use topk, which breaks "
        "ties, instead of a threshold."
    )


def every_real_token_is_routed_to_an_expert(case: Case) -> None:
    if case.cls.may_drop:
        pytest.skip("may_drop = True: a token may be routed to no expert")
    for x in (randn(3, 6, 16), randn(1, 1, 16).expand(3, 6, 16)):
        is_routed = (route_samples(case.router(), x).gates != 0).any(dim=-1)[MASK]
        assert is_routed.all(), (
            "In evaluation a real token is routed to no expert. If that is intended, set "
            "may_drop = True."
        )


def gates_sum_to_one_where_declared(case: Case) -> None:
    routers = [r for k in (1, 2, 3) if (r := case.router(k=k)).sums_to_one]
    if not routers:
        pytest.skip("sums_to_one = False: the gates may have any sum")
    for router in routers:
        total = route_samples(router).gates.sum(dim=-1)[MASK]
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5), (
            f"sums_to_one is True, but with top_k = {router.top_k} a token's gates sum to "
            f"{total[0]:.3f}."
        )


def a_single_token_or_none_works(case: Case) -> None:
    empty = torch.zeros(2, 3).bool()
    for router in (case.router(), case.router().train()):
        gates = route(router, randn(2, 3, 16), empty, prompt=empty).gates
        assert gates.eq(0).all(), (
            "In a batch of padding only, a position is routed to an expert: gates on padding must "
            "be 0."
        )
        routing = route(router, randn(1, 1, 16))
        assert routing.gates.isfinite().all(), "With a single token a gate is NaN or infinite."
        assert torch.as_tensor(routing.penalty).isfinite(), (
            "With a single token the penalty is NaN or infinite. Check for a division by N - 1."
        )
        if case.level == "token":
            shape = tuple(route(router, randn(2, 0, 16)).gates.shape)
            assert shape == (2, 0, 4), f"For T = 0 the gates have shape {shape}, not (2, 0, 4)."


def one_expert_and_all_experts_work(case: Case) -> None:
    for n_experts, k in ((1, 1), (4, 4)):
        gates = route_samples(case.router(n_experts=n_experts, k=k)).gates
        assert gates.shape[-1] == n_experts and gates.isfinite().all(), (
            f"With E = {n_experts} and top_k = {k} a gate is NaN or infinite."
        )


def large_and_equal_logits_give_finite_values(case: Case) -> None:
    for x in (1e4 * randn(2, 3, 4), torch.full((2, 3, 4), 1e4), torch.zeros(2, 3, 4)):
        routing = route(case.identity_router().train(), x)
        hint = "Use softmax and logsumexp instead of exp: they do not overflow."
        assert routing.gates.isfinite().all(), (
            f"With logits of 1e4, or all equal, a gate is NaN or infinite. {hint}"
        )
        assert torch.as_tensor(routing.penalty).isfinite(), (
            f"With logits of 1e4, or all equal, the penalty is NaN or infinite. {hint}"
        )


def a_dominant_logit_gets_most_of_the_gate(case: Case) -> None:
    if not uses_logits(case):
        pytest.skip("the gates do not depend on the logits")
    # Each expert has the largest logit equally often: otherwise a capacity would drop tokens.
    expert = torch.arange(4)[:, None] + torch.arange(4) * (not routes_per_sample(case))  # (4, 4)
    is_largest = torch.eye(4)[expert % 4]  # (4, 4, E)
    gates = route(case.identity_router(), 100 * is_largest - 50).gates
    share = ((gates * is_largest).sum() / gates.sum().clamp(min=1e-9)).item()
    assert share > 0.9, (
        f"One logit is 100 above the others, but its expert gets only {share:.2f} of the sum of "
        "the gates. Check for a second softmax, and for a softmax over the wrong dimension."
    )


def close_logits_are_compared_in_fp32(case: Case) -> None:
    if not uses_logits(case) or tokens_compete(case):
        pytest.skip("the gates of a token do not depend on its own logits alone")
    nudge = 1e-4 * torch.tensor([1.0, 0.0, 0.0, 0.0])
    for others in (-3.0, -2.0, -1.0):
        x = torch.tensor([1.0, 1.0, others, others]).expand(1, 3, 4)
        first, second = (route(case.identity_router(), x + n).gates for n in (nudge, nudge.roll(1)))
        assert not torch.equal(first, second), (
            "Two logits differ by 0.0001, and the gates do not depend on which is larger. Compute "
            "in fp32: bf16 has only 8 bits of precision."
        )


def autocast_changes_nothing(case: Case) -> None:
    before = route_samples(case.router()).gates
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = route_samples(case.router()).gates
    assert torch.equal(before, after), "Under bf16 autocast the gates change. Compute in fp32."


# What the routing may depend on


def evaluation_is_deterministic(case: Case) -> None:
    router = case.router()
    first, second = route_samples(router, seed=0).gates, route_samples(router, seed=1).gates
    assert torch.equal(first, second), (
        "In evaluation mode the same input gets different gates in two calls. Add noise only if "
        "self.training is True."
    )
    router.train()
    route_samples(router, seed=2)
    assert torch.equal(route_samples(router.eval(), seed=3).gates, first), (
        "A forward pass in training mode changes the gates in evaluation. `gate` and `penalty` "
        "must not change the router's state."
    )


def padding_does_not_affect_the_routing(case: Case) -> None:
    x = randn(*MASK.shape, 16)
    for router in (case.router(), case.router().train()):
        before = route_samples(router, x)
        for value in (100.0, randn(int((~MASK).sum()), 16, seed=7)):
            other = x.clone()
            other[~MASK] = value
            after = route_samples(router, other)
            assert torch.equal(before.gates, after.gates), (
                "Changing x on padding changes the gates of real tokens. Leave padding out of "
                "every sum, ranking and capacity."
            )
            assert torch.equal(*(torch.as_tensor(r.penalty) for r in (before, after))), (
                "Changing x on padding changes the penalty. Average over real tokens only."
            )
        assert before.gates[~MASK].eq(0).all(), "A gate on padding is not 0."


def padding_on_either_side_gives_the_same_gates(case: Case) -> None:
    x, prompt = randn(2, 4, 16), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    unpadded = route(case.router(), x, prompt=prompt).gates
    for side in ((3, 0), (0, 3)):
        pad = torch.nn.functional.pad
        mask = pad(torch.ones(2, 4).bool(), side)
        longer = pad(x, (0, 0, *side), value=5.0)
        gates = route(case.router(), longer, mask, prompt=pad(prompt, side)).gates
        assert same_gates(gates[mask], unpadded.flatten(0, 1)), (
            "Padding on the left or right changes the gates of real tokens. Count real tokens, "
            "not positions."
        )


def a_sample_is_routed_alike_alone_and_in_a_batch(case: Case) -> None:
    if not case.cls.batch_invariant:
        pytest.skip("batch_invariant = False: the routing may depend on the other samples")
    # Equal samples, then different ones: equal ones exceed a capacity shared by the batch.
    for x in (randn(1, 6, 16).expand(3, 6, 16), randn(3, 6, 16, seed=1)):
        in_batch = route_samples(case.router(), x).gates
        for b in range(3):
            hints = {"prompt": PROMPT[b : b + 1], "modality": torch.tensor([b])}
            alone = route(case.router(), x[b : b + 1], MASK[b : b + 1], **hints).gates
            assert same_gates(alone[0], in_batch[b]), (
                "A sample gets other gates alone than in a batch, but batch_invariant is True. "
                "Check for a sum, ranking or normalisation over the batch dimension."
            )


def a_causal_router_does_not_look_ahead(case: Case) -> None:
    if not case.cls.causal:
        pytest.skip("causal = False: the routing may depend on later tokens")
    x = randn(*MASK.shape, 16)
    before = route_samples(case.router(), x).gates
    for t in range(3, 6):
        later = x.clone()
        later[:, t:] = 3.0 * randn(3, 6 - t, 16, seed=8)
        if routes_per_sample(case):
            later[PROMPT] = x[PROMPT]
        after = route_samples(case.router(), later).gates
        assert same_gates(after[:, :t], before[:, :t]), (
            f"Changing the tokens from position {t} on changes gates before it, but causal is "
            "True. If the router has to look ahead, set causal = False."
        )


def decoding_token_by_token_gives_the_same_gates(case: Case) -> None:
    if not case.cls.causal:
        pytest.skip("causal = False: generation refuses this router")
    router, x = case.router(), randn(2, 6, 16)
    prompt = torch.ones(2, 6).bool()
    prompt[:, 3:] = False
    whole = route(router, x, prompt=prompt).gates
    routing = route(router, x[:, :3], prompt=prompt[:, :3])
    parts = [routing.gates]
    for t in range(3, 6):
        previous = Routing(routing.gates[:, -1:], routing.logits[:, -1:])  # as the KV cache keeps
        routing = route(router, x[:, t : t + 1], previous=previous)
        parts.append(routing.gates)
    assert same_gates(torch.cat(parts, dim=1), whole), (
        "One token at a time, as in decoding with the KV cache, the gates differ from those of "
        "one pass over all positions. Gates may depend on the token itself and hints.previous."
    )


def permuting_the_experts_permutes_the_gates(case: Case) -> None:
    if not uses_logits(case):
        pytest.skip("the gates do not depend on the logits")
    router, order = case.router(n_experts=5), torch.tensor([3, 0, 4, 1, 2])
    gates = route_samples(router).gates
    with torch.no_grad():
        for value in (*router.parameters(), *router.buffers()):
            if value.dim() and value.shape[0] == 5:
                value.copy_(value[order])
    assert same_gates(route_samples(router).gates, gates[..., order]), (
        "Permuting the router's weights over the experts does not permute the gates. Check for an "
        "expert that is treated differently because of its index."
    )


def a_new_process_gives_the_same_gates(case: Case) -> None:
    specs = case.group or (case.spec,)
    name = f"{case.spec} {case.level}"
    first, second = (digests_in_a_new_process(specs, seed)[name] for seed in (0, 1))
    assert first == second, (
        "Two processes with different PYTHONHASHSEED compute different gates. Check for a set or "
        "a hash that numbers the experts: its order changes from run to run."
    )
