"""The layout of DESIGN.md: which file may import which, and what a function's length may be.

    python -m pytest tests/test_layout.py

The reading path is the top level; sources/, scoring/ and engine/ make it real; lab/ and course/
use all of it. Imports inside functions count for the directions, and not for cycles, since nothing
is computed by them when a module is loaded.
"""

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from tests.trace_calls import sparse_layer

ROOT = Path(__file__).parent.parent
PATH = ("config", "vision", "data", "routers", "moe", "decoder", "model", "train",
        "router_training", "checkpoint", "metrics", "eval", "chat")  # fmt: skip
SCRIPTS = ("train", "eval", "chat")
TOP = (*PATH, "ops")
MODULES = tuple(name for name in TOP if name not in SCRIPTS)
USES_PACKAGES = ("data", "router_training", "checkpoint", *SCRIPTS)
PACKAGES = ("sources", "scoring", "engine")
OUTER = ("lab", "course")
THIRD_PARTY = {"torch", "numpy", "safetensors", "tokenizers", "PIL", "tqdm"}
MAX_TOP, MAX_FUNCTION = 14, 60

# What the files of a package may import of ours: modules of the top level, and packages.
MAY_IMPORT = {
    "sources": {"config", "vision", "data", "sources"},
    "scoring": {"config", "data", "metrics", "sources", "scoring"},
    "engine": {*MODULES, "sources", "engine"},
}
# "importer -> imported": why it is allowed all the same.
ALLOWED: dict[str, str] = {}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def file_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def modules(*folders: str) -> list[str]:
    """The modules of the top level (""), or of packages."""
    return sorted(module_of(file) for name in folders for file in (ROOT / name).glob("*.py"))


CORE = modules("", *PACKAGES)
EVERY = modules("", *PACKAGES, *OUTER)


@lru_cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text())


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below this one that run when its module is loaded: none inside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def imports(module: str, all_of_them: bool = True) -> dict[str, int]:
    """{imported module: line}; of `from engine import lora` that is engine.lora."""
    tree, found = tree_of(module), {}
    for node in ast.walk(tree) if all_of_them else at_import(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}, line {node.lineno}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in EVERY else node.module for name in inner]
        else:
            continue
        found |= {name: node.lineno for name in names if name not in found}
    return found


def first(module: str) -> str:
    return module.partition(".")[0]


def violations(module: str, may_import: set[str]) -> list[str]:
    """Imports of ours that are neither in may_import nor in ALLOWED, with their lines."""
    ours = {first(name) for name in EVERY}
    return [
        f"{file_of(module).relative_to(ROOT)}:{line} imports {name}"
        for name, line in imports(module).items()
        if first(name) in ours - may_import and f"{module} -> {name}" not in ALLOWED
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package):
    found = [v for module in modules(package) for v in violations(module, MAY_IMPORT[package])]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", TOP)
def test_a_file_of_the_top_level_imports_only_what_it_may(module):
    may = {*MODULES, *(PACKAGES if module in USES_PACKAGES else ())}
    assert not (found := violations(module, may)), "\n".join(found)


def test_no_script_is_imported_by_a_script_or_by_the_core():
    found = {module: {*imports(module)} & {*SCRIPTS} for module in CORE}
    assert not any(found.values()), {module: names for module, names in found.items() if names}


def test_nothing_imports_the_lab_or_the_course():
    found = [(m, name) for m in CORE for name in imports(m) if first(name) in OUTER]
    assert not found


def test_every_exception_is_needed():
    needed = {f"{module} -> {name}" for module in CORE for name in imports(module)}
    assert needed >= set(ALLOWED)


def find_cycle(graph: dict[str, list[str]]) -> list[str]:
    """A walk along the arrows that ends where it began, or [] if there is none."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for following in graph[node]:
            if cycle := walk(following, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in graph if (cycle := walk(node, []))), [])


def test_a_cycle_is_found():
    assert find_cycle({"a": ["b", "c"], "b": [], "c": ["d"], "d": ["b", "c"]}) == ["c", "d", "c"]
    assert find_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_modules_import_each_other_in_a_cycle():
    graph = {m: [name for name in imports(m, False) if name in EVERY] for m in EVERY}
    assert all(graph[name] for name in ("train", "eval", "engine.run", "sources.load"))
    assert not (cycle := find_cycle(graph)), " -> ".join(cycle)


def test_the_core_imports_its_six_packages_only():
    ours = {first(name) for name in EVERY}
    assert set(TOP) < set(CORE)
    for module in CORE:
        foreign = {first(name) for name in imports(module)} - ours - set(sys.stdlib_module_names)
        assert foreign <= THIRD_PARTY, f"{module} imports {foreign - THIRD_PARTY}"


def test_the_top_level_is_the_reading_path_and_ops():
    assert modules("") == sorted(TOP)
    assert len(modules("")) <= MAX_TOP


@pytest.mark.parametrize("module", CORE)
def test_every_function_fits_on_a_screen(module):
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno
            assert length <= MAX_FUNCTION, f"{module}: {node.name} has {length} lines"


def test_one_forward_of_a_sparse_layer_enters_few_functions():
    """python -m tests.trace_calls prints them, and those of a whole training step."""
    found = sparse_layer().found
    assert len(found) <= 7 and {file for file, _ in found} == {"moe.py", "routers.py"}
