"""The checks of the assignments pass on solutions and fail on wrong answers, if they are there."""

import hashlib
import types
from pathlib import Path
from unittest.mock import Mock

import pytest

from course import score
from course.tests import test_router as contract
from course.tests.judges import CHECKS
from course.tests.test_assignments import STUBS, run_check, stub
from routers import get_router
from sources.records import read_json

SOLUTIONS = Path(__file__).parent / "solutions"
NUMBERS = pytest.mark.parametrize("number", CHECKS)
with_solutions = pytest.mark.skipif(not SOLUTIONS.is_dir(), reason="the solutions are withheld")
pytestmark = [with_solutions, NUMBERS]


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


def test_a_solution_passes_all_checks_and_the_contract(number):
    found = outcomes(get_router(spec_of(number)), number)
    assert set(found.values()) == {"passed"}, found
    quick = [c for c in contract.CHECKS if c.__name__ != "a_new_process_gives_the_same_gates"]
    assert quick and contract.failures(contract.Case(spec_of(number)), quick) == {}


def test_a_method_that_is_missing_skips_its_checks_only(number):
    found = outcomes(get_router(stub(number)), number)
    assert set(found.values()) == {"not implemented yet"}, found
    missing = Mock(side_effect=NotImplementedError)
    members = {"penalty": missing, "update": missing}
    found = outcomes(type("GateOnly", (get_router(spec_of(number)),), members), number)
    needs_more = {n for n in found if any(w in n for w in ("penalty", "counteracts", "aims_at"))}
    assert {n for n in found if found[n] == "not implemented yet"} == needs_more < found.keys()


def test_a_wrong_answer_fails_with_its_sentence_and_every_check_fails_for_one(number):
    rows = pytest.importorskip("course.tests.wrong_answers.rows", reason="they are withheld")
    failed = set()
    for name, (words, *_) in rows.EDITS.items():
        if name.startswith(str(number)):
            (cls, text), module = rows.wrong_answer(name), types.ModuleType(name)
            exec(text, vars(module))
            found = outcomes(vars(module)[cls], number)
            assert any(words in sentence for sentence in found.values()), (name, found)
            failed |= {check for check, outcome in found.items() if outcome != "passed"}
    assert failed == CHECKS[number].keys() != set()


def test_the_rows_on_the_answers_page_are_of_todays_answers(number):
    rows = pytest.importorskip("course.tests.wrong_answers.rows", reason="they are withheld")
    solution = Path(spec_of(number).rpartition(":")[0])
    texts = {score.REFERENCE / f"a{number}.json": solution.read_text()}
    for name in rows.SCORED:
        if name.startswith(str(number)):
            texts[rows.HERE / f"{name}.json"] = rows.wrong_answer(name)[1]
    assert len(texts) == 3
    for file, text in texts.items():
        assert read_json(file, dict)["text"] == hashlib.sha256(text.encode()).hexdigest(), file.name
    lines = rows.table(number).splitlines()
    page = (Path(__file__).parents[1] / "answers.md").read_text()
    assert len(lines) == 7 and [line for line in lines if line not in page] == []


def test_one_in_twelve_mutants_of_a_solution_is_noticed(number):
    module = pytest.importorskip("course.tests.mutants", reason="it is withheld")
    mutants = [m for m in module.mutants(number) if f"{m[0]} | " not in module.EQUIVALENT]
    assert len(mutants) >= 40
    assert [name for name, cls in mutants[::12] if not module.noticed_by(cls, number)] == []
