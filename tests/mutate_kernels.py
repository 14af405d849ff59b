"""Breaks the kernels one line at a time, and checks that their tests fail.

    python tests/mutate_kernels.py          every mutant, some minutes; then a table in markdown
    python tests/mutate_kernels.py tail     those whose name contains "tail"

A mutant is a copy of the project with one replacement in cuda/, see tests/mutants.txt. It is caught
if tests/test_cuda.py fails or does not end. The table distinguishes "deadlock", "crash" and
"endless" from a "wrong result".
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


# The tests that run a file's kernels; the others could not notice.
TESTS = {
    "permute.cu": "routing or permute or rows_times",
    "gmm.cu": "not routing and not permute",
    "binding.cpp": "test",
}


class Mutant(NamedTuple):
    name: str
    file: str
    nth: int  # which of the places where `before` stands
    before: str
    after: str


def read_mutants() -> list[Mutant]:
    """tests/mutants.txt: FILE or FILE#NTH, a name; what is replaced; by what; \\n ends a line."""
    found = []
    for block in (ROOT / "tests" / "mutants.txt").read_text().split("\n\n"):
        head, before, after = block.strip("\n").split("\n")
        (place, name), lines = head.split(": ", 1), (before, after)
        file, _, nth = place.partition("#")
        before, after = (line[2:].replace("\\n", "\n") for line in lines)
        found.append(Mutant(name, file, int(nth or 1) - 1, before, after))
    return found


def mutate(text: str, mutant: Mutant) -> str:
    places = [m.start() for m in re.finditer(re.escape(mutant.before), text)]
    at = places[mutant.nth]
    return text[:at] + mutant.after + text[at + len(mutant.before) :]


def run(folder: Path, which: str) -> str:
    """How these tests end for the project in this folder."""
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", which]
    try:
        done = subprocess.run(
            [*tests, "tests/test_cuda.py"], cwd=folder, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return "endless"
    if done.returncode == 0:
        return "NOT CAUGHT"
    if "deadlock" in done.stdout:
        return "deadlock"
    if "CalledProcessError" in done.stdout:
        return "DOES NOT COMPILE"
    return "crash" if done.returncode < 0 else "wrong result"


def test_of(folder: Path, mutant: Mutant | None) -> str:
    """Copy the project, break it, run the tests."""
    skip = shutil.ignore_patterns(".git", "runs", "__pycache__", "results", "figures", "*.log")
    shutil.copytree(ROOT, folder, ignore=skip, symlinks=True)
    if mutant:
        file = folder / "cuda" / mutant.file
        file.write_text(mutate(file.read_text(), mutant))
    return run(folder, TESTS[mutant.file] if mutant else "test")


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = 0
    print("| mutant | file | noticed as |\n|---|---|---|")
    for mutant in (None, *read_mutants()):
        name = mutant.name if mutant else "none"
        if mutant and wanted not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            result = test_of(Path(folder) / "project", mutant)
        survivors += result.isupper() if mutant else result != "NOT CAUGHT"
        if mutant is None and result != "NOT CAUGHT":
            print(f"the tests fail without a mutation: {result}", file=sys.stderr)
            return 1
        if mutant:
            print(f"| {name} | {mutant.file} | {result} |", flush=True)
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    print(f"{survivors} not caught", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
