"""Images inside other files, named as if those were folders.

imgs.zip/a/b.jpg, train.parquet/17 (a row), scan.dcm/lung-middle (a window and a frame: dicom.py).
"""

import functools
import os
import zipfile
from pathlib import Path
from typing import Any

from config import UserError

MAX_MEMBER = 1_000_000_000  # bytes of one image, unpacked


@functools.lru_cache(maxsize=16)
def open_zip(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: not a zip that can be read: {error}") from error


def open_parquet(file: Path) -> Any:
    """A pyarrow ParquetFile. Raises UserError."""
    try:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(file)
    except ImportError as error:
        raise UserError(f"{file}: parquet files need pyarrow: pip install pyarrow") from error
    except Exception as error:  # pyarrow's own classes, OSError, ValueError
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: not a parquet file that can be read: {reason}") from error


def image_bytes(value: Any) -> bytes | None:
    """Of a cell of the column "image": bytes, or as Hugging Face writes it, {bytes, path}."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


@functools.lru_cache(maxsize=100)
def group_sizes(file: Path) -> list[int]:
    about = open_parquet(file).metadata
    return [about.row_group(group).num_rows for group in range(about.num_row_groups)]


@functools.lru_cache(maxsize=4)
def row_group(file: Path, group: int) -> list[Any]:
    """The images of one part of a parquet file: 100 on the hub."""
    table = open_parquet(file)
    name = next(n for n in table.schema_arrow.names if n.strip().lower() == "image")
    return table.read_row_group(group, columns=[name])[name].to_pylist()


def read_row(file: Path, row: int) -> bytes | None:
    for group, n_rows in enumerate(group_sizes(file)):
        if row < n_rows:
            return image_bytes(row_group(file, group)[row])
        row -= n_rows
    return None


def holder(path: Path) -> tuple[Path, str]:
    """The file that a path leads into, and what is named in it; "" if it leads into none."""
    for parent in path.parents:
        if os.path.isfile(parent):  # which raises nothing, however long the name is
            return parent, path.relative_to(parent).as_posix()
    return path, ""


@functools.cache
def is_dicom(file: Path) -> bool:
    """By its name, or by the letters after its preamble, which may look like a TIFF's header."""
    if not file.is_file() or file.suffix.lower() in (".dcm", ".dicom"):
        return file.is_file()
    try:
        with file.open("rb") as start:
            return start.read(132)[128:] == b"DICM"
    except OSError:
        return False


@functools.lru_cache(maxsize=16)
def names(file: Path) -> frozenset[str]:
    """The images in a zip. Raises UserError for another file."""
    return frozenset(open_zip(file).namelist())


def is_folder(path: Path) -> bool:
    """A folder on the disk, or one inside a zip, which may be the whole of it."""
    file, inner = holder(path)
    if not inner:
        return path.is_dir() or zipfile.is_zipfile(path)
    return zipfile.is_zipfile(file) and any(n.startswith(f"{inner}/") for n in names(file))


def is_there(path: Path) -> bool:
    """Whether there is such a file, or such an image in one."""
    file, inner = (path, "") if path.is_file() else holder(path)
    if not inner:
        return path.is_file()
    return not zipfile.is_zipfile(file) or inner in names(file)  # other files are read in rows


def read_inner(file: Path, inner: str) -> bytes:
    """The bytes of an image in a file. Raises UserError."""
    try:
        if is_dicom(file):
            return file.read_bytes()
        if not zipfile.is_zipfile(file):
            data = read_row(file, int(inner)) if inner.isdecimal() else None
        elif open_zip(file).getinfo(inner).file_size > MAX_MEMBER:
            raise ValueError(f"claims more than {MAX_MEMBER} bytes")
        else:
            data = open_zip(file).read(inner)
    except UserError:
        raise
    except Exception as error:  # absent, encrypted, packed in an unknown way, damaged
        raise UserError(f"{file}/{inner}: cannot be read: {error}") from error
    if data is None:
        raise UserError(f"{file}/{inner}: no image")
    return data
