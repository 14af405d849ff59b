"""A folder of submissions is graded in one command, each by pytest in a child process."""

import csv
import xml.etree.ElementTree as ET

import pytest

from config import UserError
from course import grade, judge, score
from course.judge import Case, Judged
from course.tests.handed_in import GOOD

STUB = """
import pytest

def test_the_text(request):
    spec = request.config.getoption("--router")
    assert "fails" not in open(spec.rpartition(":")[0]).read(), f"{spec} must not fail"

def test_the_assignment(request):
    pytest.skip(request.config.getoption("--assignment"))
"""


def test_a_submission_is_tested_in_a_child_and_called_by_its_own_name(tmp_path):
    options = "".join(f"    parser.addoption('--{n}')\n" for n in ("router", "assignment"))
    (tmp_path / "conftest.py").write_text(f"def pytest_addoption(parser):\n{options}")
    (tmp_path / "test_stub.py").write_text(STUB)
    text, extra = GOOD + "# fails", ("--assignment", "3")
    judged = judge.judge(tmp_path / "test_stub.py", text, "Mine", "mine.py", 60, extra)
    first, *others = judged.cases
    assert first.message.startswith("AssertionError: mine.py:Mine must not fail")
    assert others == [Case("test_the_assignment", "skipped", "3")] and judged.passed == "0/1"
    with pytest.raises(UserError, match=r"^mine.py: stopped after 0.1 s"):
        judge.judge(tmp_path / "test_stub.py", text, "Mine", "mine.py", 0.1)


HANDED_IN = [  # name, text, verdict, passed in the contract, and words of the note
    ("a_cheats", "import os\n" + GOOD, "refused", "-", "line 1: imports os"),
    ("b_bytes", "\udcff", "refused", "-", "utf-8"),
    ("c_fails", GOOD + "# fails", "failed", "1/2", "test_b: gates fail"),
    ("d_hangs", GOOD + "# hangs", "stopped", "-", "d_hangs.py: stopped after 3 s"),
    ("e_good", GOOD, "passed", "2/2", ""),
    ("f_skips", GOOD + "# skips", "failed", "0/0", "no test applied"),
]


def judge_by_comment(tests, text, cls, where, limit_s, extra=()):
    """In place of judge.judge, which starts a process."""
    if "hangs" in text:
        raise UserError(f"{where}: stopped after {limit_s:g} s")
    cases = [Case("test_a", "passed"), Case("test_b", "passed"), Case("test_c", "skipped", "no")]
    if "fails" in text or extra == ("--assignment", "4"):
        cases[1] = Case("test_b", "failed", "gates\nfail")
    return Judged(cases[2:] if "skips" in text else cases)


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "judge", judge_by_comment)
    (tmp_path / "handed in").mkdir()
    for name, text, *_ in HANDED_IN:
        (tmp_path / "handed in" / f"{name}.py").write_text(text, errors="surrogateescape")
    return tmp_path / "handed in"


def test_no_submission_stops_the_others(folder, tmp_path):
    table, report = tmp_path / "grades.csv", tmp_path / "grades.xml"
    grade.main([str(folder), "--limit", "3", "--csv", str(table), "--junit", str(report)])
    rows = csv.DictReader(table.open())
    for row, (name, _, *expected, words) in zip(rows, HANDED_IN, strict=True):
        assert (row["file"], row["verdict"], row["contract"]) == (f"{name}.py", *expected)
        assert words in row["note"] and bool(words) == bool(row["note"])
    suites = ET.parse(report).getroot()
    counts = [tuple(s.get(n) for n in ("name", "tests", "failures", "skipped")) for s in suites]
    assert counts[2:5] == [("c_fails.py", "4", "1", "1"), ("d_hangs.py", "2", "1", "0"),
                           ("e_good.py", "4", "0", "1")]  # fmt: skip
    formula = grade.row_of(grade.Grade("=1+1", note="a=1"))
    assert (formula[0], formula[-1]) == ("'=1+1", "a=1"), "a spreadsheet would evaluate it"


def test_the_tests_of_an_assignment_and_the_score_are_columns(folder, monkeypatch):
    def scored(spec, flags, contract):
        assert (flags.student, flags.seeds, contract) == ("e_good", 2, "2/2")
        return {"val_loss": 0.123456, "hash": "abc"}

    monkeypatch.setattr(score, "score", scored)
    flags = {"folder": str(folder), "assignment": 3, "score": True, "seeds": 2}
    done = grade.grade_file(folder / "e_good.py", grade.GradeConfig(**flags))
    assert (done.assignment, done.val_loss, done.hash) == ("2/2", 0.1235, "abc")
    done = grade.grade_file(folder / "e_good.py", grade.GradeConfig(**flags | {"assignment": 4}))
    assert (done.contract, done.assignment, done.verdict) == ("2/2", "1/2", "failed")


@pytest.mark.parametrize("flags", [["absent"], [".", "--limit", "0"]])
def test_a_mistake_of_the_lecturer_is_exit_code_2(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        grade.main(flags)
