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

SOLUTIONS, WRONG = (Path(__file__).parent / name for name in ("solutions", "wrong_answers"))
ANSWERS = sorted(WRONG.glob("*.py"))
NUMBERS = pytest.mark.parametrize("number", CHECKS)
with_solutions = pytest.mark.skipif(not SOLUTIONS.is_dir(), reason="the solutions are withheld")
with_answers = pytest.mark.skipif(not ANSWERS, reason="the wrong answers are withheld")


def spec_of(number: int, path: Path | None = None) -> str:
    path = path or SOLUTIONS / f"a{number}.py"
    return f"{path}:{STUBS[number].rpartition(':')[2]}"


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
    checks = [c for c in CONTRACT if c.__name__ != "a_new_process_gives_the_same_gates"]
    assert failures(Case(spec_of(number)), checks) == {}


@pytest.mark.slow
@with_solutions
@NUMBERS
def test_a_solution_gives_the_same_gates_in_a_new_process(number):
    checks = [c for c in CONTRACT if c.__name__ == "a_new_process_gives_the_same_gates"]
    case = Case(spec_of(number), "token", tuple(map(spec_of, CHECKS)))
    assert checks and failures(case, checks) == {}


@with_solutions
@NUMBERS
def test_a_method_that_is_missing_skips_its_checks_only(number):
    class GateOnly(get_router(spec_of(number))):
        def penalty(self, gates, logits, mask, x):
            raise NotImplementedError

        def update(self, load):
            raise NotImplementedError

    found = outcomes(GateOnly, number)
    assert len(found) > 1
    for name, outcome in found.items():
        needs_more = any(word in name for word in ("penalty", "counteracts", "aims_at"))
        assert outcome == ("not implemented yet" if needs_more else "passed"), name


@with_answers
@pytest.mark.parametrize("path", ANSWERS, ids=[path.stem for path in ANSWERS])
def test_a_wrong_answer_fails_with_the_sentence_on_its_first_line(path):
    number, words = int(path.stem[1]), path.read_text().splitlines()[0]
    found = outcomes(get_router(spec_of(number, path)), number)
    assert words.startswith("# Fails with: ")
    assert any(words.removeprefix("# Fails with: ") in sentence for sentence in found.values())


@with_answers
@NUMBERS
def test_every_check_of_an_assignment_fails_for_some_wrong_answer(number):
    wrong = [get_router(spec_of(number, p)) for p in ANSWERS if p.stem[1] == str(number)]
    failed = {n for cls in wrong for n, found in outcomes(cls, number).items() if found != "passed"}
    assert failed == set(CHECKS[number]) and len(wrong) >= 2
