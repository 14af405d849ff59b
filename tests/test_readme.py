"""The README and the pages it links to: their files, links, commands and code."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import chat
import eval as evaluation
import train
from engine.cli import parse
from routers import get_router
from sources.load import parse_spec
from tests.test_layout import PATH

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "results/README.md", "engine/README.md", "sources/README.md",
         "lab/README.md")  # fmt: skip
TEXTS = {page: (ROOT / page).read_text() for page in (*PAGES, "cuda/README.md", "tests/README.md")}
README = TEXTS["README.md"]
FLAGS = {"train.py": train.TrainConfig, "eval.py": evaluation.EvalConfig,
         "chat.py": chat.ChatConfig}  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; "" has the commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(text: str) -> list[str]:
    """Every call of Python, pytest or torchrun in a fenced block or between backquotes."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(python|pytest|torchrun) ", part)]


COMMANDS = sorted({command for page in TEXTS for command in commands(TEXTS[page])})


def test_every_file_of_the_reading_path_is_listed_in_order():
    rows = re.findall(r"^\| (\d+) \| (\w+)\.py \| .+ \|$", README, re.MULTILINE)
    assert rows == [(str(i), name) for i, name in enumerate(PATH, 1)]
    assert "`ops.py`" in README


def test_every_package_is_listed():
    for name in ("sources", "scoring", "engine", "cuda", "lab", "course", "tests"):
        assert re.search(rf"^\| \[?{name}/", README, re.MULTILINE), name
        assert (ROOT / name).is_dir()


@pytest.mark.parametrize("package", ["sources", "engine"])
def test_every_file_of_a_package_is_listed_on_its_page(package):
    listed = re.findall(r"^\| (\w+\.py) \| ", TEXTS[f"{package}/README.md"], re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in (ROOT / package).glob("*.py"))


def test_the_two_set_up_commands_are_the_first_of_their_kind():
    lines = [line for block in blocks(README, "") for line in block.splitlines()]
    first = {word: next(line for line in lines if word in line)
             for word in ("train.py --phase 3", "pytest")}  # fmt: skip
    assert first == {
        "train.py --phase 3": "pip install -r requirements.txt && python train.py --phase 3",
        "pytest": "pip install -r requirements-dev.txt && pytest",
    }


def test_the_pages_have_commands():
    assert all(commands(TEXTS[page]) for page in TEXTS)
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_files_and_flags_that_exist(command):
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":  # its own flags come first
        words = ["python", *words[next(i for i, w in enumerate(words) if w in FLAGS) :]]
    if words[0] == "pytest":
        words = ["python", "-m", *words]
    script, *argv = words[1:]
    files = [word for word in argv if word.endswith(".py") and word.count("/")]
    assert [f for f in files if not (ROOT / f).is_file()] == []
    if script in FLAGS:
        flags = parse(FLAGS[script], argv, script)
        for spec in flags.data:
            parse_spec(spec)
        return
    if script != "-m":
        assert (ROOT / script).is_file()
        return
    module, *argv = argv
    if module != "pytest":
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def flags_of(module: str) -> type:
    """The dataclass whose fields are the flags of a file of the lab."""
    found = vars(importlib.import_module(module)).items()
    own = [value for name, value in found if name.endswith("Config")]
    (config,) = [value for value in own if value.__module__ == module]
    return config


LAB = [c for c in COMMANDS if c.startswith("python -m lab.")]


@pytest.mark.parametrize("command", LAB)
def test_every_command_of_the_lab_has_flags_that_exist(command):
    module, *argv = shlex.split(command, comments=True)[2:]
    if module == "lab.bench" and argv[:1] == ["memory"]:
        module = f"lab.{argv.pop(0)}"
    argv = ["1" if word == "N" else word for word in argv]  # stands for a number
    parse(flags_of(module), argv, module)


def test_the_router_in_the_readme_works(tmp_path):
    (code,) = blocks(README, "python")
    (tmp_path / "my_router.py").write_text(code)
    router = get_router(f"{tmp_path / 'my_router.py'}:Top1")(8, 4)
    mask = torch.tensor([[True, True, False]])
    routing = router(torch.randn(1, 3, 8), mask)
    assert (routing.gates != 0).sum(dim=-1).tolist() == [[1, 1, 0]]


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_image_and_file_that_it_names_exists(page):
    wrong = []
    for name in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[page]):
        file, _, anchor = name.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.is_file() or (anchor and anchor not in headings(target.read_text())):
            wrong.append(name)
    named = re.findall(r"`((?:lab|assets|figures|tests|engine|course)/[\w./]+)`", TEXTS[page])
    assert [*wrong, *(name for name in named if not (ROOT / name).exists())] == []


def test_a_link_that_leads_nowhere_would_be_seen():
    assert "headings-1" in headings("# Headings 1\n")
    assert any("](" in text for text in TEXTS.values())
