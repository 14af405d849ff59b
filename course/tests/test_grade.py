"""A folder of submissions is graded in one command, each by pytest in a child process."""

import csv
import xml.etree.ElementTree as ET

import pytest

from config import UserError
from course import contain, grade, judge, score
from course.judge import Case, Judged
from course.tests.handed_in import GOOD

OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--router")
    parser.addoption("--assignment")
"""
STUB = """
import pytest

def pytest_generate_tests(metafunc):
    metafunc.parametrize("spec", [metafunc.config.getoption("--router")])

def test_the_text(spec):
    assert "fails" not in open(spec.rpartition(":")[0]).read(), f"{spec} must not fail"

def test_the_assignment(request, spec):
    assert request.config.getoption("--assignment") == "3"

def test_of_others(spec):
    pytest.skip("does not apply")
"""


@pytest.fixture(name="stub")
def _stub(tmp_path):
    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_stub.py").write_text(STUB)
    return tmp_path / "test_stub.py"


def test_a_submission_is_tested_in_a_child_and_called_by_its_own_name(stub):
    text, extra = GOOD + "# fails", ("--assignment", "3")
    judged = judge.judge(stub, text, "Mine", "mine.py", 60, extra)
    names = ["test_the_text", "test_the_assignment", "test_of_others"]
    assert [case.name for case in judged.cases] == [f"{name}[mine.py:Mine]" for name in names]
    assert [case.state for case in judged.cases] == ["failed", "passed", "skipped"]
    assert judged.cases[0].message.startswith("AssertionError: mine.py:Mine must not fail")
    assert judged.cases[2].message == "does not apply"
    assert judged.passed == "1/2" and not judged.is_whole


def test_tests_that_do_not_end_or_are_not_found_are_one_sentence(stub, monkeypatch):
    def outcome(*values):
        monkeypatch.setattr(contain, "run", lambda *args, **more: contain.Outcome(*values))
        with pytest.raises(UserError) as error:
            judge.judge(stub, GOOD, "Mine", "mine.py", 2.5)
        return str(error.value)

    assert outcome(None, "", "") == "mine.py: stopped after 2.5 s, while in test_stub.py"
    assert outcome(4, "one\n last\n \n", "").endswith("test_stub.py ended with code 4: last")
    assert outcome(4, " \n", "").endswith("ended with code 4: no output")
    assert judge.judge(stub.parent / "absent.py", GOOD, "Mine", "mine.py") is None


def test_an_error_at_collection_is_its_last_line(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase name="a"><error message="collection failure">'
        "Traceback\nE  no module\n</error></testcase><testcase/></testsuite></testsuites>"
    )
    cases = judge.read_cases(tmp_path / "report.xml")
    assert cases == [Case("a", "failed", "E no module"), Case("?", "passed")]
    assert Judged(cases[1:]).is_whole and not Judged([]).is_whole


TEXTS = {"a_broken": GOOD + ")", "b_cheats": "import os\n" + GOOD, "c_fails": GOOD + "# fails",
         "d_hangs": GOOD + "# hangs", "e_good": GOOD, "f_none": "x = 1\n",
         "g_ends": GOOD + "# ends", "h_skips": GOOD + "# skips"}  # fmt: skip
VERDICTS = ["refused", "refused", "failed", "stopped", "passed", "refused", "broken", "failed"]


def judge_by_comment(tests, text, cls, where, limit_s, extra=()):
    """In place of judge.judge, which starts a process."""
    assert (cls, limit_s) == ("Mine", 3)
    if "hangs" in text or "ends" in text:
        raise UserError(f"{where}: " + ("stopped after 3 s" if "hangs" in text else "ended"))
    if "absent" in tests.name:
        return None
    right, skipped = Case("test_a", "passed"), Case("test_c", "skipped", "does not apply")
    if "skips" in text:
        return Judged([skipped])
    is_wrong = "fails" in text or extra == ("--assignment", "4")
    return Judged([right, Case("test_b", "failed", "gates\nfail") if is_wrong else right, skipped])


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "judge", judge_by_comment)
    (tmp_path / "handed in").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "handed in" / f"{name}.py").write_text(text)
    return tmp_path / "handed in"


def test_no_submission_stops_the_others(folder, tmp_path, capsys):
    table, report = tmp_path / "grades.csv", tmp_path / "grades.xml"
    (folder / "i_bytes.py").write_bytes(b"\xff")
    grade.main([str(folder), "--limit", "3", "--csv", str(table), "--junit", str(report)])
    rows = list(csv.DictReader(table.open()))
    assert [row["file"] for row in rows] == [f"{name}.py" for name in [*TEXTS, "i_bytes"]]
    assert [row["verdict"] for row in rows] == [*VERDICTS, "refused"]
    assert [row["contract"] for row in rows] == ["-", "-", "1/2", "-", "2/2", "-", "-", "0/0", "-"]
    notes = [row["note"] for row in rows]
    assert "line 1: imports os" in notes[1] and notes[4] == "" and "utf-8" in notes[8]
    assert notes[2] == "test_b: gates fail" and notes[7] == "no test applied"
    good = {"router": "Mine", "assignment": "-", "lines": "6", "val_loss": "-", "hash": "-"}
    assert good.items() <= rows[4].items()
    suites = ET.parse(report).getroot()
    counts = [tuple(s.get(n) for n in ("name", "tests", "failures", "skipped")) for s in suites]
    assert counts[1:5] == [("b_cheats.py", "1", "1", "0"), ("c_fails.py", "4", "1", "1"),
                           ("d_hangs.py", "2", "1", "0"), ("e_good.py", "4", "0", "1")]  # fmt: skip
    cases = [(c.get("classname"), c.get("name"), *(n.get("message") for n in c)) for c in suites[2]]
    assert cases == [("c_fails.py.vetting", "vetting"), ("c_fails.py.contract", "test_a"),
                     ("c_fails.py.contract", "test_b", "gates fail"),
                     ("c_fails.py.contract", "test_c", "does not apply")]  # fmt: skip
    assert [node.tag for node in suites[2].iterfind("testcase/*")] == ["failure", "skipped"]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a_broken.py: refused" and len(out) == 9 + 1 + 10
    note = "d_hangs.py: stopped after 3 s"
    assert out[14].split(maxsplit=8) == ["d_hangs.py", "Mine", "stopped", *"--6--", note]
    assert out[10].index("verdict") == out[14].index("stopped")


def test_a_cell_that_a_spreadsheet_would_evaluate_becomes_text():
    assert grade.row_of(grade.Grade("=1+1", "+1", note="a=1"))[:2] == ["'=1+1", "'+1"]
    assert grade.row_of(grade.Grade("=1+1", note="a=1"))[-1] == "a=1"


def test_the_tests_of_an_assignment_and_the_score_are_columns(folder, monkeypatch):
    def graded(argv, name="e_good"):
        flags = grade.parse(grade.GradeConfig, [str(folder), "--limit", "3", *argv], "grade")
        return grade.grade_file(folder / f"{name}.py", flags)

    def scored(spec, flags, contract):
        assert spec == flags.router == f"{folder / 'e_good.py'}:Mine"
        assert (flags.student, flags.seeds, contract) == ("e_good", 2, "2/2")
        return {"val_loss": 0.123456, "hash": "abc"}

    monkeypatch.setattr(score, "score", scored)
    done = graded(["--assignment", "3", "--score", "--seeds", "2"])
    assert (done.assignment, done.val_loss, done.hash) == ("2/2", 0.1235, "abc")
    assert done.suites.keys() == {"vetting", "contract", "assignment", "score"}
    done = graded(["--assignment", "4"])
    assert (done.contract, done.assignment, done.verdict) == ("2/2", "1/2", "failed")

    def fails(*args, **more):
        raise UserError("e_good.py: stopped after 600 s")

    monkeypatch.setattr(score, "score", fails)
    done = graded(["--score"])
    assert (done.verdict, done.note) == ("stopped", "e_good.py: stopped after 600 s")
    assert graded(["--score"], "c_fails").note == "test_b: gates fail", "it is the first problem"


def test_a_missing_file_of_tests_is_skipped(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "CONTRACT", tmp_path / "absent.py")
    done = grade.grade_file(folder / "e_good.py", grade.GradeConfig(folder=str(folder), limit=3))
    assert (done.contract, done.verdict) == ("-", "passed")
    assert done.suites["contract"] == [Case("contract", "skipped", "absent.py is missing")]


@pytest.mark.parametrize("flags", [["absent"], ["."], [".", "--limit", "0"]])
def test_a_mistake_of_the_lecturer_is_exit_code_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        grade.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
