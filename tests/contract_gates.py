"""What every router has to keep, part 2: the gates by themselves."""

import pytest
import torch
from contract import (
    MASK,
    PROMPT,
    Case,
    ask,
    competes,
    elsewhere,
    listens,
    per_sample,
    randn,
    same,
    usual,
)

# Values


def gates_are_fp32_of_the_right_shape(case: Case) -> None:
    routing = usual(case.router())
    for name in ("gates", "logits"):
        value = getattr(routing, name)
        shape = tuple(value.shape)
        assert shape == (3, 6, 4), f"{name} have shape {shape}; (B, T, E) is (3, 6, 4) here."
        assert value.dtype == torch.float32, f"{name} are {value.dtype}: keep the router in fp32."


def gates_are_finite_and_not_negative(case: Case) -> None:
    for router in (case.router(), case.router().train()):
        gates = usual(router).gates
        assert gates.isfinite().all(), "A gate is NaN or infinite: look for 0 / 0 and log(0)."
        assert (gates >= 0).all(), "A gate is negative: an expert would be subtracted."


def no_token_visits_more_than_k_experts(case: Case) -> None:
    if not case.cls.at_most_k:
        pytest.skip("at_most_k = False: a token may visit more than k experts")
    for k in (1, 2, 3):
        visits = (usual(case.router(k=k)).gates != 0).sum(dim=-1)
        assert (visits <= k).all(), f"A token visits {visits.max()} experts and k is {k}."
    visits = (ask(case.reader(), torch.zeros(2, 3, 4)).gates != 0).sum(dim=-1)
    assert (visits <= 2).all(), "With equal logits a token visits more than k experts: use topk."


def every_real_token_visits_an_expert(case: Case) -> None:
    if case.cls.may_drop:
        pytest.skip("may_drop = True: a token may visit nobody")
    for x in (randn(3, 6, 16), randn(1, 1, 16).expand(3, 6, 16)):
        visits = (usual(case.router(), x).gates != 0).any(dim=-1)[MASK]
        assert visits.all(), "In evaluation a real token visits no expert: set may_drop, or serve."


def gates_sum_to_one_where_declared(case: Case) -> None:
    routers = [r for k in (1, 2, 3) if (r := case.router(k=k)).sums_to_one]
    if not routers:
        pytest.skip("sums_to_one = False: the gates may have any sum")
    for router in routers:
        total = usual(router).gates.sum(dim=-1)[MASK]
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5), (
            f"sums_to_one is declared; with k = {router.top_k} a token's gates add up to "
            f"{total[0]:.3f}."
        )


def one_token_or_none_is_enough(case: Case) -> None:
    empty = torch.zeros(2, 3).bool()
    for router in (case.router(), case.router().train()):
        gates = ask(router, randn(2, 3, 16), empty, prompt=empty).gates
        assert gates.eq(0).all(), "In a batch of padding alone somebody is visited."
        routing = ask(router, randn(1, 1, 16))
        assert routing.gates.isfinite().all(), "The gates of a single token are not finite."
        assert torch.as_tensor(routing.penalty).isfinite(), "One token makes the penalty NaN."
        if case.level == "token":
            shape = tuple(ask(router, randn(2, 0, 16)).gates.shape)
            assert shape == (2, 0, 4), f"No tokens have gates of shape {shape}, not (2, 0, 4)."


def one_expert_and_all_experts_are_possible(case: Case) -> None:
    for n_experts, k in ((1, 1), (4, 4)):
        gates = usual(case.router(n_experts=n_experts, k=k)).gates
        assert gates.shape[-1] == n_experts and gates.isfinite().all(), (
            f"With E = {n_experts} and k = {k} the gates are not finite."
        )


def large_and_equal_logits_stay_finite(case: Case) -> None:
    for x in (1e4 * randn(2, 3, 4), torch.full((2, 3, 4), 1e4), torch.zeros(2, 3, 4)):
        routing = ask(case.reader().train(), x)
        assert routing.gates.isfinite().all(), "Logits of 1e4, or equal ones, make a gate NaN."
        assert torch.as_tensor(routing.penalty).isfinite(), "Such logits make the penalty NaN."


def a_sure_router_says_so(case: Case) -> None:
    if not listens(case):
        pytest.skip("the logits do not decide")
    # Every expert is wanted equally often, or a router that shares out seats could not oblige.
    wanted = torch.arange(4)[:, None] + torch.arange(4) * (not per_sample(case))  # (4, 4)
    is_wanted = torch.eye(4)[wanted % 4]  # (4, 4, E)
    gates = ask(case.reader(), 100 * is_wanted - 50).gates
    share = ((gates * is_wanted).sum() / gates.sum().clamp(min=1e-9)).item()
    assert share > 0.9, (
        f"One logit is 100 above the others, and its expert has {share:.2f} of the gates: is "
        "there a softmax too many, or one over the wrong axis?"
    )


def close_calls_are_decided_in_fp32(case: Case) -> None:
    if not listens(case) or competes(case):
        pytest.skip("the logits of a token do not decide, or not alone")
    ahead = 1e-4 * torch.tensor([1.0, 0.0, 0.0, 0.0])
    for others in (-3.0, -2.0, -1.0):
        x = torch.tensor([1.0, 1.0, others, others]).expand(1, 3, 4)
        first, second = (ask(case.reader(), x + nudge).gates for nudge in (ahead, ahead.roll(1)))
        assert not torch.equal(first, second), (
            "Two logits differ by 0.0001, and it makes no difference which is ahead: bf16 keeps 8 "
            "bits."
        )


def autocast_changes_nothing(case: Case) -> None:
    before = usual(case.router()).gates
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = usual(case.router()).gates
    assert torch.equal(before, after), "Under bf16 autocast the gates differ: compute in fp32."


# What a decision may depend on


def evaluation_is_deterministic(case: Case) -> None:
    router = case.router()
    first, second = usual(router, seed=0).gates, usual(router, seed=1).gates
    assert torch.equal(first, second), (
        "In evaluation the same input is routed in two ways: is noise drawn outside training?"
    )
    router.train()
    usual(router, seed=2)
    assert torch.equal(usual(router.eval(), seed=3).gates, first), (
        "A forward pass in training mode changes what evaluation decides: what did it leave behind?"
    )


def padding_is_not_looked_at(case: Case) -> None:
    x = randn(*MASK.shape, 16)
    for router in (case.router(), case.router().train()):
        before = usual(router, x)
        for value in (100.0, randn(int((~MASK).sum()), 16, seed=7)):
            other = x.clone()
            other[~MASK] = value
            after = usual(router, other)
            assert torch.equal(before.gates, after.gates), (
                "Other values on padding change the gates of real tokens: does padding take seats?"
            )
            assert torch.equal(*(torch.as_tensor(r.penalty) for r in (before, after))), (
                "Other values on padding change the penalty: take the mean over real tokens only."
            )
        assert before.gates[~MASK].eq(0).all(), "Padding visits an expert."


def padding_on_either_side_is_the_same(case: Case) -> None:
    x, prompt = randn(2, 4, 16), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    alone = ask(case.router(), x, prompt=prompt).gates
    for side in ((3, 0), (0, 3)):
        pad = torch.nn.functional.pad
        mask = pad(torch.ones(2, 4).bool(), side)
        longer = pad(x, (0, 0, *side), value=5.0)
        gates = ask(case.router(), longer, mask, prompt=pad(prompt, side)).gates
        assert same(gates[mask], alone.flatten(0, 1)), (
            "Padding on the left or right changes the gates: count real tokens, not positions."
        )


def a_sample_is_routed_alone_as_in_a_batch(case: Case) -> None:
    if not case.cls.batch_invariant:
        pytest.skip("batch_invariant = False: samples may depend on one another")
    # Samples alike, then others: whoever shares out seats over the batch runs out of them.
    for x in (randn(1, 6, 16).expand(3, 6, 16), randn(3, 6, 16, seed=1)):
        together = usual(case.router(), x).gates
        for b in range(3):
            hints = {"prompt": PROMPT[b : b + 1], "modality": torch.tensor([b])}
            alone = ask(case.router(), x[b : b + 1], MASK[b : b + 1], **hints).gates
            assert same(alone[0], together[b]), (
                "A sample alone is routed in another way than in a batch, and batch_invariant is "
                "True: what is summed, ranked or normalised over the batch?"
            )


def a_causal_router_does_not_look_ahead(case: Case) -> None:
    if not case.cls.causal:
        pytest.skip("causal = False: later tokens may decide")
    x = randn(*MASK.shape, 16)
    before = usual(case.router(), x).gates
    for t in range(3, 6):
        later = x.clone()
        later[:, t:] = 3.0 * randn(3, 6 - t, 16, seed=8)
        if per_sample(case):
            later[PROMPT] = x[PROMPT]
        after = usual(case.router(), later).gates
        assert same(after[:, :t], before[:, :t]), (
            f"Tokens from {t} on change, and so do gates before {t}, though causal is True."
        )


def position_by_position_is_as_all_at_once(case: Case) -> None:
    if not case.cls.causal:
        pytest.skip("causal = False: nothing is generated with it")
    router, x = case.router(), randn(2, 6, 16)
    prompt = torch.ones(2, 6).bool()
    prompt[:, 3:] = False
    whole = ask(router, x, prompt=prompt).gates
    routing = ask(router, x[:, :3], prompt=prompt[:, :3])
    parts = [routing.gates]
    for t in range(3, 6):
        routing = ask(router, x[:, t : t + 1], held=routing.last())
        parts.append(routing.gates)
    assert same(torch.cat(parts, dim=1), whole), (
        "With the KV cache, one position at a time, the gates differ from all at once."
    )


def experts_are_alike(case: Case) -> None:
    if not listens(case):
        pytest.skip("the logits do not decide")
    router, order = case.router(n_experts=5), torch.tensor([3, 0, 4, 1, 2])
    gates = usual(router).gates
    with torch.no_grad():
        for value in (*router.parameters(), *router.buffers()):
            if value.dim() and value.shape[0] == 5:
                value.copy_(value[order])
    assert same(usual(router).gates, gates[..., order]), (
        "With the experts in another order others are chosen: which expert is treated by number?"
    )


def another_process_decides_the_same(case: Case) -> None:
    specs = case.company or (case.spec,)
    name = f"{case.spec} {case.level}"
    first, second = (elsewhere(specs, seed)[name] for seed in (0, 1))
    assert first == second, (
        "Another PYTHONHASHSEED gives other gates: the order of a set is no order of experts."
    )
