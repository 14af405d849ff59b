"""One router against the contract of the seam, in sentences.

python -m pytest tests/test_router.py --router my_router.py:Mine

Without --router, all that routers.py has. `--router course/museum/...` finds what is wrong there.
"""

import inspect

import contract_gates
import contract_layer
import contract_penalty
import pytest
from contract import Case

from routers import ROUTERS

LEVELS = ("token", "sequence")


def checks_of(module):
    """Every function of the module that takes a case and nothing else: those are its checks."""
    return [
        function
        for function in vars(module).values()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and [p.annotation for p in inspect.signature(function).parameters.values()] == [Case]
        and inspect.signature(function).return_annotation is None
    ]


CHECKS = [
    check for m in (contract_gates, contract_penalty, contract_layer) for check in checks_of(m)
]


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    spec = metafunc.config.getoption("--router")
    specs = (spec,) if spec else tuple(ROUTERS)
    cases = [Case(spec, level, specs) for spec in specs for level in LEVELS]
    name = "{0.spec}-{0.level}".format
    metafunc.parametrize("case", cases, ids=[name(case).replace("/", ".") for case in cases])


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_a_router_keeps_the_contract(check, case):
    check(case)


def test_no_check_is_lost():
    assert len(CHECKS) == 31
