"""A folder of submissions is graded in one command, each by pytest in a child process."""

import csv
import re
import xml.etree.ElementTree as ET

import pytest

from config import UserError
from course import grade, judge, score
from course.judge import Case, Judged
from course.tests.handed_in import GOOD
from tests.mini import error_line

STUB = """import pytest
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


HANDED_IN = [  # name, text; verdict, passed in the contract and the assignment, words of the note
    ("a_cheats", "import os\n" + GOOD, "refused", "-", "-", "line 1: imports os"),
    ("b_bytes", "\udcff", "refused", "-", "-", "utf-8"),
    ("c_fails", GOOD + "# fails", "failed", "1/2", "2/2", "test_b: gates fail"),
    ("d_hangs", GOOD + "# hangs", "stopped", "-", "-", "d_hangs.py: stopped after 3 s"),
    ("e_good", GOOD + "class Other(Mine):\n    pass\n", "passed", "2/2", "2/2", ""),
    ("f_skips", GOOD + "# skips", "failed", "0/0", "0/0", "no test applied"),
    ("g_two", GOOD + "class B(Router):\n    pass\n", "refused", "-", "-", "one .* has Mine, B"),
    ("h_wrong", GOOD + "# wrong", "failed", "2/2", "1/2", "test_b: gates fail")]  # fmt: skip


def judge_by_comment(tests, text, cls, where, limit_s, extra=()):
    """In place of judge.judge, which starts a process."""
    if "hangs" in text:
        raise UserError(f"{where}: stopped after {limit_s:g} s")
    cases = [Case("test_a", "passed"), Case("test_b", "passed"), Case("test_c", "skipped", "no")]
    if ("wrong" if extra == ("--assignment", "3") else "fails") in text:
        cases[1] = Case("test_b", "failed", "gates\nfail")
    return Judged(cases[2:] if "skips" in text else cases)


def test_no_submission_stops_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "judge", judge_by_comment)
    monkeypatch.setattr(score, "score", lambda spec, flags, contract: {
        "val_loss": 0.12346, "hash": f"of {flags.student}, {flags.seeds}, {contract}"})  # fmt: skip
    for name, text, *_ in HANDED_IN:
        (tmp_path / f"{name}.py").write_text(text, errors="surrogateescape")
    table, report = tmp_path / "grades.csv", tmp_path / "grades.xml"
    grade.main([str(tmp_path), "--limit", "3", "--assignment", "3", "--score", "--seeds", "2",
                "--csv", str(table), "--junit", str(report)])  # fmt: skip
    rows = list(csv.DictReader(table.open()))
    columns = ("file", "verdict", "contract", "assignment")
    for row, (name, _, *expected, words) in zip(rows, HANDED_IN, strict=True):
        assert [row[column] for column in columns] == [f"{name}.py", *expected]
        assert re.search(words, row["note"]) and bool(words) == bool(row["note"])
    best = [rows[4][column] for column in ("router", "val_loss", "hash")]
    assert best == ["Other", "0.1235", "of e_good, 2, 2/2"]
    suites = ET.parse(report).getroot()
    counts = [tuple(s.get(n) for n in ("name", "tests", "failures", "skipped")) for s in suites]
    assert counts[2:5] == [("c_fails.py", "8", "1", "2"), ("d_hangs.py", "4", "2", "0"),
                           ("e_good.py", "8", "0", "2")]  # fmt: skip
    formula = grade.row_of(grade.Grade("=1+1", note="a=1"))
    assert (formula[0], formula[-1]) == ("'=1+1", "a=1"), "a spreadsheet would evaluate it"
    assert "absent: not a folder" in error_line(capsys, grade.main, tmp_path / "absent")
