"""A ranked table of scores: python -m course.board FOLDER

FOLDER holds rows of course.score, each a file NAME.json written with --json. They are ranked by
facts, one table for each assignment and budget, printed as Markdown and written into FOLDER as
board.md and board.html. A file that is no row is left out with a warning. The numbers are those
in the files: course.score --verify checks them.
"""

import html
import math
from dataclasses import dataclass
from pathlib import Path

from config import UserError, argument, one_line, warn_once
from course.score import cells, markdown
from engine.cli import parse, user_errors, write_text
from sources.records import read_json

PAGE = """<!doctype html>
<meta charset="utf-8"><title>Scores</title>
<style>body {{ font-family: sans-serif }} table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #ccc; padding: 3px 8px; text-align: left }}</style>
{}
"""


@dataclass(frozen=True)
class BoardConfig:
    """Rank the rows in a folder."""

    folder: str = argument("FOLDER of rows, NAME.json")


def read_row(file: Path) -> dict:
    """A row whose cells can be shown. Raises UserError."""
    row = read_json(file, dict)
    try:
        texts = [row["budget"], *cells(row, row["assignment"]).values()]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name that is no text")
        if not isinstance(row["assignment"], int | None):
            raise ValueError("assignment")
        if row["facts"] is not None and not 0 <= row["facts"] <= 1:  # a NaN is in no range
            raise ValueError("facts")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: no row of course.score: {error}") from error
    return row


def ranked(rows: list[dict], assignment: int | None) -> list[dict[str, str]]:
    """The highest facts first, those without last; equal facts have the same rank."""
    facts = [-math.inf if row["facts"] is None else row["facts"] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -facts[i])
    return [{"rank": str(1 + sum(f > facts[i] for f in facts)), **cells(rows[i], assignment)}
            for i in order]  # fmt: skip


def as_html(table: list[dict[str, str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(title)}</th>' for title in table[0])}</tr>"]
    for row in table:
        texts = (html.escape(one_line(text, 80)) for text in row.values())
        lines.append(f"<tr>{''.join(f'<td>{text}</td>' for text in texts)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


@user_errors
def main(argv: list[str] | None = None) -> str:
    folder = Path(parse(BoardConfig, argv, "course.board").folder)
    groups: dict[tuple, list[dict]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            row = read_row(file)
        except UserError as error:
            warn_once(f"left out: {error}")
            continue
        groups.setdefault((row["assignment"] or 0, row["budget"]), []).append(row)
    if not groups:
        raise UserError(f"{folder}: not a folder with a row of course.score, NAME.json, in it")
    texts, pages = [], []
    for (assignment, budget), rows in sorted(groups.items()):
        title = f"Assignment {assignment}" if assignment else "No assignment"
        title += f", budget {one_line(budget, 16)}"
        table = ranked(rows, assignment or None)
        texts.append(f"## {title}\n\n{markdown(table)}\n")
        pages.append(f"<h2>{html.escape(title)}</h2>\n{as_html(table)}")
    write_text(folder / "board.md", "\n".join(texts), "board")
    write_text(folder / "board.html", PAGE.format("\n".join(pages)), "board")
    print("\n".join(texts))
    return "\n".join(texts)


if __name__ == "__main__":
    main()
