"""Questions in a table, one a row: CSV, JSONL, JSON or parquet.

Columns image, question, answer; optional modality, split, answer_type, id. Parquet may hold the
images themselves, as on the Hugging Face hub: bytes, or {bytes, path}.
"""

import csv
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import MODALITIES, UserError, warn_once
from data import Sample
from sources.packed import image_bytes, open_parquet
from sources.records import Record, distinct, open_file, read_lines, read_records

NEEDED = ("image", "question", "answer")
COLUMNS = (*NEEDED, "modality", "split", "answer_type", "id")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val",
          "validation": "val", "dev": "val", "test": "test"}  # fmt: skip
# DICOM's codes (PS3.3 C.7.3.1.1.1) and what people write, in lower case -> our modalities.
CODES = {m.lower(): m for m in MODALITIES} | {
    "mr": "MRI", "cr": "X-ray", "dx": "X-ray", "rf": "X-ray", "xa": "X-ray", "mg": "X-ray",
    "xray": "X-ray", "sm": "pathology", "histology": "pathology"}  # fmt: skip

# How a caption begins.
TITLES = {"CT": "a CT", "MRI": "an MRI", "X-ray": "an X-ray", "pathology": "a pathology picture",
          None: "an image"}  # fmt: skip


def check_columns(file: Path, names: list[str]) -> None:
    lacking = [name for name in NEEDED if name not in names]
    if lacking or len(set(names)) < len(names):
        fault = f"lacks the column {lacking[0]}" if lacking else "has two columns of the same name"
        raise UserError(f"{file}: {fault}; its columns: {', '.join(names)[:200]}")


def read_csv(file: Path) -> Iterator[Record]:
    """UTF-8, with or without a byte order mark; commas, semicolons, tabs or bars between."""
    data = open_file(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}: line {line} is not UTF-8; save it as UTF-8, or "
                        "iconv -f latin1 -t utf-8") from error  # fmt: skip
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True,
                      delimiter=max(",;\t|", key=header.count))  # fmt: skip
    try:
        names = [name.strip().lower() for name in next(rows, [])]
        check_columns(file, names)
        for number, cells in enumerate(rows):
            place = f"{file}: line {rows.line_num}"
            if cells and len(cells) != len(names):
                raise UserError(f"{place}: {len(cells)} cells under {len(names)} columns: a text "
                                "with a separator in it must be quoted")  # fmt: skip
            if cells:
                values = {n: c for n, c in zip(names, cells, strict=True) if c.strip()}
                yield Record(file, number, {"answer": ""} | values, place)
    except csv.Error as error:
        raise UserError(f"{file}: line {rows.line_num}: {error}") from error


@functools.lru_cache(maxsize=32)
def parquet_rows(file: Path, *version: int) -> list[dict[str, Any]]:
    """Rows whose image is the path of the first row with the same bytes (packed.py), or a name.

    Cached: every phase comes back. version: the file's size and time.
    """
    table = open_parquet(file)
    names = table.schema_arrow.names
    ours = {name: name.strip().lower() for name in names}
    check_columns(file, [ours[name] for name in names])
    first: dict[bytes, int] = {}
    rows = []
    try:
        for batch in table.iter_batches(64, columns=[n for n in names if ours[n] in COLUMNS]):
            for row in batch.to_pylist():
                values = {ours[name]: value for name, value in row.items()}
                if (data := image_bytes(values["image"])) is not None:
                    key = hashlib.sha256(data).digest()
                    values["image"] = file / str(first.setdefault(key, len(rows)))
                rows.append({k: v for k, v in values.items() if v is not None or k == "answer"})
    except (OSError, ValueError) as error:  # pyarrow's classes are subclasses of these
        raise UserError(f"{file}: damaged: {str(error).partition(chr(10))[0]}") from error
    return rows


def read_parquet(file: Path) -> Iterator[Record]:
    about = file.stat()
    for number, values in enumerate(parquet_rows(file, about.st_size, about.st_mtime_ns)):
        yield Record(file, number, dict(values), f"{file}: row {number} (from 0)")


READERS = {".csv": read_csv, ".tsv": read_csv, ".jsonl": read_lines, ".json": read_records,
           ".parquet": read_parquet}  # fmt: skip


def read_rows(file: Path) -> Iterator[Record]:
    """The rows of a table, by the ending of its name. Raises UserError."""
    if not file.is_file() or file.suffix.lower() not in READERS:
        reason = "not one of " + ", ".join(READERS) if file.is_file() else "no such file"
        raise UserError(f"{file}: {reason}")
    for record in READERS[file.suffix.lower()](file):
        values = {name.strip().lower(): value for name, value in record.values.items()}
        if len(values) < len(record.values):
            raise UserError(f"{record.place}: has two fields of the same name")
        record.values = values
        yield record


def row_image(record: Record, folder: Path, follow_links: bool) -> Path:
    """A file below the folder, or an image inside this parquet file."""
    if isinstance(value := record.values.get("image"), Path):
        return value
    if isinstance(value, str):
        record.values["image"] = value.replace("\\", "/")  # as Windows writes them
    return record.image("image", folder, follow_links)


def row_sample(
    record: Record, name: str, source: str, split: str, image: Path, modality: str | None = None,
    kind: str = "question",
) -> Sample:  # fmt: skip
    """One question. Where the table has no answer type, yes and no are closed, the rest open."""
    question = record.text("question")
    is_null = record.values.get("answer", "") is None  # an empty answer; a missing field is refused
    answer = "" if is_null else record.text_or_number("answer")
    if record.values.get("answer_type"):
        answer_type = record.choice("answer_type", ("open", "closed"))
    else:
        answer_type = "closed" if answer.lower() in ("yes", "no") else "open"
        warn_once(f"{record.file.parent}: no answer_type: yes and no are closed, the rest is open")
    if record.values.get("modality"):
        modality = CODES.get(record.text("modality").lower()) or record.fail(
            "modality", f"one of {', '.join(MODALITIES)}, or empty"
        )
    return Sample(name, source, split, image, ((question, answer),), modality, answer_type, kind)


def tenth(names: set[str]) -> set[str]:
    """A tenth of the images, always the same ones; at least one."""

    def number(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    return {n for n in names if number(n) % 10 == 0} or set(sorted(names, key=number)[:1])


def read_table(
    file: Path, split: str, source: str, image_folder: str | None, follow_links: bool
) -> Iterator[tuple[Sample, str]]:
    """--data table:FILE -> the samples of a split, and how captions of their images begin.

    Images are named from the table's folder, or from image_folder. Without a column "split" a
    tenth of the images is the test split, and there is no val split.
    """
    folder = Path(image_folder) if image_folder else file.parent
    rows = [(record, row_image(record, folder, follow_links)) for record in read_rows(file)]
    names = {image: f"{file.name}/{image.name}" if image.parent == file  # within this parquet file
             else Path(os.path.relpath(image, folder.resolve())).as_posix()
             for _, image in rows}  # fmt: skip
    if any(record.values.get("split") for record, _ in rows):
        splits = [SPLITS[record.choice("split", SPLITS)] for record, _ in rows]
        pairs = {(image, s) for (_, image), s in zip(rows, splits, strict=True)}
        if n := len(pairs) - len(names):
            warn_once(f"{file}: {n} of {len(names)} images are in more than one split")
    else:
        held_out = tenth(set(names.values()))
        splits = ["test" if names[image] in held_out else "train" for _, image in rows]
        warn_once(f"{file}: no column split: {len(held_out)} of {len(names)} images, by a hash of "
                  "their names, are the test split")  # fmt: skip
    seen: dict[str, int] = {}
    has_ids = [record.values.get("id") not in (None, "") for record, _ in rows]
    row = "row " if any(has_ids) else ""  # a number alone may be another row's id
    for (record, image), its_split, has_id in zip(rows, splits, has_ids, strict=True):
        if its_split == split:
            name = distinct(seen, record, "id") if has_id else f"{row}{record.number}"
            sample = row_sample(record, name, source, split, image)
            yield sample, f"{TITLES[sample.modality]}."
