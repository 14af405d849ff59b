"""Break each reference solution in one place, and see whether its assignment's checks notice.

    python -m course.tests.mutants              all eight assignments
    python -m course.tests.mutants 2 5          these; each mutant that is not noticed is printed

A mutant is the solution with one change, found by AST: those of tests/mutate.py, and a call, a
keyword or an operand less, another argument, a function for its neighbour, a `.detach()` more.
What the stub has already is not changed. The contract is asked only where the checks see nothing.
wrong_answers/equivalent.txt lists mutants that change nothing, with the reason.
"""

import ast
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

from course.tests import test_router as contract
from course.tests.judges import CHECKS
from course.tests.test_answers import SOLUTIONS, outcomes
from course.tests.test_assignments import STUBS, stub
from routers import ROUTERS
from tests.mutate import broken, changed, places

EQUIVALENT = (Path(__file__).parent / "wrong_answers" / "equivalent.txt").read_text()
NEIGHBOURS = {"sum": "mean", "mean": "sum", "softmax": "sigmoid", "sigmoid": "tanh",
              "ceil": "floor", "var": "std", "square": "abs", "sign": "tanh", "max": "min",
              "argmax": "argmin", "randn_like": "rand_like", "softplus": "relu",
              "relu": "sigmoid", "logsumexp": "amax", "zeros_like": "ones_like"}  # fmt: skip
ARGUMENTS = {"logits": ("x[..., : logits.shape[-1]]", "logits + 1"), "gates": ("logits",),
             "mask": ("(mask | True)", "~mask"), "prompt": ("mask", "~prompt"),
             "x": ("x * 0",), "load": ("load * load.numel()",)}  # fmt: skip


def more(node: ast.AST) -> Iterator[ast.AST]:
    """What tests/mutate.py does not have: mistakes that are made with tensors."""
    match node:
        case ast.BinOp(left=left, right=right):
            yield left
            yield right
        case ast.Call(func=func, args=args, keywords=keywords):
            for i in range(len(keywords)):
                yield changed(node, keywords=keywords[:i] + keywords[i + 1 :])
            yield ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])
            yield ast.UnaryOp(ast.USub(), node)
            if isinstance(func, ast.Attribute):
                is_method = ast.unparse(func.value) not in ("torch", "F", "math")
                yield from [func.value] if is_method else args[:1]
                if func.attr in NEIGHBOURS:
                    yield changed(node, func=changed(func, attr=NEIGHBOURS[func.attr]))
        case ast.Name(id=name, ctx=ast.Load()) if name in ARGUMENTS:
            for text in ARGUMENTS[name]:
                yield ast.parse(text, mode="eval").body
        case ast.If(body=body):
            yield ast.If(ast.Constant(True), body, [])
            yield ast.Pass()
        case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Load()):
            yield ast.Constant(1)
            yield ast.BinOp(node, ast.Mult(), ast.Constant(2))
        case ast.Return(value=value) if value:
            yield ast.Return(ast.BinOp(value, ast.Mult(), ast.Constant(2)))


def mutants(number: int) -> Iterator[tuple[str, type]]:
    """(aN: the line that is broken, the class) of every mutant of a solution."""
    tree = ast.parse((SOLUTIONS / f"a{number}.py").read_text())
    text, member = Path(stub(number).rpartition(":")[0]).read_text(), ast.FunctionDef | ast.Assign
    given = {ast.unparse(n) for n in ast.walk(ast.parse(text)) if isinstance(n, member)}
    lines, seen = ast.unparse(tree).splitlines(), {ast.unparse(tree)}
    skipped = {id(n) for top in ast.walk(tree) if ast.unparse(top) in given for n in ast.walk(top)}
    for place, key, node, _ in list(places(tree)):
        if id(node) in skipped or not hasattr(node, "lineno") or isinstance(node, ast.alias):
            continue
        for new in (*broken(node), *more(node)):
            place[key] = new
            source = ast.unparse(ast.fix_missing_locations(tree))
            place[key] = node
            if source not in seen:  # two changes may give the same text
                seen.add(source)
                module = types.ModuleType("mutant")
                with warnings.catch_warnings(action="ignore"):  # about what a mutant does
                    exec(source, vars(module))
                line = next(b for a, b in zip(lines, source.splitlines(), strict=False) if a != b)
                yield f"a{number}: {line.strip()}", vars(module)[STUBS[number].partition(":")[2]]


def noticed_by(cls: type, number: int) -> str:
    """The checks, the contract, or nothing if neither sees it; an error if it does not run."""
    try:
        if set(outcomes(cls, number).values()) != {"passed"}:
            return "checks"
    except Exception:  # the student sees a traceback
        return "error"
    ROUTERS["mutant"] = cls
    cases = [contract.Case("mutant", level) for level in contract.LEVELS]
    return "contract" if any(contract.failures(c, contract.CHECKS) for c in cases) else ""


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:]] or CHECKS
    warnings.simplefilter("ignore")
    print("| assignment | mutants | equivalent | checks | contract | missed | do not run |")
    for number in numbers:
        kinds = []
        for name, cls in mutants(number):
            kinds.append("equivalent" if f"{name} | " in EQUIVALENT else noticed_by(cls, number))
            if not kinds[-1]:
                print(f"missed: {name}", file=sys.stderr, flush=True)
        counts = [kinds.count(kind) for kind in ("equivalent", "checks", "contract", "", "error")]
        print("|", " | ".join(map(str, (number, sum(counts[:-1]), *counts))), "|", flush=True)


if __name__ == "__main__":
    main()
