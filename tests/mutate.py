"""Break the code one place at a time, and see whether its own tests notice.

    python -m tests.mutate --n 150 --seed 0             of the reading path and the packages
    python -m tests.mutate --n 20 --file decoder.py     of one file, or --file engine

Each mutant is a copy of the project with one change, found by AST: a comparison, an operator, a
constant +- 1, a condition, two arguments, a statement, or a detach, no_grad or mask that is gone.
It is killed if the tests of its file fail, or take four times as long. What messages say and what
is printed is not mutated. tests/equivalent.txt lists mutants that change nothing, with the reason.
"""

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sources", "scoring", "engine")
# Files without a test file of their own name: who tests them.
TESTED_BY = {
    "engine/processes.py": "tests/engine/test_parallel.py",
    "ops.py": "tests/test_ops.py tests/test_kernels.py",
    "sources/painting.py": "tests/sources/test_phantoms.py",
}
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
REMOVED = {"detach", "masked_fill", "masked_fill_"}
NO_GRAD = {"torch.no_grad()", "torch.inference_mode()"}
MESSAGES = {"print", "warn", "UserError", "ValueError", "TypeError", "RuntimeError",
            "AssertionError", "flag"}  # fmt: skip


class Mutant(NamedTuple):
    """The source with `before`, in this function, replaced by `after`."""

    file: str
    function: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file} {self.function}: `{self.before}` -> `{self.after}`"


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """(field, its new value): every way of breaking this one node."""
    match node:
        case ast.Compare(ops=[op]):
            yield "ops", [SWAPS[type(op)]()]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield "op", SWAPS[type(op)]()
        case ast.Constant(value=bool() as value):
            yield "value", not value
        case ast.Constant(value=int() | float() as value):
            yield "value", value + 1
            yield "value", value - 1
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "test", ast.UnaryOp(ast.Not(), test)
        case ast.Call(args=[first, second, *rest]):
            if not any(isinstance(arg, ast.Starred) for arg in (first, second)):
                yield "args", [second, first, *rest]
        case ast.UnaryOp(op=ast.USub()):
            yield "op", ast.UAdd()
    if isinstance(node, ast.FunctionDef) and NO_GRAD & {*map(ast.unparse, node.decorator_list)}:
        kept = [d for d in node.decorator_list if ast.unparse(d) not in NO_GRAD]
        yield "decorator_list", kept


def replacement(node: ast.AST) -> ast.AST | None:
    """What may stand in the place of the whole node: a statement or a call that is gone."""
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Assert():
            return ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return ast.Pass()
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in REMOVED:
            return value
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.With(items=[item], body=body) if ast.unparse(item.context_expr) in NO_GRAD:
            return ast.If(ast.Constant(True), body, [])
    return None


def children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index or None, child) of everything below that is code and not prose."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield node, field, i if isinstance(value, list) else None, child
                if not (is_message(child) and isinstance(child, ast.Call)):
                    yield from children(child)


def is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in MESSAGES


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    tree = ast.parse((ROOT / file).read_text())
    owner = {
        id(n): f.name
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.ClassDef)
        for n in ast.walk(f)
    }

    def mutant(node: ast.AST, before: str, after: str) -> Mutant:
        first = [text.splitlines()[0] if text else "nothing" for text in (before, after)]
        function = owner.get(id(node), "module")
        return Mutant(
            file, function, node.lineno, *first, ast.unparse(ast.fix_missing_locations(tree))
        )

    for parent, field, i, node in list(children(tree)):
        if not hasattr(node, "lineno") or is_message(getattr(node, "value", None)):
            continue
        before = ast.unparse(node)
        if before.startswith("if __name__"):
            continue
        for name, value in changes(node):
            old = getattr(node, name)
            setattr(node, name, value)
            yield mutant(node, before, ast.unparse(node))
            setattr(node, name, old)
        if (new := replacement(node)) is not None:
            place = getattr(parent, field) if i is not None else vars(parent)
            key = field if i is None else i
            place[key] = ast.copy_location(new, node)
            yield mutant(node, before, ast.unparse(new))
            place[key] = node


def tests_of(file: str) -> str:
    folder, _, name = file.rpartition("/")
    return TESTED_BY.get(file) or f"tests/{folder}/test_{name}".replace("//", "/")


def run(folder: Path, tests: str, limit_s: float) -> bool:
    """Do the tests pass, in this copy of the project and in this time?"""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet) as child:
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and the processes that it started
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=150, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="", help="a file, or a package, in place of all")
    parser.add_argument("--jobs", type=int, default=2)
    flags = parser.parse_args()
    files = [str(f.relative_to(ROOT)) for p in ("", *PACKAGES) for f in (ROOT / p).glob("*.py")]
    files = sorted(f for f in files if f == flags.file or f.startswith(flags.file.rstrip("/") + "/")
                   or not flags.file)  # fmt: skip
    tests = {path for file in files for path in tests_of(file).split()}
    assert not (absent := [path for path in tests if not (ROOT / path).is_file()]), absent
    every = [m for file in files for m in mutants(file)]
    generator, by_line = random.Random(flags.seed), {}
    for mutant in every:  # a line with many numbers is drawn no more often than another
        by_line.setdefault((mutant.file, mutant.line), []).append(mutant)
    lines = generator.sample([*by_line], min(flags.n, len(by_line)))
    drawn = [generator.choice(by_line[line]) for line in lines]
    print(f"{len(drawn)} of {len(every)} mutants of {len(files)} files, seed {flags.seed}")
    text = (ROOT / "tests" / "equivalent.txt").read_text()
    reasons = dict(line.split(" | ") for line in text.splitlines() if line)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(flags.jobs) as pool:
        folders: Queue[Path] = Queue()
        ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
        for job in range(flags.jobs):
            folders.put(shutil.copytree(ROOT, Path(temporary) / "work" / f"{job}", ignore=ignore))
        if (shared := ROOT.parent / "shared").is_dir():
            (Path(temporary) / "work" / "shared").symlink_to(shared)

        @cache
        def seconds(tests: str) -> float:
            folder, start = folders.get(), time.monotonic()
            passed = run(folder, tests, 900)
            folders.put(folder)
            assert passed, f"{tests} fails on the code as it is"
            return time.monotonic() - start

        def judge(mutant: Mutant) -> str:
            if str(mutant) in reasons:
                return "equivalent"
            limit = 20 + 4 * seconds(tests_of(mutant.file))
            folder = folders.get()
            (folder / mutant.file).write_text(mutant.source)
            passed = run(folder, tests_of(mutant.file), limit)
            shutil.copy(ROOT / mutant.file, folder / mutant.file)
            folders.put(folder)
            return "survived" if passed else "killed"

        counts = {"reading path": Counter(), "packages": Counter()}
        for mutant, outcome in zip(drawn, pool.map(judge, drawn), strict=True):
            counts["packages" if "/" in mutant.file else "reading path"][outcome] += 1
            if outcome != "killed":
                print(f"{outcome}: line {mutant.line}, {mutant} {reasons.get(str(mutant), '')}",
                      flush=True)  # fmt: skip
    print(
        "| | killed | survived | equivalent | killed of those that are not |\n|---|---|---|---|---|"
    )
    for kind, n in counts.items():
        share = n["killed"] / max(1, n["killed"] + n["survived"])
        print(f"| {kind} | {n['killed']} | {n['survived']} | {n['equivalent']} | {share:.0%} |")


if __name__ == "__main__":
    main()
