"""The contract that every router has to fulfil, at both levels.

python -m pytest course/tests/test_router.py --router my_router.py:Mine

Without --router, all routers of routers.py. A check is a function (case) -> None: its name is the
rule, its docstring says what is usually wrong where it fails.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from config import UserError
from course import contain
from course.judge import UNWRITTEN
from engine.first_gate import check_first_calls
from moe import MLP, upcycle
from routers import ROUTERS, Hints, Router, Routing, get_router
from tests.conftest import randn, shake

LEVELS = ("token", "sequence")
# Three samples: unpadded, padded on the left, padded on the right; and where their prompts end.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()


@dataclass(frozen=True)
class Case:
    """One router at one level."""

    spec: str
    level: str = "token"

    @property
    def cls(self) -> type[Router]:
        return get_router(self.spec)

    def router(self, d: int = 16, n_experts: int = 4, k: int = 2, seed: int = 0) -> Router:
        """In evaluation mode, with weights large enough that no two logits are nearly equal."""
        return shake(self.cls(d, n_experts, top_k=k, level=self.level), seed).eval()

    def identity_router(self, k: int = 2) -> Router:
        """A router whose logits are its input: D = E = 4, the projection is the identity."""
        router = self.router(d=4, k=k)
        with torch.no_grad():
            router.proj.weight.copy_(torch.eye(4))
            router.proj.bias.zero_()
        return router


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


def is_written(case: Case) -> bool:
    try:
        route_samples(case.router())
    except Exception as error:  # any other is shown by the checks
        return not isinstance(error, NotImplementedError)
    return True


def penalty(routing: Routing) -> Tensor:
    return torch.as_tensor(routing.penalty)


def same_gates(found: Tensor, expected: Tensor, message: str = "", atol: float = 1e-5) -> None:
    """The same experts chosen, and gates that differ by rounding only; prints what differs."""
    differ = ((found != 0) != (expected != 0)) | ~((found - expected).abs() <= atol)
    if rows := differ.any(dim=-1).nonzero().tolist():
        a, b = ([float(f"{g:.4g}") for g in gates[*rows[0]]] for gates in (found, expected))
        places = f"{len(rows)} of {differ[..., 0].numel()} tokens differ, the first at {rows[0]}"
        raise AssertionError(f"{message}: {places}: {a} and {b}".removeprefix(": "))


def largest_slope(router: Router) -> float:
    grads = [p.grad.abs().max().item() for p in router.parameters() if p.grad is not None]
    return max(grads, default=0.0)


def update_with_uneven_load(router: Router) -> None:
    for _ in range(50):
        router.update(torch.tensor([2.0, 0.1, 0.1, 0.1]))


def only_if(applies: bool, reason: str) -> None:
    if not applies:
        pytest.skip(reason)


class Contract:
    def the_first_calls_are_as_training_checks_them(case: Case) -> None:
        """As train.py and eval.py do: shape, dtype, sign, and nothing else may change."""
        for training in (True, False):
            router = check_first_calls(case.router().train(training))
            try:
                route_samples(router, seed=2**31 - 1)  # as no router would seed torch
                router.update(torch.tensor([2.0, 0.1, 0.1, 0.1]))
            except UserError as error:
                raise AssertionError(error) from None

    def gates_are_finite_fp32_and_not_negative(case: Case) -> None:
        """(B, T, E) in torch.float32, also if E = 1 or k = E. Check for 0 / 0 and log(0)."""
        for n_experts, k in ((4, 2), (1, 1), (4, 4)):
            for training in (False, True):
                router = case.router(n_experts=n_experts, k=k).train(training)
                gates, logits, _ = route_samples(router)
                assert gates.shape == logits.shape == (3, 6, n_experts), f"E = {n_experts}, k = {k}"
                assert gates.dtype == logits.dtype == torch.float32
                assert gates.isfinite().all() and (gates >= 0).all(), f"E = {n_experts}, k = {k}"

    def unusual_inputs_give_finite_values(case: Case) -> None:
        """Check for 0 / 0 without tokens, N - 1 with a single one, and exp of large logits."""
        large, equal, single = 1e4 * randn(2, 3, 4), torch.full((2, 3, 4), 1e4), randn(1, 1, 4)
        for router in (case.identity_router(), case.identity_router().train()):
            for x in (large, equal, torch.zeros(2, 3, 4), single):
                routing = route(router, x)
                assert routing.gates.isfinite().all() and penalty(routing).isfinite()
            empty = torch.zeros(2, 3).bool()
            assert route(router, randn(2, 3, 4), empty, prompt=empty).gates.eq(0).all()
            if case.level == "token":
                assert route(router, randn(2, 0, 4)).gates.shape == (2, 0, 4)

    def a_token_is_routed_to_one_to_k_experts(case: Case) -> None:
        """If intended, set at_most_k = False, or may_drop = True. Use topk, not a threshold."""
        for k in (1, 2, 3):
            for x in (randn(3, 6, 4), torch.zeros(3, 6, 4), randn(1, 1, 4).expand(3, 6, 4)):
                n_experts = (route_samples(case.identity_router(k), x).gates != 0).sum(dim=-1)
                assert not case.cls.at_most_k or (n_experts <= k).all(), f"top_k is {k}"
                assert case.cls.may_drop or n_experts[MASK].all(), "A token has no expert."

    def gates_sum_to_one_where_declared(case: Case) -> None:
        """sums_to_one has to match the gates, for every top_k: `upcycle` relies on it."""
        routers = [r for k in (1, 2, 3) if (r := case.router(k=k)).sums_to_one]
        only_if(bool(routers), "sums_to_one = False: the gates may have any sum")
        for router in routers:
            total = route_samples(router).gates.sum(dim=-1)[MASK]
            assert (total - 1).abs().max() < 1e-5, f"at top_k = {router.top_k} it is {total[0]:.3f}"

    def a_dominant_logit_gets_most_of_the_gate(case: Case) -> None:
        """Check for a second softmax, and for a softmax over the wrong dimension."""
        only_if(not case.cls.frozen, "frozen = True: the gates need not depend on the logits")
        largest = torch.eye(4)[:, None].expand(4, 3, 4)  # each sample has an expert of its own
        gates = route(case.identity_router(), 100 * largest - 50).gates
        share = (gates * largest).sum() / gates.sum().clamp(min=1e-9)
        assert share > 0.9, f"One logit is 100 above the others, its share of the gates {share:.2f}"

    def close_logits_are_compared_in_fp32(case: Case) -> None:
        """Two logits differ by 0.0001, and which is larger does not matter: bf16 is too coarse."""
        is_alone = not case.cls.frozen and case.cls.causal and case.cls.batch_invariant
        only_if(is_alone, "the gates of a token need not depend on its own logits alone")
        x = torch.tensor([1.0, 1.0, -2.0, -2.0]).expand(1, 3, 4)
        nudge = 1e-4 * torch.tensor([1.0, 0.0, 0.0, 0.0])
        first = route(case.identity_router(), x + nudge).gates
        assert not torch.equal(first, route(case.identity_router(), x + nudge.roll(1)).gates)

    def evaluation_is_deterministic(case: Case) -> None:
        """Add noise only if self.training; `gate` and `penalty` must not change the state."""
        router = case.router()
        first = route_samples(router, seed=0).gates
        same_gates(route_samples(router, seed=1).gates, first, "in two calls", 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same_gates(route_samples(router).gates, first, "under bf16: compute in fp32", 0)
        route_samples(router.train(), seed=2)
        same_gates(route_samples(router.eval(), seed=3).gates, first, "after training", 0)

    def padding_does_not_affect_the_routing(case: Case) -> None:
        """Leave padding out of every sum, ranking, capacity and mean; gates on padding are 0."""
        x = randn(*MASK.shape, 16)
        for router in (case.router(), case.router().train()):
            before = route_samples(router, x)
            assert before.gates[~MASK].eq(0).all()
            for value in (100.0, randn(int((~MASK).sum()), 16, seed=7)):
                other = x.clone()
                other[~MASK] = value
                after = route_samples(router, other)
                same_gates(after.gates, before.gates, "x on padding changes the gates", 0)
                assert torch.equal(penalty(before), penalty(after)), "it changes the penalty"

    def a_sample_is_routed_alike_alone_and_in_a_batch(case: Case) -> None:
        """Check for a sum, ranking or mean over the batch; or set batch_invariant = False."""
        only_if(case.cls.batch_invariant, "batch_invariant = False: it may depend on other samples")
        # Equal samples, then different ones: equal ones exceed a capacity shared by the batch.
        for x in (randn(1, 6, 16).expand(3, 6, 16), randn(3, 6, 16, seed=1)):
            in_batch = route_samples(case.router(), x).gates
            for b in range(3):  # alone without its padding
                mask, hints = MASK[b], {"modality": torch.tensor([b])}
                hints["prompt"] = PROMPT[b, mask][None]
                alone = route(case.router(), x[b, mask][None], **hints).gates
                same_gates(alone[0], in_batch[b, mask], f"sample {b} alone and in the batch")

    def a_causal_router_does_not_look_ahead(case: Case) -> None:
        """Later tokens change earlier gates. If it has to look ahead, set causal = False."""
        only_if(case.cls.causal, "causal = False: the routing may depend on later tokens")
        x = randn(*MASK.shape, 16)
        before = route_samples(case.router(), x).gates
        for t in range(3, 6):
            later = x.clone()
            later[:, t:] = 3.0 * randn(3, 6 - t, 16, seed=8)
            if case.level == "sequence" or "prompt" in case.cls.needs:  # decided on the prompt
                later[PROMPT] = x[PROMPT]
            same_gates(route_samples(case.router(), later).gates[:, :t], before[:, :t])

    def decoding_token_by_token_gives_the_same_gates(case: Case) -> None:
        """With the KV cache, gates may depend on the token itself and on hints.previous only."""
        only_if(case.cls.causal, "causal = False: generation refuses this router")
        router, x, prompt = case.router(), randn(2, 6, 16), (torch.arange(6) < 3).expand(2, 6)
        whole = route(router, x, prompt=prompt).gates
        routing = route(router, x[:, :3], prompt=prompt[:, :3])
        for t in range(3, 6):
            previous = Routing(routing.gates[:, -1:], routing.logits[:, -1:])  # as the KV cache
            routing = route(router, x[:, t : t + 1], previous=previous)
            same_gates(routing.gates, whole[:, t : t + 1], f"token {t}, decoded and in the whole")

    def permuting_the_experts_permutes_the_gates(case: Case) -> None:
        """Check for an expert that is treated differently because of its index."""
        only_if(not case.cls.frozen, "frozen = True: the gates need not depend on the logits")
        router, order = case.router(n_experts=5), torch.tensor([3, 0, 4, 1, 2])
        gates = route_samples(router).gates
        for value in router.state_dict().values():  # in every dimension that has the experts
            for dim in (i for i, size in enumerate(value.shape) if size == 5):
                value.copy_(value.index_select(dim, order))
        same_gates(route_samples(router).gates, gates[..., order])

    def a_new_process_gives_the_same_gates(case: Case) -> None:
        """Check for a set or a hash that numbers the experts: its order changes from run to run."""
        is_own_file = case.spec not in ROUTERS and case.level == "token"
        only_if(is_own_file, "it is in routers.py, or checked at the other level")
        code = f"""from course.tests.test_router import Case, contain, route_samples
contain.guard_tests()
print(route_samples({case!r}.router()).gates.tolist())"""
        env, command = {"PYTHONPATH": str(Path(__file__).parents[2])}, [sys.executable, "-c", code]
        first, second = (subprocess.check_output(command, env=os.environ | env | seed)
                         for seed in [{"PYTHONHASHSEED": n} for n in "01"])  # fmt: skip
        assert first == second

    def the_penalty_is_a_scalar_with_a_gradient(case: Case) -> None:
        """A mean over the real tokens, of gates or probabilities: counts have no gradient."""
        router = case.router().train()
        value = penalty(route_samples(router))
        assert value.shape == () and value.isfinite()
        only_if(not case.cls.frozen and value != 0, "the router is frozen, or has no penalty")
        assert value.requires_grad
        value.backward()
        assert largest_slope(router) > 1e-6 * value.abs()

    def the_penalty_is_not_smaller_at_collapse_than_at_balance(case: Case) -> None:
        """It rewards a router that sends all tokens to one expert: check its sign."""
        even = torch.eye(4).expand(4, 4, 4)  # a token of each sample to each expert
        even = even.transpose(0, 1) if case.level == "sequence" else even  # or a sample to each
        single = torch.eye(4)[:, None, None].expand(4, 4, 4, 4)  # all tokens to 0, then to 1, ...
        router, values = case.identity_router(), []
        for x in (10 * even, *10 * single):  # gates as in evaluation: without noise
            gates, logits, _ = route(router.eval(), x)
            value = router.train().penalty(gates, logits, torch.ones(4, 4).bool(), x)
            values.append(torch.as_tensor(value).item())
        balance, *collapse = values
        assert min(collapse) >= balance - 1e-5 * abs(balance), f"{collapse}, at balance {balance}"

    def a_second_forward_pass_gives_the_same_result(case: Case) -> None:
        """Checkpointing runs `gate` and `penalty` twice: change the state in `update`."""
        router = case.router().train()
        before = {name: t.clone() for name, t in router.state_dict().items()}
        first, second = route_samples(router), route_samples(router)
        assert torch.equal(penalty(first), penalty(second)), "a value is kept between two calls"
        same_gates(first.gates, second.gates, "in two calls", 0)
        after = router.state_dict()
        assert not [name for name, t in before.items() if not torch.equal(t, after[name])]

    def update_changes_the_choice_and_not_the_gate_values(case: Case) -> None:
        """A bias may change the choice, but neither the gates' values nor the parameters."""
        router = case.router(k=4)
        weights = {name: p.detach().clone() for name, p in router.named_parameters()}
        before = route_samples(router).gates
        update_with_uneven_load(router)
        changed = [n for n, p in router.named_parameters() if not torch.equal(p, weights[n])]
        assert not changed, "The optimizer's own: register a buffer for what `update` changes."
        after = route_samples(router).gates
        is_same_choice = ((before != 0) == (after != 0)).all(dim=-1)
        same_gates(before[is_same_choice], after[is_same_choice], "before and after")

    def the_state_dict_holds_the_whole_state(case: Case) -> None:
        """Keep what `update` changes in a buffer (register_buffer), and change it in place."""
        old, new = case.router().train(), case.router(seed=1)
        route_samples(old)
        update_with_uneven_load(old)
        new.load_state_dict(old.state_dict())
        same_gates(route_samples(old.eval()).gates, route_samples(new).gates, "after loading", 0)
        first, second = (penalty(route_samples(router.train())) for router in (old, new))
        assert torch.equal(first, second), "the penalty"

    def the_task_loss_has_a_gradient_in_the_router(case: Case) -> None:
        """A gate of 1 has none: keep the raw probability at k = 1, or set frozen = True."""
        only_if(not case.cls.frozen, "frozen = True: phase 3 does not train the router")
        for k in (1, 2):
            moe = shake(upcycle(MLP(16, 24), case.router(k=k), 4, "released")).train()
            torch.manual_seed(0)
            y, _ = moe(randn(*MASK.shape, 16), MASK, Hints(PROMPT, torch.arange(3)))
            (y * randn(*y.shape, seed=2)).sum().backward()
            assert largest_slope(moe.router) > 1e-4, f"with top_k = {k}"


CHECKS = [check for check in vars(Contract).values() if callable(check)]


def run_check(check: Callable[[Case], None], case: Case) -> None:
    """The message of a failure begins with the check's docstring, unless the gates are no gates."""
    try:
        check(case)
    except Exception as error:
        try:
            route_samples(check_first_calls(case.router()))
        except Exception as first:
            if found := re.search("gate returned (shape|gates that are NaN).*", str(first)):
                raise AssertionError(found[0]) from None
        if isinstance(error, AssertionError):
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
    spec = metafunc.config.getoption("--router")
    if spec and contain.FOLDER not in os.environ and not is_written(Case(spec)):
        stub = pytest.param(None, None, marks=pytest.mark.skip(reason=UNWRITTEN))
        return metafunc.parametrize(("check", "case"), [stub])  # one line for a student
    cases = [Case(name, level) for name in ([spec] if spec else ROUTERS) for level in LEVELS]
    ids = [f"{case.spec.replace('/', '.')}-{case.level}" for case in cases]
    metafunc.parametrize("case", cases, ids=ids)
    metafunc.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])


def test_a_router_fulfils_the_contract(check, case):
    only_if(is_written(case), UNWRITTEN)  # even where a declaration excuses it from this check
    try:
        run_check(check, case)
    except NotImplementedError:
        pytest.skip(UNWRITTEN)
