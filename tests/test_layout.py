"""Which file may import which, and how long a function may be.

The reading path is the top level; sources/, scoring/ and engine/ make it real; lab/ and course/
use all of it. Imports inside functions count too.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATH = ("config", "vision", "data", "routers", "moe", "decoder", "model", "train",
        "router_training", "checkpoint", "metrics", "eval", "chat")  # fmt: skip
SCRIPTS = ("train", "eval", "chat")
TOP = (*PATH, "ops")
MODULES = {name for name in TOP if name not in SCRIPTS}
USES_PACKAGES = ("data", "router_training", "checkpoint", *SCRIPTS)
THIRD_PARTY = {"torch", "numpy", "safetensors", "tokenizers", "PIL", "tqdm"}
# A script, which nothing imports; packages that only some data need.
OPTIONAL = {"sources/show.py": {"engine"}, "sources/packed.py": {"pyarrow"},
            "sources/dicom.py": {"pydicom"}}  # fmt: skip
MAX_FUNCTION = 60  # lines
# What the files of a package may import of ours: modules of the top level, and packages.
PACKAGES = {
    "sources": {"config", "vision", "data", "sources"},
    "scoring": {"config", "data", "metrics", "sources", "scoring"},
    "engine": {*MODULES, "sources", "engine"}}  # fmt: skip
CORE = sorted(file.relative_to(ROOT).as_posix() for folder in ("", *PACKAGES)
              for file in (ROOT / folder).glob("*.py"))  # fmt: skip


@pytest.mark.parametrize("file", CORE)
def test_a_file_imports_only_what_it_may_and_its_functions_fit_on_a_screen(file):
    package, _, name = file.removesuffix(".py").rpartition("/")
    ours = MODULES | (set(PACKAGES) if name in USES_PACKAGES else set())  # at the top level
    may, wrong = PACKAGES.get(package, ours) | THIRD_PARTY | set(sys.stdlib_module_names), []
    may |= OPTIONAL.get(file, set())
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." if node.level else node.module]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= MAX_FUNCTION, node.name
        wrong += [(node.lineno, name) for name in names if name.split(".")[0] not in may]
    assert wrong == []


def test_the_top_level_is_the_reading_path_and_ops():
    assert {file for file in CORE if "/" not in file} == {f"{name}.py" for name in TOP}
