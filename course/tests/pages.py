"""The commands and the code on the pages of the course."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "course").glob("*.md")), ROOT / "course" / "museum" / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """Every line that calls python or pytest, in a block or between backquotes, as words."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", prose)
    split = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(c, comments=True) for c in split if re.match(r"(python|pytest) ", c)]


def of_assignment(number: int) -> Path:
    (page,) = (ROOT / "course").glob(f"a{number}_*.md")
    return page
