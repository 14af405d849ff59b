"""The router contract, part 1: the cases, and the helpers that the checks share.

The checks are in contract_gates.py, contract_penalty.py and contract_layer.py. Run as a script,
this file prints a hash of the gates of the routers named on the command line: one of the checks
compares two such runs.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from routers import Hints, Router, Routing, get_router
from tests.conftest import shake

ROOT = Path(__file__).parents[2]

# Three samples: unpadded, padded on the left, padded on the right; and where their prompts end.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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

    def identity_router(self, n_experts: int = 4, k: int = 2) -> Router:
        """A router whose logits are its input: d_model = E, the projection is the identity."""
        router = self.router(n_experts, n_experts, k)
        with torch.no_grad():
            router.proj.weight.copy_(torch.eye(n_experts))
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


def same_gates(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """The same experts chosen, and gates that differ by rounding only."""
    return torch.equal(a != 0, b != 0) and torch.allclose(a, b, atol=tolerance, rtol=0)


def tokens_compete(case: Case) -> bool:
    """Whether the routing of a token may depend on that of other tokens, as with a capacity."""
    return not (case.cls.causal and case.cls.batch_invariant)


def routes_per_sample(case: Case) -> bool:
    """Whether one decision, on the prompt, is used at all positions of a sample."""
    return case.level == "sequence" or "prompt" in case.cls.needs


def uses_logits(case: Case) -> bool:
    """Whether the gates depend on the logits: an oracle's or a hash router's do not."""
    router, x = case.identity_router(), randn(1, 3, 4)
    before = route(router, x).gates
    with torch.no_grad():  # other logits of the same x
        router.proj.weight.copy_(torch.eye(4).roll(1, dims=0))
    return not same_gates(before, route(router, x).gates)


def copy_state(router: Router) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in router.state_dict().items()}


def changed(before: dict[str, Tensor], router: Router) -> list[str]:
    """Names of the parameters and buffers whose values have changed."""
    now = router.state_dict()
    return [n for n in sorted({*before, *now}) if not torch.equal(before[n], now[n])]


def update_with_uneven_load(router: Router, times: int = 50) -> None:
    """Many updates, each with a load of 2.0 on expert 0 and of 0.1 on the others."""
    n_experts = router.proj.out_features
    for _ in range(times):
        load = torch.full((n_experts,), 0.1)
        load[0] = 2.0
        router.update(load)


def failures(case: Case, checks: list[Callable[[Case], None]]) -> dict[str, str]:
    """{name of a check that fails: its message}. An error of any other kind is a failure too."""
    found = {}
    for check in checks:
        try:
            check(case)
        except pytest.skip.Exception:
            continue
        except Exception as error:
            found[check.__name__] = f"{type(error).__name__}: {error}"
    return found


def digest(case: Case) -> str:
    """A hash of a router's gates and penalty, to the bit."""
    gates = route_samples(case.router()).gates
    penalty = torch.as_tensor(route_samples(case.router().train()).penalty)
    values = [*gates.detach().flatten().tolist(), penalty.item()]
    return hashlib.sha256(repr(values).encode()).hexdigest()


@lru_cache
def digests_in_a_new_process(specs: tuple[str, ...], hash_seed: int) -> dict[str, str]:
    """{spec and level: digest}. One process for all specs, since importing torch is slow."""
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, *specs]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"The routers fail in a new process: {done.stderr}"
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def main() -> None:
    for spec in sys.argv[1:]:
        for level in ("token", "sequence"):
            print(spec, level, digest(Case(spec, level)))


if __name__ == "__main__":
    main()
