"""Break the code one place at a time, and see whether its own tests notice.

    python -m tests.mutate --n 150 --seed 0             of the reading path and the packages
    python -m tests.mutate --n 20 --file decoder.py     of one file, or --file engine

Each mutant is a copy of the project with one change, found by AST, see `broken`. It is killed if
the tests of its file fail, or take four times as long. What messages say is not mutated.
tests/equivalent.txt lists mutants that change nothing, with the reason.
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

ROOT = Path(__file__).resolve().parent.parent
# Files whose tests stand elsewhere too: who tests them.
TESTED_BY = {"engine/processes.py": "tests/engine/test_parallel.py",
             "engine/published.py": "tests/engine/test_published.py tests/test_checkpoint.py",
             "ops.py": "tests/test_ops.py tests/test_kernels.py",
             "sources/load.py": "tests/sources/test_load.py tests/sources/test_llava.py",
             "sources/painting.py": "tests/sources/test_phantoms.py",
             "train.py": "tests/test_train.py tests/engine/test_optim.py"}  # fmt: skip
PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, Add Sub, Mult Div, BitAnd BitOr, And Or"
SWAPS = {"FloorDiv": "Mult", "Mod": "Mult", "Pow": "Mult", "MatMult": "Mult"}
for one, other in map(str.split, PAIRS.split(", ")):
    SWAPS |= {one: other, other: one}
REMOVED = {"detach", "masked_fill", "masked_fill_"}
NO_GRAD = {"torch.no_grad()", "torch.inference_mode()"}
MESSAGES = {"print", "warn", "UserError", "ValueError", "TypeError", "RuntimeError", "flag"}


def changed(node: ast.AST, **fields: object) -> ast.AST:
    return type(node)(**(vars(node) | fields))


def broken(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that may stand in the place of this node."""
    match node:
        case ast.Compare(ops=[op]):
            yield changed(node, ops=[getattr(ast, SWAPS[type(op).__name__])()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            if name := SWAPS.get(type(op).__name__):
                yield changed(node, op=getattr(ast, name)())
        case ast.Constant(value=int() | float() as value):
            for new in [not value] if isinstance(value, bool) else [value + 1, value - 1]:
                yield changed(node, value=new)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Call(args=[one, two, *rest]) if ast.Starred not in (type(one), type(two)):
            yield changed(node, args=[two, one, *rest])
        case ast.UnaryOp(op=ast.USub()):
            yield changed(node, op=ast.UAdd())
        case ast.FunctionDef(decorator_list=found):
            kept = [one for one in found if ast.unparse(one) not in NO_GRAD]
            if len(kept) < len(found):
                yield changed(node, decorator_list=kept)
    match node:  # a statement, a call or a `not` that is gone
        case (ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Assert()
              | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])):  # fmt: skip
            yield ast.Pass()
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in REMOVED:
            yield value
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.With(items=[item], body=body) if ast.unparse(item.context_expr) in NO_GRAD:
            yield ast.If(ast.Constant(True), body, [])


def is_message(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in MESSAGES


def places(node: ast.AST, function: str = "module") -> Iterator[tuple]:
    """(a list or a node's fields, where in them, what, in which function): all code below."""
    for field, value in ast.iter_fields(node):
        is_list = isinstance(value, list)
        for key, child in list(enumerate(value)) if is_list else [(field, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            inside = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else function
            if field not in ("annotation", "returns"):
                yield value if is_list else vars(node), key, child, inside
                if not is_message(child):
                    yield from places(child, inside)


def mutants(file: str) -> Iterator[tuple[str, int, str, str]]:
    """(file, line, FILE FUNCTION: `before` -> `after`, the source) of every mutant of a file."""
    tree = ast.parse((ROOT / file).read_text())
    for place, key, node, function in list(places(tree)):
        before = ast.unparse(node)
        is_prose = is_message(getattr(node, "value", None)) or before.startswith("if __name__")
        for new in [] if is_prose or not hasattr(node, "lineno") else broken(node):
            place[key] = ast.copy_location(new, node)
            source = ast.unparse(ast.fix_missing_locations(tree))
            place[key] = node
            first, then = (text.splitlines()[0] for text in (before, ast.unparse(new)))
            yield file, node.lineno, f"{file} {function}: `{first}` -> `{then}`", source


def run(words: list[str], limit_s: float, file: str, source: str) -> tuple[int | None, str]:
    """pytest where `file` holds `source` -> its exit code, None: no end in time; its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
    ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", "*.log")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as out:
        project = shutil.copytree(ROOT, Path(folder) / "project", ignore=ignore)
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        (project / file).write_text(source)
        streams = {"stdout": out, "stderr": out}
        child = subprocess.Popen(command, cwd=project, start_new_session=True, **streams)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(limit_s)
        code = child.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and the processes that it started
        child.wait()
        out.seek(0)
        return code, out.read()


@cache
def tests_of(file: str) -> tuple[list[str], float]:
    """The tests of a file, and how long a mutant may take."""
    folder, _, name = file.rpartition("/")
    tests = TESTED_BY.get(file, f"tests/{folder}/test_{name}".replace("//", "/")).split()
    start = time.monotonic()
    code, printed = run(tests, 900, file, (ROOT / file).read_text())
    assert code == 0, f"{tests} fail on the code as it is:\n{printed}"
    return tests, 20 + 4 * (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, value, text in (("--n", 150, "how many mutants to draw"), ("--seed", 0, ""),
                              ("--file", "", "or a package"), ("--jobs", 2, "")):  # fmt: skip
        parser.add_argument(flag, type=type(value), default=value, help=text)
    flags = parser.parse_args()
    folders = [ROOT, ROOT / "sources", ROOT / "scoring", ROOT / "engine"]
    files = sorted(str(f.relative_to(ROOT)) for folder in folders for f in folder.glob("*.py"))
    files = [f for f in files if f"{f}/".startswith(flags.file.rstrip("/") + "/") or not flags.file]
    reasons = (ROOT / "tests" / "equivalent.txt").read_text()
    generator, by_line = random.Random(flags.seed), {}
    for mutant in (m for file in files for m in mutants(file)):
        by_line.setdefault(mutant[:2], []).append(mutant)
    # A line with many numbers is drawn no more often than another.
    lines = generator.sample([*by_line], min(flags.n, len(by_line)))
    drawn = [generator.choice(by_line[line]) for line in lines]
    print(f"{len(drawn)} mutants of {len(files)} files, seed {flags.seed}", flush=True)

    def judge(mutant: tuple[str, int, str, str]) -> str:
        file, _, name, source = mutant
        if f"{name} | " in reasons:
            return "equivalent"
        return "survived" if run(*tests_of(file), file, source)[0] == 0 else "killed"

    counts = Counter()
    with ThreadPoolExecutor(flags.jobs) as pool:
        for (file, line, name, _), outcome in zip(drawn, pool.map(judge, drawn), strict=True):
            counts["packages" if "/" in file else "reading path", outcome] += 1
            if outcome != "killed":
                print(f"{outcome}: line {line}, {name}", flush=True)
    for (kind, outcome), n in sorted(counts.items()):
        print(f"{kind}: {n} {outcome}")


if __name__ == "__main__":
    main()
