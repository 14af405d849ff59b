"""What every router has to keep, part 1: the case to be judged, and how a router is asked.

The checks are in contract_gates.py and contract_layer.py. Run as a script, this file prints what
the routers named on the command line decide: test_router.py compares two such runs.
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
from conftest import shake
from torch import Tensor

from routers import Hints, Router, Routing, get_router

ROOT = Path(__file__).parent.parent

# Three samples: whole, padded on the left, padded on the right; and where their prompts end.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One router at one level. `company`: the routers that one more process may judge at once."""

    spec: str
    level: str = "token"
    company: tuple[str, ...] = ()

    @property
    def cls(self) -> type[Router]:
        return get_router(self.spec)

    def router(self, d: int = 16, n_experts: int = 4, k: int = 2, seed: int = 0) -> Router:
        """In evaluation mode, with weights large enough that choices are no ties."""
        return shake(self.cls(d, n_experts, top_k=k, level=self.level), seed).eval()

    def reader(self, n_experts: int = 4, k: int = 2) -> Router:
        """A router whose logits are its input: d_model = E, the projection is the identity."""
        router = self.router(n_experts, n_experts, k)
        with torch.no_grad():
            router.proj.weight.copy_(torch.eye(n_experts))
            router.proj.bias.zero_()
        return router


def ask(router: Router, x: Tensor, mask: Tensor | None = None, seed: int = 0, **hints) -> Routing:
    """The decision on x (B, T, D). Whatever noise is drawn begins from the seed."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    hints.setdefault("modality", torch.arange(x.shape[0]) % 4)
    torch.manual_seed(seed)
    return router(x, mask, Hints(**hints))


def usual(router: Router, x: Tensor | None = None, seed: int = 0) -> Routing:
    """The decision on the three samples above."""
    x = randn(*MASK.shape, router.proj.in_features) if x is None else x
    return ask(router, x, MASK, seed, prompt=PROMPT)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """The same visits, and gates that differ by rounding only."""
    return torch.equal(a != 0, b != 0) and torch.allclose(a, b, atol=tolerance, rtol=0)


def competes(case: Case) -> bool:
    """Whether tokens share out seats, so that what one is given depends on what others want."""
    return not (case.cls.causal and case.cls.batch_invariant)


def per_sample(case: Case) -> bool:
    """Whether one decision, on the prompt, serves all positions of a sample."""
    return case.level == "sequence" or "prompt" in case.cls.needs


def listens(case: Case) -> bool:
    """Whether the logits decide at all: they do not for an oracle or a hash."""
    router, x = case.reader(), randn(1, 3, 4)
    before = ask(router, x).gates
    with torch.no_grad():  # other logits of the same x
        router.proj.weight.copy_(torch.eye(4).roll(1, dims=0))
    return not same(before, ask(router, x).gates)


def state(router: Router) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in router.state_dict().items()}


def changed(before: dict[str, Tensor], router: Router) -> list[str]:
    """Names of the parameters and buffers that are not what they were."""
    now = router.state_dict()
    return [n for n in sorted({*before, *now}) if not torch.equal(before[n], now[n])]


def unevenly(router: Router, times: int = 50) -> None:
    """Many updates after steps in which expert 0 had most of the visits."""
    n_experts = router.proj.out_features
    for _ in range(times):
        visits = torch.full((n_experts,), 0.1)
        visits[0] = 2.0
        router.update(visits)


def failures(case: Case, checks: list[Callable[[Case], None]]) -> dict[str, str]:
    """Which checks fail, by name, and what each says. One that raises anything else fails too."""
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
    """What a router decides, gates and penalty, to the bit."""
    gates = usual(case.router()).gates
    penalty = torch.as_tensor(usual(case.router().train()).penalty)
    values = [*gates.detach().flatten().tolist(), penalty.item()]
    return hashlib.sha256(repr(values).encode()).hexdigest()


@lru_cache
def elsewhere(specs: tuple[str, ...], hash_seed: int) -> dict[str, str]:
    """{spec and level: digest} from one process of its own; the slow part is importing torch."""
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, *specs]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"the routers do not run in a process of their own: {done.stderr}"
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def main() -> None:
    for spec in sys.argv[1:]:
        for level in ("token", "sequence"):
            print(spec, level, digest(Case(spec, level)))


if __name__ == "__main__":
    main()
