"""What readers yield, and JSON files, read so that every error names file, record and field."""

import functools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from config import UserError
from data import Sample, Turns
from sources import packed

MAX_FILE = 4_000_000_000  # bytes of one JSON file; LLaVA-Med's largest has 0.4e9
MAX_LINE = 1_000_000  # bytes of one JSON line
# What a reader yields of an image: a sample without turns, a caption, a dialogue, single questions.
Entry = tuple[Sample, str, Turns, Iterable[Sample]]


class Record:
    """One entry of a JSON file. An error names file, number and field."""

    def __init__(self, file: Path, number: int, values: Any, place: str | None = None):
        self.file, self.number, self.values, self.where = file, number, values, place
        if not isinstance(values, dict):
            raise UserError(f"{self.place} is not an object: {shown(values)}")

    @property
    def place(self) -> str:
        return self.where or f"{self.file}: record {self.number} (from 0)"

    def fail(self, name: str, allowed: str) -> NoReturn:
        value = shown(self.values[name]) if name in self.values else "is missing"
        raise UserError(f'{self.place}: field "{name}" {value}; must be {allowed}')

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "a text that is not empty")
        return self.clean_text(name, value)

    def text_or_number(self, name: str) -> str:
        """As text, perhaps empty. VQA-RAD counts in numbers, and a NaN is a table's empty cell."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.fail(name, "a text or a number")
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(name, "a text or a finite number")
        if isinstance(value, float) and value.is_integer():  # pandas' 1 beside an empty cell
            value = int(value)
        try:
            return self.clean_text(name, str(value))
        except ValueError:  # over 4 300 digits
            self.fail(name, "a text or a number of fewer digits")

    def clean_text(self, name: str, value: str) -> str:
        """Without spaces at its ends; half a surrogate pair is no character of any language."""
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(name, "a text of whole characters (it holds half a surrogate pair)")
        return value.strip()

    def choice(self, name: str, allowed: Iterable[str]) -> str:
        """One of the allowed values, however the file writes its capitals."""
        value = self.text(name).lower()
        for option in allowed:
            if option.lower() == value:
                return option
        self.fail(name, "one of " + ", ".join(allowed))

    def image(self, name: str, folder: Path, follow_links: bool = False) -> Path:
        """A path inside the folder; the file itself may be missing.

        A link must lead to somewhere in that folder or the one of this file, or be allowed.
        """
        if re.match("[a-zA-Z]{2,}://|data:", text := self.text(name)):
            self.fail(name, "a file: nothing is fetched")
        try:
            path, target, is_inside = locate(folder, text)
        except (OSError, ValueError, RuntimeError):  # too long; a null byte; links in a circle
            self.fail(name, "a usable file name")
        if not is_inside:
            self.fail(name, f"inside {folder}")
        if target and not (follow_links or target.is_relative_to(real(self.file.parent))):
            self.fail(name, f"inside {self.file.parent}: it is a link to {target}, which "
                            "--follow-links reads")  # fmt: skip
        return path


def distinct(seen: dict[str, int], record: Record, field: str) -> str:
    """An identifier as text. Raises UserError where an earlier record has it too."""
    name = record.text_or_number(field)
    if seen.setdefault(name, record.number) != record.number:
        record.fail(field, f"another than that of record {seen[name]}")
    return name


@functools.cache
def real(folder: Path) -> Path:
    return folder.resolve()


@functools.cache
def locate(folder: Path, name: str) -> tuple[Path, Path | None, bool]:
    """-> an image's path, its target if a link leads out of the folder, if the path is inside it.

    Cached: a million records may name a thousand images.
    """
    root = real(folder)
    path = Path(os.path.normpath(root / name))
    target = path.resolve()
    target.is_file()  # raises for a name that is too long
    if target.is_relative_to(root):
        return (path if path.is_relative_to(root) else target), None, True
    return path, target, path.is_relative_to(root)


def shown(value: Any) -> str:
    """The first 60 characters of its JSON; no more is encoded, since it may be endless."""
    text = ""
    try:
        for chunk in json.JSONEncoder().iterencode(value):
            text += chunk
            if len(text) > 60:
                break
        return text[:60]
    except (TypeError, ValueError, RecursionError):  # no JSON value, a list within itself
        return f"a {type(value).__name__}"


def check_regular(file: Path) -> None:
    """Raises UserError for what has no known size: a folder, a pipe, a device."""
    try:
        about = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{file}: is not a regular file")
    if about.st_size > MAX_FILE:
        raise UserError(f"{file}: {about.st_size} bytes; at most {MAX_FILE} are read")


def open_file(file: Path) -> bytes:
    """A whole file of at most MAX_FILE bytes, or an image in one (packed.py)."""
    if not os.path.exists(file) and (inner := packed.holder(file))[1]:
        return packed.read_inner(*inner)
    check_regular(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ; json.loads alone would keep the last of equal ones."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds {shown(twice)} twice")
    return values


def parse(data: bytes, where: str) -> Any:
    """JSON -> its values. Raises UserError, which begins with `where`."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} not JSON: line {e.lineno}, column {e.colno}: {e.msg}") from e
    except (ValueError, RecursionError) as error:  # not UTF-8; nested too deeply
        raise UserError(f"{where} not JSON: {error}") from error


def read_json(file: Path, kind: type = object) -> Any:
    """The values of a JSON file. Raises UserError if they are not of this kind: dict, list."""
    values = parse(open_file(file), f"{file}:")
    if not isinstance(values, kind):
        name = "object" if kind is dict else "list"
        raise UserError(f"{file}: must be a JSON {name}, is {shown(values)}")
    return values


def read_records(file: Path) -> list[Record]:
    """A JSON file that is a list of objects."""
    return [Record(file, number, value) for number, value in enumerate(read_json(file, list))]


def read_lines(file: Path) -> Iterator[Record]:
    """A JSONL file: an object a line, or nothing; lines are counted from 1."""
    check_regular(file)
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(f"{file}: line {number} is longer than {MAX_LINE} bytes")
                if line.strip():
                    place = f"{file}: line {number}"
                    yield Record(file, number, parse(line, f"{place} is"), place)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
