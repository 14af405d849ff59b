"""The README, the pages it links to and the course's: their files, links, commands and code."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from config import TrainConfig
from engine.cli import parse
from routers import get_router
from sources.load import parse_spec
from tests.test_layout import PATH, SCRIPTS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"{folder}/README.md" for folder in
         ("results", "engine", "sources", "lab", "cuda", "tests", "course/museum")),
         *(f"course/{file.name}" for file in sorted((ROOT / "course").glob("*.md"))))  # fmt: skip
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXTS["README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every call of Python, pytest or torchrun in a fenced block or between backquotes."""
    lines = [line for name, block in FENCED.findall(text) if not name for line in block.split("\n")]
    lines += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(python|pytest|torchrun) ", part)]


COMMANDS = sorted({command for page in TEXTS for command in commands(TEXTS[page])})


def test_every_file_of_the_reading_path_is_listed_in_order_and_every_package():
    rows = re.findall(r"^\| (\d+) \| (\w+)\.py \| .+ \|$", README, re.MULTILINE)
    assert rows == [(str(i), name) for i, name in enumerate(PATH, 1)]
    for name in ("sources", "scoring", "engine", "cuda", "lab", "course", "tests"):
        assert re.search(rf"^\| \[?{name}/", README, re.MULTILINE), name
    for package in ("sources", "engine"):
        listed = re.findall(r"^\| (\w+\.py) \| ", TEXTS[f"{package}/README.md"], re.MULTILINE)
        assert sorted(listed) == sorted(file.name for file in (ROOT / package).glob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_files_and_flags_that_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":  # its own flags come first
        while words[1] not in ("train.py", "eval.py"):
            del words[1]
    if words[0] == "pytest":
        words = ["python", "-m", *words]
    files = [ROOT / word for word in words if word.endswith(".py") and word.count("/")]
    assert [file for file in files if not file.is_file()] == []
    module, argv = words[1].removesuffix(".py"), words[2:]
    if module == "-m":
        module, *argv = argv
    if module == "lab.bench" and argv[:1] == ["memory"]:
        module = f"lab.{argv.pop(0)}"
    assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file()
    if module in SCRIPTS or module.startswith(("lab.", "course.", "sources.")):
        argv = ["1" if word == "N" else word for word in argv]  # stands for a number
        found = vars(importlib.import_module(module)).items()  # a dataclass has its flags
        own = [x for name, x in found if name.endswith("Config") and x.__module__ == module]
        for spec in getattr(parse((own or [TrainConfig])[0], argv, module), "data", ()):
            parse_spec(spec)


def test_the_router_in_the_readme_works(tmp_path):
    (code,) = [block for name, block in FENCED.findall(README) if name == "python"]
    (tmp_path / "my_router.py").write_text(code)
    router = get_router(f"{tmp_path / 'my_router.py'}:Top1")(8, 4)
    routing = router(torch.randn(1, 3, 8), torch.tensor([[True, True, False]]))
    assert (routing.gates != 0).sum(dim=-1).tolist() == [[1, 1, 0]]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_every_page_has_commands_and_all_that_it_links_to_or_names_exists(page):
    assert commands(TEXTS[page])
    wrong = []
    for name in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[page]):
        file, _, anchor = name.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(name)
    named = re.findall(r"`((?:lab|assets|figures|tests|engine|course)/[\w./]+)`", TEXTS[page])
    assert [*wrong, *(name for name in named if not (ROOT / name).exists())] == []
