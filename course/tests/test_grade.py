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


def test_a_submission_is_tested_in_a_child_and_called_by_its_own_name(tmp_path):
    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_stub.py").write_text(STUB)
    text, extra = GOOD + "# fails", ("--assignment", "3")
    judged = judge.judge(tmp_path / "test_stub.py", text, "Mine", "mine.py", 60, extra)
    message = judged.cases[0].message
    assert message.startswith("AssertionError: mine.py:Mine must not fail")
    assert judged.cases == [
        Case("test_the_text[mine.py:Mine]", "failed", message),
        Case("test_the_assignment[mine.py:Mine]", "passed"),
        Case("test_of_others[mine.py:Mine]", "skipped", "does not apply"),
    ]
    assert judged.passed == "1/2" and not judged.is_whole
    assert judge.judge(tmp_path / "absent.py", GOOD, "Mine", "mine.py") is None


ENDS = [  # how the child ended, its output, what is said of it
    (None, "", "mine.py: stopped after 2.5 s, while in stub.py"),
    (4, "one\n last\n \n", "mine.py: stub.py ended with code 4: last"),
    (4, " \n", "mine.py: stub.py ended with code 4: no output"),
]


@pytest.mark.parametrize(("code", "output", "sentence"), ENDS)
def test_tests_that_do_not_end_are_one_sentence(code, output, sentence, tmp_path, monkeypatch):
    (tmp_path / "stub.py").touch()
    monkeypatch.setattr(contain, "run", lambda *args, **more: contain.Outcome(code, output, ""))
    with pytest.raises(UserError) as error:
        judge.judge(tmp_path / "stub.py", GOOD, "Mine", "mine.py", 2.5)
    assert str(error.value) == sentence


def test_an_error_at_collection_is_its_last_line(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase name="a"><error message="collection failure">'
        "Traceback\nE  no module\n</error></testcase><testcase/></testsuite></testsuites>"
    )
    cases = judge.read_cases(tmp_path / "report.xml")
    assert cases == [Case("a", "failed", "E no module"), Case("?", "passed")]
    assert Judged(cases[1:]).is_whole and not Judged([]).is_whole


HANDED_IN = [  # name, text, verdict, passed in the contract, and words of the note
    ("a_broken", GOOD + ")", "refused", "-", "not Python"),
    ("b_cheats", "import os\n" + GOOD, "refused", "-", "line 1: imports os"),
    ("c_fails", GOOD + "# fails", "failed", "1/2", "test_b: gates fail"),
    ("d_hangs", GOOD + "# hangs", "stopped", "-", "d_hangs.py: stopped after 3 s"),
    ("e_good", GOOD, "passed", "2/2", ""),
    ("f_none", "x = 1\n", "refused", "-", "must have one"),
    ("g_ends", GOOD + "# ends", "broken", "-", "g_ends.py: ended"),
    ("h_skips", GOOD + "# skips", "failed", "0/0", "no test applied"),
    ("i_bytes", "\udcff", "refused", "-", "utf-8"),
]


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
    for name, text, *_ in HANDED_IN:
        (tmp_path / "handed in" / f"{name}.py").write_text(text, errors="surrogateescape")
    return tmp_path / "handed in"


def test_no_submission_stops_the_others(folder, tmp_path, capsys):
    table, report = tmp_path / "grades.csv", tmp_path / "grades.xml"
    grade.main([str(folder), "--limit", "3", "--csv", str(table), "--junit", str(report)])
    rows = list(csv.DictReader(table.open()))
    for row, (name, _, *expected, words) in zip(rows, HANDED_IN, strict=True):
        assert (row["file"], row["verdict"], row["contract"]) == (f"{name}.py", *expected)
        assert words in row["note"] and bool(words) == bool(row["note"])
    good = {"router": "Mine", "assignment": "-", "lines": "6", "val_loss": "-", "hash": "-"}
    assert good.items() <= rows[4].items()
    suites = ET.parse(report).getroot()
    counts = [tuple(s.get(n) for n in ("name", "tests", "failures", "skipped")) for s in suites]
    assert counts[1:5] == [("b_cheats.py", "1", "1", "0"), ("c_fails.py", "4", "1", "1"),
                           ("d_hangs.py", "2", "1", "0"), ("e_good.py", "4", "0", "1")]  # fmt: skip
    cases = [(c.get("classname"), c.get("name"), *((n.tag, n.get("message")) for n in c))
             for c in suites[2]]  # fmt: skip
    assert cases == [("c_fails.py.vetting", "vetting"), ("c_fails.py.contract", "test_a"),
                     ("c_fails.py.contract", "test_b", ("failure", "gates fail")),
                     ("c_fails.py.contract", "test_c", ("skipped", "does not apply"))]  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a_broken.py: refused" and len(out) == 9 + 1 + 10
    note = "d_hangs.py: stopped after 3 s"
    assert out[14].split(maxsplit=8) == ["d_hangs.py", "Mine", "stopped", *"--6--", note]
    assert out[10].index("verdict") == out[14].index("stopped")


def test_a_cell_that_a_spreadsheet_would_evaluate_becomes_text():
    row = grade.row_of(grade.Grade("=1+1", "+1", hash="@x", note="a=1"))
    assert (row[0], row[1], row[-2], row[-1]) == ("'=1+1", "'+1", "'@x", "a=1")


def test_the_tests_of_an_assignment_and_the_score_are_columns(folder, monkeypatch, tmp_path):
    def graded(*argv, name="e_good"):
        flags = grade.parse(grade.GradeConfig, [str(folder), "--limit", "3", *argv], "grade")
        return grade.grade_file(folder / f"{name}.py", flags)

    def scored(spec, flags, contract):
        assert spec == flags.router == f"{folder / 'e_good.py'}:Mine"
        assert (flags.student, flags.seeds, contract) == ("e_good", 2, "2/2")
        return {"val_loss": 0.123456, "hash": "abc"}

    def fails(*args, **more):
        raise UserError("e_good.py: stopped after 600 s")

    monkeypatch.setattr(score, "score", scored)
    done = graded("--assignment", "3", "--score", "--seeds", "2")
    assert (done.assignment, done.val_loss, done.hash) == ("2/2", 0.1235, "abc")
    assert done.suites.keys() == {"vetting", "contract", "assignment", "score"}
    done = graded("--assignment", "4")
    assert (done.contract, done.assignment, done.verdict) == ("2/2", "1/2", "failed")
    monkeypatch.setattr(score, "score", fails)
    done = graded("--score")
    assert (done.verdict, done.note) == ("stopped", "e_good.py: stopped after 600 s")
    assert graded("--score", name="c_fails").note == "test_b: gates fail", "the first problem"
    monkeypatch.setattr(judge, "CONTRACT", tmp_path / "absent.py")
    done = graded()
    assert (done.contract, done.verdict) == ("-", "passed")
    assert done.suites["contract"] == [Case("contract", "skipped", "absent.py is missing")]


@pytest.mark.parametrize("flags", [["absent"], ["."], [".", "--limit", "0"]])
def test_a_mistake_of_the_lecturer_is_exit_code_2(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        grade.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
