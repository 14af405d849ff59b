"""No test asserts nothing.

An assertion in a loop, or in all(...) over a comprehension, asserts nothing where there is nothing
to loop over. So what is looped over must be seen to have items: it is written out, or made from
what is; or another assertion of the function, outside such loops, names it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("course/tests/**/*.py")])
# Calls that give items where their arguments have some, and methods where their object has some.
KEEP = {"zip", "enumerate", "sorted", "list", "tuple", "reversed", "map", "product", "set", "dict",
        "permutations", "split", "items", "keys", "values", "pairwise", "combinations"}  # fmt: skip
# A model has parameters, a syntax tree nodes.
NEVER_EMPTY = {"parameters", "named_parameters", "modules", "named_modules", "children", "walk",
               "named_children", "named_buffers"}  # fmt: skip


def names(node: ast.AST) -> set[str]:
    """Names and attributes in it."""
    nodes = list(ast.walk(node))
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return {n.id for n in nodes if isinstance(n, ast.Name)} | attributes


def has_items(node: ast.expr, known: set[str]) -> bool:
    """Is there certainly something in it? known: names of which this is known."""
    match node:
        case ast.Constant():
            return bool(node.value)
        case ast.Name():
            return node.id in known or node.id.isupper()
        case ast.Attribute():
            return node.attr.isupper()
        case ast.List() | ast.Tuple() | ast.Set():
            parts = node.elts
            return any(not isinstance(p, ast.Starred) or has_items(p.value, known) for p in parts)
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return any(k is not None or has_items(v, known) for k, v in pairs)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            return all(has_items(g.iter, known) and not g.ifs for g in node.generators)
        case ast.BinOp():
            return has_items(node.left, known) or has_items(node.right, known)
        case ast.IfExp():
            return has_items(node.body, known) and has_items(node.orelse, known)
        case ast.Call():
            return call_has_items(node, known)
    return False


def call_has_items(node: ast.Call, known: set[str]) -> bool:
    name = ast.unparse(node.func).split(".")[-1]
    if name == "range":
        end = node.args[min(1, len(node.args) - 1)]
        return has_items(end, known)
    if name not in KEEP:
        return name in NEVER_EMPTY
    parts = node.args[name == "map" :]
    if isinstance(node.func, ast.Attribute) and not parts:  # a method, as of a dict
        parts = [node.func.value]
    parts = [part.value if isinstance(part, ast.Starred) else part for part in parts]
    is_strict = any(k.arg == "strict" for k in node.keywords)  # then all are as long as one
    return bool(parts) and (any if is_strict else all)(has_items(p, known) for p in parts)


def filled(body: list[ast.stmt], known: set[str], loops: tuple = ()) -> Iterator[str]:
    """Names of lists that are appended to, in loops that have items or none."""
    is_sure = all(has_items(loop, known) for loop in loops)
    for node in body:
        match node:
            case ast.Expr(ast.Call(ast.Attribute(ast.Name(name), "append" | "add"))) if is_sure:
                yield name
            case ast.AugAssign(ast.Name(name), _, value) if is_sure and has_items(value, known):
                yield name
        inner = (*loops, node.iter) if isinstance(node, ast.For) else loops
        if not isinstance(node, ast.If | ast.FunctionDef | ast.Try):
            yield from filled(getattr(node, "body", []), known, inner)


def known_names(body: list[ast.stmt], known: set[str]) -> set[str]:
    """Names whose every assignment has items, or that are filled."""
    bound: dict[str, list[ast.expr]] = {}
    for node in (n for statement in body for n in ast.walk(statement)):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for place, value in pairs:
                    if isinstance(place, ast.Name):
                        bound.setdefault(place.id, []).append(value)
    for _ in range(3):  # names that are made from each other
        known = known | {n for n, vs in bound.items() if all(has_items(v, known) for v in vs)}
        known |= set(filled(body, known))
    return known


def is_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.With):
        return any("raises" in ast.unparse(i.context_expr) for i in node.items)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return "assert" in ast.unparse(node.value.func)
    return isinstance(node, ast.Assert)


def assertions(body: list[ast.stmt], loops: tuple = ()) -> Iterator[tuple[ast.stmt, tuple]]:
    """Every assertion, with what the loops around it loop over."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if is_assertion(node):
            around = loops
            if isinstance(node, ast.Assert) and isinstance(node.test, ast.Call):
                inside = [a for a in node.test.args if isinstance(a, ast.GeneratorExp)]
                if ast.unparse(node.test.func) == "all" and inside:
                    around = (*loops, *(g.iter for g in inside[0].generators))
            yield node, around
        inner = (*loops, node.iter) if isinstance(node, ast.For) else loops
        for field in ("body", "orelse", "finalbody"):
            yield from assertions(getattr(node, field, []), inner)


def may_be_empty(function: ast.FunctionDef, known: set[str]) -> list[str]:
    for call in function.decorator_list:  # what is parametrized is written out
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("parametrize"):
            known = known | {n.value for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant)}
    known = known_names(function.body, known)
    found = list(assertions(function.body))
    shown: set[str] = set()  # named by assertions that surely run
    for _ in range(3):  # such a one may stand in a loop over what another has shown
        sure = [node for node, loops in found if all(runs(loop, known, shown) for loop in loops)]
        shown = set().union(*map(names, sure))
    return [
        f"{function.name}, line {node.lineno}: for ... in {ast.unparse(loop)}"
        for node, loops in found
        for loop in loops
        if not runs(loop, known, shown)
    ]


def runs(loop: ast.expr, known: set[str], shown: set[str]) -> bool:
    return has_items(loop, known) or bool(names(loop) & shown)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_assertion_stands_only_in_a_loop_that_may_be_empty(file):
    tree = ast.parse(file.read_text())
    known = known_names([n for n in tree.body if isinstance(n, ast.Assign)], set())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    tests = [f for f in functions if f.name.startswith("test_")]
    found = [line for function in tests for line in may_be_empty(function, known)]
    assert not found, "\n".join(found)


EMPTY = """
def test_loop():
    for x in made():
        assert x
def test_all():
    found = made()
    assert all(x for x in found)
"""
SURE = """
def test_written_out():
    rows = [(1, 2), (3, 4)]
    assert all(a < b for a, b in rows)
def test_asserted():
    found = made()
    assert len(found) == 3
    for x in found:
        assert x
"""


@pytest.mark.parametrize(("text", "n"), [(EMPTY, 2), (SURE, 0)])
def test_a_loop_that_may_be_empty_is_found(text, n):
    functions = ast.parse(text).body
    assert len(functions) == 2
    assert sum(bool(may_be_empty(f, set())) for f in functions) == n
