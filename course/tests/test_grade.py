"""A folder of submissions, graded in one command: python -m pytest course/tests/test_grade.py"""

import csv
import re
import xml.etree.ElementTree as ET

import pytest

from course import grade, judge, score
from course.tests.handed_in import GOOD

CONTRACT = """
import pathlib

def pytest_generate_tests(metafunc):
    if "where" in metafunc.fixturenames:
        metafunc.parametrize("where", [metafunc.config.getoption("--router")])

def test_named_after_the_paper(request, where):
    text = pathlib.Path(request.config.getoption("--router").rpartition(":")[0]).read_text()
    while "hangs" in text:
        pass
    assert "fails" not in text, "gates must not fail"
    assert (request.config.getoption("--assignment") or 3) == 3

def test_of_others():
    pass
"""
OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--router")
    parser.addoption("--assignment", type=int)
"""


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    """Six submissions, and a contract of two tests that need no model."""
    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_stub.py").write_text(CONTRACT)
    monkeypatch.setattr(judge, "CONTRACT", tmp_path / "test_stub.py")
    monkeypatch.setattr(judge, "ASSIGNMENTS", tmp_path / "test_stub.py")
    folder = tmp_path / "handed in"
    folder.mkdir()
    texts = {"a_broken": GOOD + ")", "b_cheats": "import os\n" + GOOD, "c_fails": GOOD + "# fails",
             "d_hangs": GOOD + "# hangs", "e_good": GOOD, "f_none": "x = 1\n"}  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_no_submission_stops_the_others(folder, tmp_path, capsys):
    table, report = tmp_path / "grades.csv", tmp_path / "grades.xml"
    grade.main([str(folder), "--limit", "3", "--csv", str(table), "--junit", str(report)])
    rows = {row["file"]: row for row in csv.DictReader(table.open())}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {"a_broken.py": "refused", "b_cheats.py": "refused",
                        "c_fails.py": "failed", "d_hangs.py": "stopped", "e_good.py": "passed",
                        "f_none.py": "refused"}  # fmt: skip
    assert rows["e_good.py"]["contract"] == "2/2" and rows["c_fails.py"]["contract"] == "1/2"
    assert "gates must not fail" in rows["c_fails.py"]["note"]
    assert rows["e_good.py"]["note"] == "" and grade.row_of(grade.Grade("=1+1"))[0] == "'=1+1"
    assert "line 1: imports os" in rows["b_cheats.py"]["note"]
    suites = {s.get("name"): s for s in ET.parse(report).getroot()}
    failures = {name: int(s.get("failures")) for name, s in suites.items()}
    assert failures == {name: int(v != "passed") for name, v in verdicts.items()}
    names = [case.get("name") for case in suites["e_good.py"]]
    assert names == ["vetting", "test_named_after_the_paper[e_good.py:Mine]", "test_of_others"]
    assert re.search(r"^d_hangs.py +Mine +stopped", capsys.readouterr().out, re.MULTILINE)


def test_the_tests_of_an_assignment_and_the_score_are_columns(folder, monkeypatch):
    for file in folder.glob("[a-df]_*.py"):
        file.unlink()
    monkeypatch.setattr(score, "score", lambda *a, **k: {"val_loss": 0.5, "hash": "abc"})
    (done,) = grade.main([str(folder), "--limit", "30", "--assignment", "3", "--score"])
    assert (done.assignment, done.val_loss, done.hash) == ("2/2", 0.5, "abc")
    (done,) = grade.main([str(folder), "--limit", "30", "--assignment", "4"])
    assert (done.contract, done.assignment, done.verdict) == ("2/2", "1/2", "failed")


def test_a_missing_file_of_tests_is_skipped(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "CONTRACT", tmp_path / "absent.py")
    done = grade.grade_file(folder / "e_good.py", grade.GradeConfig(folder=str(folder)))
    assert (done.contract, done.verdict) == ("-", "passed")
    assert done.suites["contract"][0].state == "skipped"
