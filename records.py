"""One kind of sample, and how records are read: every mistake names its file, record and field."""

import functools
import json
import math
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from config import UserError

MAX_FILE = 4_000_000_000  # bytes of one JSON file; LLaVA-Med's largest has 0.4e9
MAX_LINE = 1_000_000  # bytes of one JSON line


class Packed(NamedTuple):
    """A picture inside an npz file."""

    file: Path
    split: str
    index: int


Image = Path | Packed | int  # a file, a row of an npz, a phantom's seed


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, or none, and what is said about it."""

    id: str  # unique within a source and split
    source: str
    split: str
    image: Image | None  # None: text only
    turns: tuple[tuple[str, str], ...]  # (question, answer); a caption answers ""
    modality: str | None = None  # one of MODALITIES
    answer_type: str = ""  # "open", "closed"
    kind: str = ""  # of question, for reports
    options: tuple[str, ...] = ()  # classification: all answers there are, in the labels' order
    weight: float = 1.0  # times an epoch in training


class Record:
    """One entry of a JSON file. What is wrong with it is told with file, number and field."""

    def __init__(self, file: Path, number: int, values: Any, place: str | None = None):
        self.file, self.number, self.values = file, number, values
        self.place = place or f"{file}: record {number} (from 0)"
        if not isinstance(values, dict):
            raise UserError(f"{self.place} is not an object: {shown(values)}")

    def fail(self, name: str, allowed: str) -> NoReturn:
        value = shown(self.values[name]) if name in self.values else "is missing"
        raise UserError(f'{self.place}: field "{name}" {value}; must be {allowed}')

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "a text that is not empty")
        return self.whole(name, value)

    def text_or_number(self, name: str) -> str:
        """As text, perhaps empty. VQA-RAD counts in numbers, and a NaN is a table's empty cell."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.fail(name, "a text or a number")
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(name, "a text or a finite number")
        try:
            return self.whole(name, str(value))
        except ValueError:  # over 4 300 digits
            self.fail(name, "a text or a number of fewer digits")

    def whole(self, name: str, value: str) -> str:
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

    def image(self, name: str, folder: Path) -> Path:
        """A path inside the folder, links followed; whether the file is there is asked later."""
        try:
            path = (folder / self.text(name)).resolve()
            path.is_file()
        except (OSError, ValueError, RuntimeError):  # too long; a null byte; links in a circle
            self.fail(name, "a usable file name")
        if not path.is_relative_to(folder.resolve()):
            self.fail(name, f"inside {folder}")
        return path


def shown(value: Any) -> str:
    """The first 60 characters of its JSON, and no more is made: it may be endless."""
    text = ""
    try:
        for chunk in json.JSONEncoder().iterencode(value):
            text += chunk
            if len(text) > 60:
                break
        return text[:60]
    except (TypeError, ValueError, RecursionError):  # no JSON value, a list within itself
        return f"a {type(value).__name__}"


def one_line(text: str, most: int = 2000) -> str:
    """What a file says may neither break a line, nor steer the terminal, nor fill it."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text[: 2 * most].split()))
    return line if len(line) <= most else line[:most] + " ..."


@functools.cache
def warn_once(message: str) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)


def check_regular(file: Path) -> None:
    """Raise UserError for what is no file of a known size: a folder, a pipe, a device."""
    try:
        about = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{file}: is not a regular file")
    if about.st_size > MAX_FILE:
        raise UserError(f"{file}: {about.st_size} bytes; at most {MAX_FILE} are read")


def open_file(file: Path) -> bytes:
    """A whole file of at most MAX_FILE bytes."""
    check_regular(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ; JSON itself would let the last of equals win."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds {shown(twice)} twice")
    return values


def read_json_file(file: Path) -> Any:
    try:
        return json.loads(open_file(file).decode("utf-8-sig"), object_pairs_hook=once)
    except json.JSONDecodeError as e:
        raise UserError(f"{file}: not JSON: line {e.lineno}, column {e.colno}: {e.msg}") from e
    except (ValueError, RecursionError) as error:  # not UTF-8; nested too deeply
        raise UserError(f"{file}: not JSON: {error}") from error


def read_records(file: Path) -> list[Record]:
    """A JSON file that is a list of objects."""
    values = read_json_file(file)
    if not isinstance(values, list):
        raise UserError(f"{file}: must be a list of records, is {shown(values)}")
    return [Record(file, number, value) for number, value in enumerate(values)]


def read_lines(file: Path) -> Iterator[Record]:
    """A JSONL file: an object a line, empty lines apart; lines are counted from 1."""
    check_regular(file)
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise UserError(f"{file}: line {number} is longer than {MAX_LINE} bytes")
                if line.strip():
                    values = parse_line(file, number, line)
                    yield Record(file, number, values, f"{file}: line {number}")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def parse_line(file: Path, number: int, line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{file}: line {number} is not JSON: {reason}") from error
