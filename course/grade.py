"""Grade a folder of submissions: python -m course.grade FOLDER --csv FILE --junit FILE

Every FILE.py of the folder is checked for what it may use (course/vet.py) and runs the tests of
the contract (course/tests/test_router.py); with --assignment N also that assignment's tests; with
--score it is trained and scored. Each step runs in a child process with a time limit, so that no
submission can stop the others; its first problem is reported in one sentence. The CSV file has a
line per submission, the JUnit file every test.

Passed tests are counted out of all of a suite, the same number for every submission: what is not
implemented has failed, and a rule that does not apply, as decoding where causal = False, counts as
passed.
"""

import csv
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from config import UserError, argument, flag, one_line
from course import contain, judge, score
from course.vet import count_lines, only_router, vet
from engine.cli import check_writable, parse, user_errors


@dataclass(frozen=True)
class GradeConfig:
    """Grade every FILE.py in a folder."""

    folder: str = argument("FOLDER of the submissions; a file's name is the student's ID")
    assignment: int | None = flag(None, "also run the tests of assignment N")
    score: bool = flag(False, "also train and score each submission")
    csv: str | None = flag(None, "write a line per submission to this FILE")
    junit: str | None = flag(None, "write the result of every test to this FILE, as JUnit XML")
    limit: float = flag(judge.LIMIT_S, "seconds that each submission's tests may take", least=1)
    seeds: int = flag(3, "--score: runs to average over", least=1)


@dataclass
class Grade:
    """The results of one submission; note is its first problem."""

    file: str
    router: str = "-"
    contract: str = "-"
    assignment: str = "-"
    points: float = 0.0  # 50 for the assignment's tests, 25 for the contract's, by share
    lines: int | str = "-"
    val_loss: float | str = "-"
    hash: str = "-"
    verdict: str = "passed"
    note: str = ""
    suites: dict[str, list[judge.Case]] = field(default_factory=dict)

    def fail(self, suite: str, verdict: str, note: str) -> None:
        self.suites.setdefault(suite, []).append(judge.Case(suite, "failed", note))
        if self.verdict == "passed":
            self.verdict, self.note = verdict, note


COLUMNS = ("file", "router", "verdict", "contract", "assignment", "points", "lines", "val_loss",
           "hash", "note")  # fmt: skip


def run_tests(grade: Grade, suite: str, tests: Path, text: str, limit_s: float, extra=()) -> str:
    """-> passed and all tests, as in "45/46"; "-" if the file of tests is missing."""
    try:
        judged = judge.judge(tests, text, grade.router, grade.file, limit_s, extra)
    except UserError as error:
        grade.fail(suite, "stopped" if "stopped after" in str(error) else "broken", str(error))
        return "-"
    if judged is None:
        grade.suites[suite] = [judge.Case(suite, "skipped", f"{tests.name} is missing")]
        return "-"
    grade.suites[suite] = judged.cases
    if not judged.is_whole and grade.verdict == "passed":
        wrong = next((c for c in judged.cases if c.state == "failed"), None)
        note = f"{wrong.name}: {wrong.message}" if wrong else "no test applied"
        grade.verdict, grade.note = "failed", one_line(note, 300)
    return judged.passed


def share(passed: str) -> float:
    """ "45/46" as a number; 0 for "-", where the tests were stopped or not run."""
    part, _, whole = passed.partition("/")
    return int(part) / int(whole) if whole else 0.0


def grade_file(file: Path, flags: GradeConfig) -> Grade:
    """The grade of one submission; its errors are recorded, not raised."""
    grade = Grade(file.name)
    try:
        text = file.read_bytes().decode()
        grade.router = only_router(text, file.name)
        vet(text, file.name)
        grade.lines = count_lines(text)
        grade.suites["vetting"] = [judge.Case("vetting", "passed")]
    except (UserError, OSError, UnicodeDecodeError) as error:
        grade.fail("vetting", "refused", one_line(str(error), 300))
        return grade
    grade.contract = run_tests(grade, "contract", judge.CONTRACT, text, flags.limit)
    if flags.assignment is not None:
        extra = ("--assignment", str(flags.assignment))
        grade.assignment = run_tests(
            grade, "assignment", judge.ASSIGNMENTS, text, flags.limit, extra
        )
    grade.points = round(50 * share(grade.assignment) + 25 * share(grade.contract), 1)
    if flags.score:
        spec = f"{file}:{grade.router}"
        of = score.ScoreConfig(
            router=spec, assignment=flags.assignment, student=file.stem, seeds=flags.seeds
        )
        try:
            row = score.score(spec, of, contract=grade.contract)
            grade.val_loss, grade.hash = round(row["val_loss"], 4), row["hash"]
            grade.suites["score"] = [judge.Case("score", "passed")]
        except UserError as error:
            grade.fail("score", "stopped" if "stopped after" in str(error) else "broken",
                       str(error))  # fmt: skip
    return grade


def junit(grades: list[Grade]) -> ET.ElementTree:
    """One test suite per submission; the class name of a test is the suite it belongs to."""
    root = ET.Element("testsuites")
    for grade in grades:
        cases = [(suite, case) for suite, found in grade.suites.items() for case in found]
        count = {s: str(sum(c.state == s for _, c in cases)) for s in ("failed", "skipped")}
        suite_node = ET.SubElement(root, "testsuite", name=grade.file, tests=str(len(cases)),
                                   failures=count["failed"], errors="0",
                                   skipped=count["skipped"])  # fmt: skip
        for suite, case in cases:
            node = ET.SubElement(
                suite_node, "testcase", classname=f"{grade.file}.{suite}", name=case.name
            )
            if case.state != "passed":
                tag = "failure" if case.state == "failed" else "skipped"
                ET.SubElement(node, tag, message=one_line(case.message))
    ET.indent(root)
    return ET.ElementTree(root)


def row_of(grade: Grade) -> list[str]:
    """The cells of a row; one that a spreadsheet would evaluate as a formula becomes text."""
    cells = [str(getattr(grade, name)) for name in COLUMNS]
    return [f"'{c}" if c.startswith(("=", "+", "@")) else c for c in cells]


def show(grades: list[Grade]) -> str:
    rows = [list(COLUMNS), *(row_of(grade) for grade in grades)]
    rows = [[one_line(c, 60) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@user_errors
def main(argv: list[str] | None = None) -> list[Grade]:
    contain.take_secret()
    flags = parse(GradeConfig, argv, "course.grade")
    folder = Path(flags.folder)
    files = sorted(folder.glob("*.py")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: not a folder with a FILE.py in it")
    for name in (flags.csv, flags.junit):
        if name:
            check_writable(Path(name))
    grades = []
    for file in files:
        grades.append(grade_file(file, flags))
        print(f"{file.name}: {grades[-1].verdict}", flush=True)
    print("\n" + show(grades))
    if flags.csv:
        with Path(flags.csv).open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([COLUMNS, *map(row_of, grades)])
    if flags.junit:
        junit(grades).write(flags.junit, encoding="utf-8", xml_declaration=True)
    return grades


if __name__ == "__main__":
    main()
