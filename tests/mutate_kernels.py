"""Breaks the kernels one line at a time, and checks that their tests fail.

    python tests/mutate_kernels.py          every mutant, some minutes; then a table in markdown
    python tests/mutate_kernels.py tail     those whose name contains "tail"

tests/mutants.txt has them, of three lines each: FILE or FILE#NTH, a name; what is replaced; by
what; \\n ends a line. A mutant is caught if tests/test_cuda.py fails or does not end.
"""

import re
import sys

from mutate import ROOT, run

# The tests that run a file's kernels; the others could not notice.
TESTS = {"permute.cu": "routing or permute or rows", "binding.cpp": "test"}
OF_PRODUCTS = "not routing and not permute"


def broken(text: str, nth: int, before: str, after: str) -> str:
    parts = text.split(before)
    assert len(parts) > nth, f"not there: {before}"
    return before.join(parts[:nth]) + after + before.join(parts[nth:])


def main() -> int:
    wanted, survivors, gmm = "".join(sys.argv[1:]), 0, "cuda/gmm.cu"
    code, printed = run(["tests/test_cuda.py"], 600, gmm, (ROOT / gmm).read_text())
    assert code == 0, f"the tests fail without a mutation:\n{printed}"
    print("| mutant | file | noticed as |\n|---|---|---|", flush=True)
    lines = (ROOT / "tests" / "mutants.txt").read_text().splitlines()
    for head, *change in zip(*(lines[i::3] for i in range(3)), strict=True):
        place, name = head.split(": ", 1)
        if wanted not in name:
            continue
        file, _, nth = place.partition("#")
        before, after = (line[2:].replace("\\n", "\n") for line in change)
        source = broken((ROOT / "cuda" / file).read_text(), int(nth or 1), before, after)
        words = ["tests/test_cuda.py", "-k", TESTS.get(file, OF_PRODUCTS)]
        code, printed = run(words, 600, f"cuda/{file}", source)
        result = "endless" if code is None else "crash" if code < 0 else "wrong result"
        found = re.search("deadlock|refuses a matrix|fence of its mbarrier|without wgmma.fence"
                          "|registers were given back", printed)  # fmt: skip
        result = found[0] if found else result
        if code == 0 or "CalledProcessError" in printed:
            result = "NOT CAUGHT" if code == 0 else "DOES NOT COMPILE"
            survivors += 1
        print(f"| {name} | {file} | {result} |", flush=True)
    print(f"{survivors} not caught", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
