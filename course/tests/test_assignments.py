"""Check the solution of an assignment: python -m pytest course/tests/test_assignments.py

--assignment 1 checks course/a1_*.py, or the class of --router FILE.py:Class; without it, all eight
of the course are checked. The checks of a method that is not implemented yet are skipped.
"""

from pathlib import Path

import pytest

from course.tests.judges import CHECKS, gates_of, make
from routers import get_router

STUBS = {1: "a1_noisy_top_k.py:NoisyTopK", 2: "a2_switch.py:Switch", 3: "a3_z_loss.py:ZLoss",
         4: "a4_expert_choice.py:ExpertChoice", 5: "a5_loss_free.py:LossFree",
         6: "a6_sigmoid.py:Sigmoid", 7: "a7_one_route.py:OneRoute",
         8: "a8_relu.py:ReLU"}  # fmt: skip


def stub(number: int) -> str:
    return f"{Path(__file__).parents[1] / STUBS[number]}"


def run_check(check, cls) -> None:
    """Run one check. It is skipped for a stub, even if it needs the declarations alone."""
    try:
        gates_of(make(cls))
        check(cls)
    except NotImplementedError:
        pytest.skip("not implemented yet")
    except AssertionError as error:  # the sentence alone, without a traceback of our code
        raise pytest.fail.Exception(f"{check.__doc__} {error}".strip(), pytrace=False) from None


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.getoption("assignment")
    if chosen is not None and chosen not in CHECKS:
        raise pytest.UsageError(f"--assignment {chosen}: must be from 1 to {len(CHECKS)}")
    numbers = CHECKS if chosen is None else [chosen]
    cases = [pytest.param(n, check, id=name) for n in numbers for name, check in CHECKS[n].items()]
    metafunc.parametrize(("number", "check"), cases)


def test_assignment(request, number, check):
    spec = request.config.getoption("router")
    if spec and request.config.getoption("assignment") is None:
        pytest.skip("--router is checked here only together with --assignment N")
    run_check(check, get_router(spec or stub(number)))
