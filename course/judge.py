"""Run the contract's tests, or an assignment's, on one submission, in a clean child process.

course/tests/conftest.py installs contain.guard there before it imports the submission.
"""

import re
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from config import UserError, one_line
from course import contain

CONTRACT = contain.ROOT / "course" / "tests" / "test_router.py"
ASSIGNMENTS = contain.ROOT / "course" / "tests" / "test_assignments.py"
UNWRITTEN = "not implemented yet"  # why a check was skipped
LIMIT_S = 180.0


class Case(NamedTuple):
    """One test. state: "passed", "failed" or "skipped"."""

    name: str
    state: str
    message: str = ""


class Judged(NamedTuple):
    cases: list[Case]

    def count(self, state: str) -> int:
        return sum(case.state == state for case in self.cases)

    @property
    def passed(self) -> str:
        """As in "45/46": of all tests. A rule that does not apply to the router is fulfilled."""
        return f"{self.count('passed') + self.count('skipped')}/{len(self.cases)}"

    @property
    def is_whole(self) -> bool:
        return self.count("failed") == 0 and self.count("passed") > 0


def read_cases(file: Path) -> list[Case]:
    """pytest's JUnit file -> its test cases; one skipped as unwritten has failed."""
    cases = []
    for node in ET.parse(file).iter("testcase"):
        state, message = "passed", ""
        for child in node:
            if child.tag in ("failure", "error"):
                state, message = "failed", child.get("message", "")
                if message == "collection failure":  # the reason is the last line of the text
                    message = (child.text or message).strip().splitlines()[-1]
            elif child.tag == "skipped":
                message = child.get("message", "")
                state = "failed" if message == UNWRITTEN else "skipped"
        cases.append(Case(node.get("name", "?"), state, one_line(message, 500)))
    return cases


def judge(
    tests: Path, text: str, cls: str, where: str, limit_s: float = LIMIT_S, extra: tuple = ()
) -> Judged | None:
    """Run pytest on the submission's text; None if the file of tests is missing.

    Raises UserError if the time limit is reached or no test could be collected.
    """
    if not tests.is_file():
        return None
    with tempfile.TemporaryDirectory(prefix="judge-") as name:
        folder = Path(name)
        (folder / contain.FILE).write_text(text)
        report = folder / "report.xml"
        outcome = contain.run(
            [sys.executable, "-s", "-P", "-B", "-m", "pytest", str(tests), "-q",
             "-p", "no:cacheprovider", "-c", str(contain.ROOT / "pyproject.toml"),
             "--rootdir", str(contain.ROOT), "--basetemp", str(folder / "temp"),
             "--junitxml", str(report), "--router", f"{folder / contain.FILE}:{cls}", *extra],
            folder, limit_s, cwd=contain.ROOT,
        )  # fmt: skip
        if outcome.code is None:
            raise UserError(f"{where}: stopped after {limit_s:g} s, while in {tests.name}")
        # The temporary path is replaced by the submission's own name, in messages and test names.
        temporary = re.compile(rf"[^\s\[]*{re.escape(folder.name)}.{re.escape(contain.FILE)}")
        cases = [Case(*(temporary.sub(where, part) for part in case))
                 for case in (read_cases(report) if report.is_file() else [])]  # fmt: skip
        if not cases or outcome.code not in (0, 1):  # 2: stopped by a KeyboardInterrupt
            lines = [line for line in outcome.tail.splitlines() if line.strip()]
            last = one_line(lines[-1], 300) if lines else "no output"
            raise UserError(f"{where}: {tests.name} ended with code {outcome.code}: {last}")
        return Judged(cases)
