"""The README's line counts, commands and router are what it says: pytest tests/test_readme.py"""

import re
import shlex
from pathlib import Path

import pytest
import torch

import chat
import eval as evaluation
import train
from flags import parse
from routers import get_router

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
FLAGS = {"train.py": train.TrainConfig, "eval.py": evaluation.EvalConfig,
         "chat.py": chat.ChatConfig}  # fmt: skip
COMMANDS = [
    command.strip()
    for language, block in BLOCKS
    if language == ""
    for line in block.splitlines()
    for command in line.split("&&")
    if command.strip().startswith("python ")
]


def test_line_counts_are_within_a_tenth():
    rows = re.findall(r"^\| ([\w/]+\.py) \|.*\| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) > 10
    for name, said in rows:
        n = (ROOT / name).read_text().count("\n")
        assert abs(n - int(said)) <= 0.1 * n, f"{name} has {n} lines, the README says {said}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_flags_that_exist(command):
    script, *argv = shlex.split(command, comments=True)[1:]
    if script == "-m":
        assert (ROOT / (argv[0].replace(".", "/") + ".py")).is_file()
        return
    parse(FLAGS[script], argv, script)


def test_the_router_in_the_readme_works(tmp_path):
    (code,) = [block for language, block in BLOCKS if language == "python"]
    (tmp_path / "my_router.py").write_text(code)
    router = get_router(f"{tmp_path / 'my_router.py'}:Top1")(8, 4)
    mask = torch.tensor([[True, True, False]])
    routing = router(torch.randn(1, 3, 8), mask)
    assert (routing.gates != 0).sum(dim=-1).tolist() == [[1, 1, 0]]


def test_every_file_it_shows_or_names_exists():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:lab|assets|figures)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
