"""The checks of the assignments pass on solutions and fail on wrong answers.

python -m pytest course/tests/test_answers.py

Without the reference solutions and the wrong answers, which may be withheld, the tests skip.
"""

from pathlib import Path

import pytest

from course.tests.judges import CHECKS
from course.tests.test_assignments import STUBS, run_check, stub
from course.tests.test_router import CHECKS as CONTRACT
from course.tests.test_router import Case, failures
from routers import get_router

try:
    from course.tests.wrong_answers.table import WRONG
except ImportError:
    WRONG = {}
SOLUTIONS = Path(__file__).parent / "solutions"
NUMBERS = pytest.mark.parametrize("number", CHECKS)
with_solutions = pytest.mark.skipif(not SOLUTIONS.is_dir(), reason="the solutions are withheld")
with_answers = pytest.mark.skipif(not WRONG, reason="the wrong answers are withheld")
IN_A_PROCESS = "a_new_process_gives_the_same_gates"


def spec_of(number: int) -> str:
    return f"{SOLUTIONS / f'a{number}.py'}:{STUBS[number].rpartition(':')[2]}"


def outcomes(cls: type, number: int) -> dict[str, str]:
    """Check -> "passed", or the message of its failure or skip."""
    found = {}
    for name, check in CHECKS[number].items():
        try:
            run_check(check, cls)
            found[name] = "passed"
        except (pytest.skip.Exception, pytest.fail.Exception) as outcome:
            found[name] = str(outcome)
    return found


@NUMBERS
def test_every_check_of_a_stub_is_skipped_as_not_implemented(number):
    found = outcomes(get_router(stub(number)), number)
    assert set(found.values()) == {"not implemented yet"}, found


@with_solutions
@NUMBERS
def test_a_solution_passes_all_checks_and_the_contract(number):
    found = outcomes(get_router(spec_of(number)), number)
    assert set(found.values()) == {"passed"}, found
    checks = [c for c in CONTRACT if c.__name__ != IN_A_PROCESS]
    assert len(checks) == 30 and failures(Case(spec_of(number)), checks) == {}


@pytest.mark.slow
@with_solutions
@NUMBERS
def test_a_solution_gives_the_same_gates_in_a_new_process(number):
    (check,) = (c for c in CONTRACT if c.__name__ == IN_A_PROCESS)
    assert failures(Case(spec_of(number), "token", tuple(map(spec_of, CHECKS))), [check]) == {}


@with_solutions
@NUMBERS
def test_a_method_that_is_missing_skips_its_checks_only(number):
    def missing(self, *args):
        raise NotImplementedError

    gate_only = {"penalty": missing, "update": missing}
    found = outcomes(type("GateOnly", (get_router(spec_of(number)),), gate_only), number)
    assert len(found) > 1
    for name, outcome in found.items():
        needs_more = any(word in name for word in ("penalty", "counteracts", "aims_at"))
        assert outcome == ("not implemented yet" if needs_more else "passed"), name


@with_answers
@NUMBERS
def test_a_wrong_answer_fails_with_its_sentence_and_every_check_fails_for_one(number):
    solution, failed = get_router(spec_of(number)), set()
    for words, member, value in WRONG[number]:
        found = outcomes(type("Wrong", (solution,), {member: value}), number)
        assert any(words in sentence for sentence in found.values()), (words, found)
        failed |= {name for name, outcome in found.items() if outcome != "passed"}
    assert failed == CHECKS[number].keys() and len(WRONG[number]) > 3
