"""No test asserts nothing.

An assertion in a loop, or in all(...) over a comprehension, asserts nothing where there is nothing
to loop over. So what is looped over must be seen to have items: it is written out, or made from
what is; or another assertion of the function, outside such loops, names it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("course/tests/**/*.py")])
# Calls that give items where their arguments have some, and methods where their object has some.
KEEP = {"zip", "enumerate", "sorted", "list", "tuple", "reversed", "map", "product", "set", "dict",
        "range", "permutations", "split", "items", "keys", "values", "pairwise"}  # fmt: skip
NEVER_EMPTY = {"parameters", "named_parameters", "modules", "named_modules", "children", "walk"}


def names(node):
    return set(re.findall(r"[^\W\d]\w*", ast.unparse(node)))


def has_items(node, known):
    """Is there certainly something in it? known: names of which this is known."""
    match node:
        case ast.Constant(value=value):
            return bool(value)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in known or name.isupper()
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return any(not isinstance(p, ast.Starred) or has_items(p, known) for p in parts)
        case ast.Starred(value=value):
            return has_items(value, known)
        case ast.Dict(values=values):
            return any(has_items(value, known) for value in values)
        case ast.BinOp(left=left, right=right):
            return has_items(left, known) or has_items(right, known)
        case ast.ListComp(generators=parts) | ast.GeneratorExp(generators=parts):
            return all(has_items(each.iter, known) and not each.ifs for each in parts)
        case ast.Call(func=func, args=args):
            name = ast.unparse(func).split(".")[-1]
            parts = args[name == "map" :] or [getattr(func, "value", func)]
            certain = [has_items(part, known) for part in parts]
            certain = any(certain) if "strict=True" in ast.unparse(node) else all(certain)
            return name in NEVER_EMPTY or (name in KEEP and certain)
    return False


def statements(body, loops=()):
    """(each statement, what the loops around it loop over; None for a condition)"""
    for node in body:
        yield node, loops
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = (*loops, node.iter) if isinstance(node, ast.For) else loops
            inner = (*loops, None) if isinstance(node, ast.If | ast.Try) else inner
            yield from statements(getattr(node, "body", []) + getattr(node, "orelse", []), inner)


def known_names(function):
    """Names whose every assignment has items, or that are filled, in loops that have items."""
    known = set()
    for call in function.decorator_list:  # what is parametrized is written out
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("parametrize"):
            known |= {n.value for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant)}
    for _ in range(3):  # names that are made from each other
        bound, filled = {}, set()
        for node, loops in statements(function.body):
            appended = re.match(r"(\w+)\.(append|add)\(", ast.unparse(node))
            if appended and all(loop and has_items(loop, known) for loop in loops):
                filled.add(appended[1])
            if isinstance(node, ast.Assign):
                places, values = ([*getattr(x, "elts", [x])] for x in (node.targets[0], node.value))
                for place, value in zip(places, values, strict=False):
                    bound.setdefault(ast.unparse(place), []).append(has_items(value, known))
        known = known | filled | {name for name, values in bound.items() if all(values)}
    return known


def assertions(function):
    """(each assertion, what the loops around it, and its own all(...), loop over)"""
    for node, around in statements(function.body):
        loops, test = [loop for loop in around if loop], getattr(node, "test", None)
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "all":
            loops += [each.iter for each in getattr(test.args[0], "generators", [])]
        if re.match(r"assert|[\w.]*assert\w*\(|with .*raises\(", ast.unparse(node)):
            yield node, loops


def may_be_empty(function):
    known, shown = known_names(function), set()

    def runs(loop):
        return has_items(loop, known) or bool(names(loop) & shown)

    for _ in range(3):  # an assertion may stand in a loop over what another has shown
        sure = [node for node, loops in assertions(function) if all(map(runs, loops))]
        shown = set().union(*map(names, sure))
    lines = [(node.lineno, loop) for node, loops in assertions(function) for loop in loops]
    return [f"{function.name}, line {line}: {ast.unparse(x)}" for line, x in lines if not runs(x)]


def found_in(text):
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    return [may_be_empty(f) for f in functions if f.name.startswith("test_")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_assertion_stands_only_in_a_loop_that_may_be_empty(file):
    assert not any(found := found_in(file.read_text())), [*filter(None, found)]


EXAMPLES = """
def test_loop():
    for x in made():
        assert x
def test_all():
    found = made()
    assert all(x for x in found)
def test_written_out():
    assert all(a < b for a, b in [(1, 2), (3, 4)])
def test_asserted():
    assert len(found) == 3
    for x in found:
        assert x
"""


def test_a_loop_that_may_be_empty_is_found():
    assert list(map(bool, found_in(EXAMPLES))) == [True, True, False, False]
