"""Check a router against the contract that every router has to fulfil.

python -m pytest course/tests/test_router.py --router my_router.py:Mine

Without --router, all routers of routers.py. With `--router course/museum/...` it finds the bug.
"""

import inspect

import pytest

from course.tests import contract_gates, contract_layer, contract_penalty
from course.tests.contract import Case
from routers import ROUTERS

LEVELS = ("token", "sequence")


def checks_of(module):
    """The checks of a module: every function whose only argument is a case."""
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
def test_a_router_fulfils_the_contract(check, case):
    check(case)


def test_all_checks_are_found():
    assert len(CHECKS) == 31
