"""The reading order is the import order, and the core needs six packages: no more."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {"torch", "numpy", "safetensors", "tokenizers", "PIL", "tqdm"}
SCRIPTS = {"train", "eval", "chat"}
PACKAGES = ("benchmarks", "engine")


def reading_order() -> list[str]:
    names = re.findall(r"^\| ([\w/]+)\.py \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [name.replace("/", ".") for name in names]


def files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in ROOT.glob(f"{name}/*.py"))]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module
            found.add(module if module.startswith(PACKAGES) else module.split(".")[0])
    return found


def path(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


def test_the_readme_lists_every_file_once():
    order = reading_order()
    there = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in files()]
    assert sorted(order) == sorted(there)


def test_each_file_uses_only_what_is_listed_above_it():
    order = reading_order()
    for i, name in enumerate(order):
        ours = imports(path(name)) & set(order)
        assert ours <= set(order[:i]), f"{name}.py imports {ours - set(order[:i])}"
        assert not ours & SCRIPTS, f"{name}.py imports a script"


def test_the_core_imports_its_six_packages_only():
    ours = set(reading_order())
    for name in ours:
        foreign = imports(path(name)) - ours - set(sys.stdlib_module_names)
        assert foreign <= ALLOWED, f"{name}.py imports {foreign - ALLOWED}"


def test_files_and_functions_stay_short():
    for file in files():
        text = file.read_text()
        assert text.count("\n") <= 300, f"{file.name} is longer than 300 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno
                assert length <= 60, f"{file.name}: {node.name} has {length} lines"
