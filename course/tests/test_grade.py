"""A folder of submissions is graded in one command, each by pytest in a child process."""

import csv
import re
import xml.etree.ElementTree as ET

import pytest

from config import UserError
from course import copy, grade, judge, score
from course.judge import Case, Judged
from course.tests.handed_in import GOOD
from tests.mini import error_line

STUB = """import pytest, subprocess
def test_a_process(): subprocess.run(["true"], check=True)
def test_unwritten(): pytest.skip("not implemented yet")
def test_the_text(request):
    spec = request.config.getoption("--router")
    text = open(spec.rpartition(":")[0]).read()
    if "interrupts" in text:
        raise KeyboardInterrupt
    assert "fails" not in text, f"{spec} must not fail"
def test_the_assignment(request):
    pytest.skip(str(request.config.getoption("--assignment")))
"""


def test_a_submission_is_tested_in_a_child_and_called_by_its_own_name(tmp_path):
    (tmp_path / "conftest.py").write_text("from course.tests.conftest import *")
    (tmp_path / "test_stub.py").write_text(STUB)
    text, extra = GOOD + "# fails", ("--assignment", "3")
    judged = judge.judge(tmp_path / "test_stub.py", text, "Mine", "mine.py", 300, extra)
    process, unwritten, first, other = judged.cases
    assert process.state == "passed" and unwritten[1:] == ("failed", "not implemented yet")
    assert first.message.startswith("AssertionError: mine.py:Mine must not fail")
    assert other == Case("test_the_assignment", "skipped", "3") and judged.passed == "2/4"
    cheat = f"{GOOD}try:\n    open({str(tmp_path / 'new')!r}, 'w')\nexcept OSError:\n    pass"
    judged = judge.judge(tmp_path / "test_stub.py", cheat, "Mine", "mine.py", 300)
    words = "Failed: mine.py:Mine, line 15: writes a file, which a router must not do"
    assert {case.message for case in judged.cases} == {words} and judged.passed == "0/4"
    with pytest.raises(UserError, match=r"^mine.py: test_stub.py ended with code 2"):
        judge.judge(tmp_path / "test_stub.py", GOOD + "# interrupts", "Mine", "mine.py", 300)
    with pytest.raises(UserError, match=r"^mine.py: stopped after 0.1 s"):
        judge.judge(tmp_path / "test_stub.py", text, "Mine", "mine.py", 0.1)


HANDED_IN = [  # name, text; verdict, passed in the contract and the assignment, words of the note
    ("a_cheats", "import os\n" + GOOD, "refused", "-", "-", "line 1: imports os"),
    ("b_bytes", "\udcff", "refused", "-", "-", "utf-8"),
    ("c_fails", GOOD + "# fails", "failed", "2/3", "3/3", "test_b: gates fail"),
    ("d_hangs", GOOD + "# hangs", "stopped", "-", "-", "d_hangs.py: stopped after 3 s"),
    ("e_good", GOOD + "class Other(Mine):\n    pass\n", "passed", "3/3", "3/3", ""),
    ("f_skips", GOOD + "# skips", "failed", "1/1", "1/1", "no test applied"),
    ("g_two", GOOD + "class B(Router):\n    pass\n", "refused", "-", "-", "one .* has Mine, B"),
    ("h_wrong", GOOD + "# wrong", "failed", "3/3", "2/3", "test_b: gates fail")]  # fmt: skip


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
    best = [rows[4][column] for column in ("router", "points", "val_loss", "hash")]
    assert best == ["Other", "75.0", "0.1235", "of e_good, 2, 3/3"]
    assert [rows[i]["points"] for i in (2, 3, 7)] == ["66.7", "0.0", "58.3"]  # 2/3 of 25, of 50
    suites = ET.parse(report).getroot()
    counts = [tuple(s.get(n) for n in ("name", "tests", "failures", "skipped")) for s in suites]
    assert counts[2:5] == [("c_fails.py", "8", "1", "2"), ("d_hangs.py", "4", "2", "0"),
                           ("e_good.py", "8", "0", "2")]  # fmt: skip
    formula = grade.row_of(grade.Grade("=1+1", note="a=1"))
    assert (formula[0], formula[-1]) == ("'=1+1", "a=1"), "a spreadsheet would evaluate it"
    assert "absent: not a folder" in error_line(capsys, grade.main, tmp_path / "absent")


@pytest.mark.skipif(not (copy.ROOT / ".git").exists(), reason="not a clone")
def test_a_students_copy_has_no_line_of_a_solution(tmp_path, capsys):
    copy.main([str(tmp_path / "copy")])

    def lines(root, *patterns):
        texts = (file.read_text() for pattern in patterns for file in root.glob(pattern))
        stripped = (s.partition("  #")[0].strip() for text in texts for s in text.splitlines())
        return {s for s in stripped if len(s) > 32 and not s.startswith("from ")}

    given = lines(copy.ROOT, "routers.py", "course/a?_*.py")
    secret = lines(copy.ROOT, "course/tests/solutions/*.py") - given
    assert len(secret) > 40 and not secret & lines(tmp_path, "copy/**/*.py")
    assert [sum("museum" in f for f in copy.files(every)) for every in (True, False)] == [16, 6]
    assert "must be an empty folder" in error_line(capsys, copy.main, tmp_path / "copy")
