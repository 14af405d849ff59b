"""The contract that every router has to fulfil, at both levels.

python -m pytest course/tests/test_router.py --router my_router.py:Mine

Without --router, all routers of routers.py. A check is a function (case) -> None: its name is the
rule, its docstring says what is usually wrong where it fails.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import IGNORE, IMAGE_ID, UserError
from engine.run import checkpoint_blocks
from model import MedMoE, generate
from moe import MLP, MoE, upcycle
from routers import ROUTERS, Hints, Router, Routing, get_router, load_balancing_loss
from tests.conftest import build, collate, randn, shake
from tests.reference import sparse_layer

ROOT = Path(__file__).parents[2]
LEVELS = ("token", "sequence")
# Three samples: unpadded, padded on the left, padded on the right; and where their prompts end.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
HINTS = Hints(prompt=PROMPT, modality=torch.arange(3))


@dataclass(frozen=True)
class Case:
    """One router at one level. `group`: all routers that one child process may hash at once."""

    spec: str
    level: str = "token"
    group: tuple[str, ...] = ()

    @property
    def cls(self) -> type[Router]:
        return get_router(self.spec)

    def router(self, d: int = 16, n_experts: int = 4, k: int = 2, seed: int = 0) -> Router:
        """In evaluation mode, with weights large enough that no two logits are nearly equal."""
        return shake(self.cls(d, n_experts, top_k=k, level=self.level), seed).eval()

    def in_both_modes(self) -> tuple[Router, Router]:
        return self.router(), self.router().train()

    def identity_router(self, k: int = 2) -> Router:
        """A router whose logits are its input: D = E = 4, the projection is the identity."""
        router = self.router(d=4, k=k)
        with torch.no_grad():
            router.proj.weight.copy_(torch.eye(4))
            router.proj.bias.zero_()
        return router

    def layer(self, k: int) -> MoE:
        return shake(upcycle(MLP(16, 24), self.router(k=k), 4, "released"))

    def model(self) -> MedMoE:
        return build(moe={"router": self.spec, "level": self.level})

    def uses_logits(self) -> bool:
        """Whether the gates depend on the logits: an oracle's or a hash router's do not."""
        router, x = self.identity_router(), randn(1, 3, 4)
        before = route(router, x).gates
        with torch.no_grad():  # other logits of the same x
            router.proj.weight.copy_(torch.eye(4).roll(1, dims=0))
        return not same_gates(before, route(router, x).gates)

    def tokens_compete(self) -> bool:
        """Whether the routing of a token may depend on that of others, as with a capacity."""
        return not (self.cls.causal and self.cls.batch_invariant)

    def routes_per_sample(self) -> bool:
        """Whether one decision, on the prompt, is used at all positions of a sample."""
        return self.level == "sequence" or "prompt" in self.cls.needs


def route(router: Router, x: Tensor, mask: Tensor | None = None, seed: int = 0, **hints) -> Routing:
    """The routing of x (B, T, D). The seed fixes the noise, if the router samples any."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    hints.setdefault("modality", torch.arange(x.shape[0]) % 4)
    torch.manual_seed(seed)
    return router(x, mask, Hints(**hints))


def route_samples(router: Router, x: Tensor | None = None, seed: int = 0) -> Routing:
    """The routing of the three samples above."""
    x = randn(*MASK.shape, router.proj.in_features) if x is None else x
    return route(router, x, MASK, seed, prompt=PROMPT)


def penalty(routing: Routing) -> Tensor:
    return torch.as_tensor(routing.penalty)


def same_gates(a: Tensor, b: Tensor) -> bool:
    """The same experts chosen, and gates that differ by rounding only."""
    return torch.equal(a != 0, b != 0) and torch.allclose(a, b, atol=1e-5, rtol=0)


def largest_slope(parameters: Iterable[Tensor]) -> float:
    return max((p.grad.abs().max().item() for p in parameters if p.grad is not None), default=0.0)


def update_with_uneven_load(router: Router, times: int = 50) -> None:
    """Many updates, each with a load of 2.0 on expert 0 and of 0.1 on the others."""
    for _ in range(times):
        router.update(torch.tensor([2.0, 0.1, 0.1, 0.1]))


def only_if(applies: bool, reason: str) -> None:
    if not applies:
        pytest.skip(reason)


def digest(case: Case) -> str:
    """A hash of a router's gates and penalty, to the bit."""
    evaluated, trained = (route_samples(router) for router in case.in_both_modes())
    values = [*evaluated.gates.flatten().tolist(), penalty(trained).item()]
    return hashlib.sha256(repr(values).encode()).hexdigest()


@lru_cache
def digests_in_new_processes(specs: tuple[str, ...]) -> list[dict[str, str]]:
    """Two of {spec and level: digest}. A process for all specs, since importing torch is slow."""
    code = f"""from course.tests.test_router import LEVELS, Case, digest
for spec in {specs!r}:
    for level in LEVELS:
        print(spec, level, digest(Case(spec, level)))"""
    env, command = {**os.environ, "PYTHONPATH": str(ROOT)}, [sys.executable, "-c", code]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command, env=env | {"PYTHONHASHSEED": n}, **pipe) for n in "01"]
    outputs = [process.communicate() for process in pair]
    assert not any(p.returncode for p in pair), f"It fails in a new process: {outputs[0][1]}"
    return [dict(line.rsplit(" ", 1) for line in out.splitlines()) for out, _ in outputs]


BALANCED = torch.eye(4)[:, None].expand(4, 3, 4)  # logits; each sample has an expert of its own
COLLAPSED = BALANCED[:1].expand(4, 3, 4)


def examples(side: str):
    prompt = [5, *[IMAGE_ID] * 4, 9, 11]
    rows = [([*prompt, 12, 13], [IGNORE] * 7 + [12, 13]), ([7, 8, 9], [IGNORE, 8, 9])]
    return collate(rows, modality=[3, 0], side=side)


class Contract:
    # Values of the gates

    def gates_are_fp32_of_the_right_shape(case: Case) -> None:
        """Gates and logits have to be (B, T, E), in torch.float32."""
        for value in route_samples(case.router())[:2]:
            assert (tuple(value.shape), value.dtype) == ((3, 6, 4), torch.float32)

    def gates_are_finite_and_not_negative(case: Case) -> None:
        """Check for 0 / 0 and log(0). A negative gate would subtract that expert's output."""
        for router in case.in_both_modes():
            gates = route_samples(router).gates
            assert gates.isfinite().all() and (gates >= 0).all()

    def no_token_is_routed_to_more_than_k_experts(case: Case) -> None:
        """If intended, set at_most_k = False. Use topk: at equal logits a threshold keeps all."""
        only_if(case.cls.at_most_k, "at_most_k = False: a token may have more than k experts")
        for k in (1, 2, 3):
            equal = route(case.identity_router(k), torch.zeros(2, 3, 4)).gates
            for gates in (route_samples(case.router(k=k)).gates, equal):
                assert ((gates != 0).sum(dim=-1) <= k).all(), f"top_k is {k}"

    def every_real_token_is_routed_to_an_expert(case: Case) -> None:
        """If it is intended that none of them takes a token, set may_drop = True."""
        only_if(not case.cls.may_drop, "may_drop = True: a token may be routed to no expert")
        for x in (randn(3, 6, 16), randn(1, 1, 16).expand(3, 6, 16)):
            assert (route_samples(case.router(), x).gates != 0).any(dim=-1)[MASK].all()

    def gates_sum_to_one_where_declared(case: Case) -> None:
        """sums_to_one has to match the gates, for every top_k: `upcycle` relies on it."""
        routers = [r for k in (1, 2, 3) if (r := case.router(k=k)).sums_to_one]
        only_if(bool(routers), "sums_to_one = False: the gates may have any sum")
        for router in routers:
            total = route_samples(router).gates.sum(dim=-1)[MASK]
            assert (total - 1).abs().max() < 1e-5, f"at top_k = {router.top_k} it is {total[0]:.3f}"

    def a_single_token_or_none_works(case: Case) -> None:
        """Gates on padding are 0. Check for 0 / 0 without tokens, and N - 1 with a single one."""
        empty = torch.zeros(2, 3).bool()
        for router in case.in_both_modes():
            assert route(router, randn(2, 3, 16), empty, prompt=empty).gates.eq(0).all()
            routing = route(router, randn(1, 1, 16))
            assert routing.gates.isfinite().all() and penalty(routing).isfinite()
            if case.level == "token":
                assert route(router, randn(2, 0, 16)).gates.shape == (2, 0, 4)

    def one_expert_and_all_experts_work(case: Case) -> None:
        """A gate is NaN or infinite if E = 1, or if top_k = E."""
        for n_experts, k in ((1, 1), (4, 4)):
            gates = route_samples(case.router(n_experts=n_experts, k=k)).gates
            assert gates.shape == (3, 6, n_experts) and gates.isfinite().all()

    def large_and_equal_logits_give_finite_values(case: Case) -> None:
        """With logits of 1e4, exp overflows: use softmax and logsumexp, which do not."""
        for x in (1e4 * randn(2, 3, 4), torch.full((2, 3, 4), 1e4), torch.zeros(2, 3, 4)):
            routing = route(case.identity_router().train(), x)
            assert routing.gates.isfinite().all() and penalty(routing).isfinite()

    def a_dominant_logit_gets_most_of_the_gate(case: Case) -> None:
        """Check for a second softmax, and for a softmax over the wrong dimension."""
        only_if(case.uses_logits(), "the gates do not depend on the logits")
        # Each expert has the largest logit equally often: otherwise a capacity would drop tokens.
        step = 0 if case.routes_per_sample() else torch.arange(4)
        is_largest = torch.eye(4)[(torch.arange(4)[:, None] + step).expand(4, 4) % 4]  # (4, 4, E)
        gates = route(case.identity_router(), 100 * is_largest - 50).gates
        share = (gates * is_largest).sum() / gates.sum().clamp(min=1e-9)
        assert share > 0.9, f"One logit is 100 above the others, its share of the gates {share:.2f}"

    def close_logits_are_compared_in_fp32(case: Case) -> None:
        """Two logits differ by 0.0001, and which is larger does not matter: bf16 is too coarse."""
        is_alone = case.uses_logits() and not case.tokens_compete()
        only_if(is_alone, "the gates of a token do not depend on its own logits alone")
        nudge = 1e-4 * torch.tensor([1.0, 0.0, 0.0, 0.0])
        for others in (-3.0, -2.0, -1.0):
            x = torch.tensor([1.0, 1.0, others, others]).expand(1, 3, 4)
            first = route(case.identity_router(), x + nudge).gates
            assert not torch.equal(first, route(case.identity_router(), x + nudge.roll(1)).gates)

    def autocast_changes_nothing(case: Case) -> None:
        """Under bf16 autocast the gates change: compute them in fp32."""
        before = route_samples(case.router()).gates
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(route_samples(case.router()).gates, before)

    # What the routing may depend on

    def evaluation_is_deterministic(case: Case) -> None:
        """Add noise only if self.training; `gate` and `penalty` must not change the state."""
        router = case.router()
        first = route_samples(router, seed=0).gates
        assert torch.equal(route_samples(router, seed=1).gates, first), "in two calls"
        route_samples(router.train(), seed=2)
        assert torch.equal(route_samples(router.eval(), seed=3).gates, first), "after training"

    def padding_does_not_affect_the_routing(case: Case) -> None:
        """Leave padding out of every sum, ranking, capacity and mean; gates on padding are 0."""
        x = randn(*MASK.shape, 16)
        for router in case.in_both_modes():
            before = route_samples(router, x)
            assert before.gates[~MASK].eq(0).all()
            for value in (100.0, randn(int((~MASK).sum()), 16, seed=7)):
                other = x.clone()
                other[~MASK] = value
                after = route_samples(router, other)
                assert torch.equal(before.gates, after.gates), "x on padding changes the gates"
                assert torch.equal(penalty(before), penalty(after)), "it changes the penalty"

    def padding_on_either_side_gives_the_same_gates(case: Case) -> None:
        """Count real tokens, not positions."""
        x, prompt = randn(2, 4, 16), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
        unpadded = route(case.router(), x, prompt=prompt).gates
        for side in ((3, 0), (0, 3)):
            mask = F.pad(torch.ones(2, 4).bool(), side)
            longer = F.pad(x, (0, 0, *side), value=5.0)
            gates = route(case.router(), longer, mask, prompt=F.pad(prompt, side)).gates
            assert same_gates(gates[mask], unpadded.flatten(0, 1)), f"with padding of {side}"

    def a_sample_is_routed_alike_alone_and_in_a_batch(case: Case) -> None:
        """Check for a sum, ranking or mean over the batch; or set batch_invariant = False."""
        only_if(case.cls.batch_invariant, "batch_invariant = False: it may depend on other samples")
        # Equal samples, then different ones: equal ones exceed a capacity shared by the batch.
        for x in (randn(1, 6, 16).expand(3, 6, 16), randn(3, 6, 16, seed=1)):
            in_batch = route_samples(case.router(), x).gates
            for b in range(3):
                hints = {"prompt": PROMPT[b : b + 1], "modality": torch.tensor([b])}
                alone = route(case.router(), x[b : b + 1], MASK[b : b + 1], **hints).gates
                assert same_gates(alone[0], in_batch[b])

    def a_causal_router_does_not_look_ahead(case: Case) -> None:
        """Later tokens change earlier gates. If it has to look ahead, set causal = False."""
        only_if(case.cls.causal, "causal = False: the routing may depend on later tokens")
        x = randn(*MASK.shape, 16)
        before = route_samples(case.router(), x).gates
        for t in range(3, 6):
            later = x.clone()
            later[:, t:] = 3.0 * randn(3, 6 - t, 16, seed=8)
            if case.routes_per_sample():
                later[PROMPT] = x[PROMPT]
            assert same_gates(route_samples(case.router(), later).gates[:, :t], before[:, :t])

    def decoding_token_by_token_gives_the_same_gates(case: Case) -> None:
        """With the KV cache, gates may depend on the token itself and on hints.previous only."""
        only_if(case.cls.causal, "causal = False: generation refuses this router")
        router, x = case.router(), randn(2, 6, 16)
        prompt = (torch.arange(6) < 3).expand(2, 6)
        whole = route(router, x, prompt=prompt).gates
        routing = route(router, x[:, :3], prompt=prompt[:, :3])
        parts = [routing.gates]
        for t in range(3, 6):
            previous = Routing(routing.gates[:, -1:], routing.logits[:, -1:])  # as the KV cache
            routing = route(router, x[:, t : t + 1], previous=previous)
            parts.append(routing.gates)
        assert same_gates(torch.cat(parts, dim=1), whole)

    def permuting_the_experts_permutes_the_gates(case: Case) -> None:
        """Check for an expert that is treated differently because of its index."""
        only_if(case.uses_logits(), "the gates do not depend on the logits")
        router, order = case.router(n_experts=5), torch.tensor([3, 0, 4, 1, 2])
        gates = route_samples(router).gates
        with torch.no_grad():
            for value in (*router.parameters(), *router.buffers()):
                if value.dim() and value.shape[0] == 5:
                    value.copy_(value[order])
        assert same_gates(route_samples(router).gates, gates[..., order])

    def a_new_process_gives_the_same_gates(case: Case) -> None:
        """Check for a set or a hash that numbers the experts: its order changes from run to run."""
        first, second = digests_in_new_processes(case.group or (case.spec,))
        assert first[f"{case.spec} {case.level}"] == second[f"{case.spec} {case.level}"]

    # The penalty, the update and the state that is saved

    def the_penalty_is_a_finite_scalar(case: Case) -> None:
        """One number for the batch: a mean over the real tokens."""
        value = penalty(route_samples(case.router().train()))
        assert value.shape == () and value.isfinite()

    def a_second_forward_pass_gives_the_same_result(case: Case) -> None:
        """Checkpointing runs `gate` and `penalty` twice: change the state in `update`."""
        router = case.router().train()
        before = {name: t.clone() for name, t in router.state_dict().items()}
        first, second = route_samples(router), route_samples(router)
        assert torch.equal(penalty(first), penalty(second)), "a value is kept between two calls"
        assert torch.equal(first.gates, second.gates)
        after = router.state_dict()
        assert not [name for name, t in before.items() if not torch.equal(t, after[name])]

    def the_penalty_has_a_gradient(case: Case) -> None:
        """Counts, such as (gates != 0).sum(), have none: use the gates or the probabilities."""
        router = case.router().train()
        value = penalty(route_samples(router))
        only_if(not case.cls.frozen and value != 0, "the router is frozen, or has no penalty")
        assert value.requires_grad
        value.backward()
        assert largest_slope(router.parameters()) > 1e-6 * value.abs()

    def the_penalty_is_not_smaller_at_collapse_than_at_balance(case: Case) -> None:
        """It rewards a router that sends all tokens to one expert: check the sign."""
        for k in (1, 2):
            router = case.identity_router(k).train()
            even, single = (penalty(route(router, 10 * x)) for x in (BALANCED, COLLAPSED))
            assert single >= even - 1e-5, f"{single:.3f} at collapse, {even:.3f} at balance"

    def the_balance_loss_is_1_at_balance_and_e_at_collapse(case: Case) -> None:
        """Each token has to be routed to the expert with its largest logit."""
        chooses = case.uses_logits() and case.cls.at_most_k and not case.tokens_compete()
        only_if(chooses, "a token's experts need not be those with its k largest logits")
        for x, expected in ((BALANCED, 1.0), (COLLAPSED, 4.0)):
            routing = route(case.identity_router(k=1), 50 * x)
            loss = load_balancing_loss(routing, torch.ones(4, 3).bool())
            assert abs(loss - expected) < 1e-3, f"load_balancing_loss is {loss:.3f}, not {expected}"

    def update_changes_buffers_only(case: Case) -> None:
        """Parameters belong to the optimizer: register a buffer for what `update` changes."""
        router = case.router()
        before = {name: p.detach().clone() for name, p in router.named_parameters()}
        update_with_uneven_load(router, times=3)
        assert not [n for n, p in router.named_parameters() if not torch.equal(p, before[n])]

    def update_changes_the_choice_and_not_the_gate_values(case: Case) -> None:
        """A bias may change which experts are chosen, but must not be part of the gates."""
        router = case.router(k=4)
        before = route_samples(router).gates
        update_with_uneven_load(router)
        after = route_samples(router).gates
        assert after.isfinite().all() and (after >= 0).all()
        is_same_choice = ((before != 0) == (after != 0)).all(dim=-1)
        assert same_gates(before[is_same_choice], after[is_same_choice])

    def the_state_dict_holds_the_whole_state(case: Case) -> None:
        """Keep what `update` changes in a buffer (register_buffer), and change it in place."""
        old, new = case.router().train(), case.router(seed=1)
        route_samples(old)
        update_with_uneven_load(old)
        new.load_state_dict(old.state_dict())
        assert torch.equal(route_samples(old.eval()).gates, route_samples(new).gates), "the gates"
        first, second = (penalty(route_samples(router.train())) for router in (old, new))
        assert torch.equal(first, second), "the penalty"

    # The router in the sparse layer and in the whole model

    def the_task_loss_has_a_gradient_in_the_router(case: Case) -> None:
        """A gate of 1 has none: keep the raw probability at k = 1, or set frozen = True."""
        only_if(not case.cls.frozen, "frozen = True: phase 3 does not train the router")
        for k in (1, 2):
            moe = case.layer(k).train()
            torch.manual_seed(0)
            y, _ = moe(randn(*MASK.shape, 16), MASK, HINTS)
            (y * randn(*y.shape, seed=2)).sum().backward()
            assert largest_slope(moe.router.parameters()) > 1e-4, f"with top_k = {k}"

    def the_layer_matches_its_definition(case: Case) -> None:
        """The layer's output is meta(x) + sum over e of gates[e] * expert_e(x)."""
        for k in (1, 2):
            moe, x = case.layer(k).eval(), randn(*MASK.shape, 16)
            y, routing = moe(x, MASK, HINTS)
            expected = sparse_layer(moe, x, routing.gates)[MASK]
            torch.testing.assert_close(y[MASK], expected, atol=1e-5, rtol=1e-5)

    def activation_checkpointing_changes_nothing(case: Case) -> None:
        """It runs `gate` twice per step, so `gate` must not change the router's state."""
        found = []
        for is_checkpointing in (False, True):
            model = case.model().train()
            if is_checkpointing:
                checkpoint_blocks(model)
            torch.manual_seed(0)
            loss = model.loss(examples("right"))
            (loss.total + sum(map(penalty, loss.routings))).backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append(grads | dict(model.named_buffers()))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def generation_works_or_is_refused(case: Case) -> None:
        """With the KV cache the tokens have to be those of one forward pass over all positions."""
        model, batch = case.model(), examples("left")
        if not case.cls.causal:
            with pytest.raises(UserError, match="cannot generate"):
                next(generate(model, batch, eos_id=1))
            return
        steps, n = generate(model, batch, eos_id=-1, max_new=3), batch.ids.shape[1]
        tokens = torch.stack([step.tokens for step in steps], dim=1)
        ids, mask = torch.cat([batch.ids, tokens], dim=1), F.pad(batch.mask, (0, 3), value=True)
        hints = Hints(prompt=F.pad(batch.mask, (0, 3)), modality=batch.modality)
        hidden, _ = model(ids, mask, batch.images, hints)
        assert torch.equal(tokens, model.decoder.lm_head(hidden[:, n - 1 : -1]).argmax(dim=-1))


CHECKS = [check for check in vars(Contract).values() if callable(check)]


def run_check(check: Callable[[Case], None], case: Case) -> None:
    """The message of a failure begins with the check's docstring."""
    try:
        check(case)
    except AssertionError as error:
        error.args = (f"{check.__doc__} {error}",)
        raise


def failures(case: Case, checks: Iterable[Callable[[Case], None]]) -> dict[str, str]:
    """{name of a check that fails: its message}. An error of any other kind is a failure too."""
    found = {}
    for check in checks:
        try:
            run_check(check, case)
        except pytest.skip.Exception:
            pass
        except Exception as error:
            found[check.__name__] = f"{type(error).__name__}: {error}"
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        spec = metafunc.config.getoption("--router")
        specs = (spec,) if spec else tuple(ROUTERS)
        cases = [Case(spec, level, specs) for spec in specs for level in LEVELS]
        ids = [f"{case.spec.replace('/', '.')}-{case.level}" for case in cases]
        metafunc.parametrize("case", cases, ids=ids)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_a_router_fulfils_the_contract(check, case):
    run_check(check, case)
    assert len(CHECKS) == 31
