"""Check the solution of an assignment. --assignment 1

It checks course/a1_*.py, or the class of --router FILE.py:Class. Without --assignment, all eight
of the course. The checks of a method that is not implemented yet are skipped.
"""

from pathlib import Path

import pytest
import torch

from course.tests import judges_1_to_4, judges_5_to_8
from course.tests.judging import MASK, N_EXPERTS, make, route
from routers import get_router

ROOT = Path(__file__).parents[2]
CHECKS = judges_1_to_4.CHECKS | judges_5_to_8.CHECKS
STUBS = {
    1: "a1_noisy_top_k.py:NoisyTopK",
    2: "a2_switch.py:Switch",
    3: "a3_z_loss.py:ZLoss",
    4: "a4_expert_choice.py:ExpertChoice",
    5: "a5_loss_free.py:LossFree",
    6: "a6_sigmoid.py:Sigmoid",
    7: "a7_one_route.py:OneRoute",
    8: "a8_relu.py:ReLU",
}


def run_check(check, cls) -> None:
    """Run one check. It is skipped for a stub, even if it needs the declarations alone."""
    try:
        route(make(cls), torch.zeros(*MASK.shape, N_EXPERTS))
        check(cls)
    except NotImplementedError:
        pytest.skip("not implemented yet")
    except AssertionError as error:
        message = str(error)
        if not message:
            raise
    else:
        return
    pytest.fail(message, pytrace=False)  # the sentence alone, without a traceback of our code


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.getoption("assignment")
    if chosen is not None and chosen not in CHECKS:
        raise pytest.UsageError(f"--assignment {chosen}: must be from 1 to {len(CHECKS)}")
    numbers = CHECKS if chosen is None else [chosen]
    cases = [(n, check) for n in numbers for check in CHECKS[n]]
    ids = [f"{n}-{check.__name__}" for n, check in cases]
    metafunc.parametrize(("number", "check"), cases, ids=ids)


def test_assignment(request, number, check):
    spec = request.config.getoption("router")
    if spec and request.config.getoption("assignment") is None:
        pytest.skip("--router is checked here only together with --assignment N")
    run_check(check, get_router(spec or str(ROOT / "course" / STUBS[number])))
