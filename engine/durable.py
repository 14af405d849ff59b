"""Directories that are written whole or not at all, and are read only if nothing in them changed.

A directory is made as a hidden sibling, forced onto the disk, renamed, and read back; only then
may what it replaces go. A crash leaves at most two of these, which `recover` mends:

    NAME         whole
    .NAME.part   being written, or on its way out: of no worth
    .NAME.old    what NAME was, kept until the new one has been read back

checksums.json, the last file to be written, has the length and the SHA-256 of every other.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import UserError
from engine.processes import ALONE, Processes
from records import warn_once
from tensorfiles import read_json

CHECKSUMS = "checksums.json"


def act(operation: Callable, *args: Any) -> None:
    """Whatever a save does to the disk passes through here, where tests make it fail."""
    operation(*args)


def sync(path: Path) -> None:
    """Force a file or a directory's entries onto the disk."""
    act(fsync, path)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise") and path.is_file():
            # Out of memory, so that what is read back comes from the disk.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL or path.is_file():  # some disks sync no folders
            raise
    finally:
        os.close(handle)


def agree(processes: Processes, action: Callable, *args: Any) -> Any:
    """Do it in each process; if it fails in one, raise in all, so that none waits for ever."""
    result = error = None
    try:
        result = action(*args)
    except Exception as caught:
        error = caught
    (failed,) = processes.sum(error is not None)
    if error is not None:
        raise error
    if failed:
        raise UserError("stopped, because another process failed; that one says why")
    return result


def in_first(processes: Processes, action: Callable, *args: Any) -> None:
    """Do it in the first process, while the others wait for how it went."""
    if processes.is_first:
        agree(processes, action, *args)
    else:
        agree(processes, lambda: None)


def beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def clear(path: Path) -> None:
    if path.is_dir():
        act(shutil.rmtree, path)
    elif path.exists():
        act(os.unlink, path)


def discard(path: Path, name: str | None = None) -> None:
    """Remove what is or was the directory `name`; a crash on the way leaves no half of it."""
    part = path.with_name(f".{name or path.name}.part")
    clear(part)
    act(os.rename, path, part)
    clear(part)


def digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}  # fmt: skip


def of_itself(files: dict) -> str:
    """What tells a damaged checksums.json from damage to a file that it lists."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def seal(directory: Path) -> None:
    """Write checksums.json for what is in the directory now."""
    files = {p.name: digest(p) for p in sorted(directory.iterdir()) if p.name != CHECKSUMS}
    text = json.dumps({"files": files, "sha256": of_itself(files)}, indent=1)
    act((directory / CHECKSUMS).write_text, text)


def verify(directory: Path, *names: str) -> None:
    """Raise UserError, naming the file, unless these files are as they were written; all, if none.

    A directory without checksums.json passes with a warning: an older one, or made by hand.
    """
    if not (directory / CHECKSUMS).exists():
        warn_once(f"{directory} has no {CHECKSUMS}: whether it is whole cannot be told")
        return
    listed = read_json(directory / CHECKSUMS)
    files = listed.get("files")
    if not isinstance(files, dict) or listed.get("sha256") != of_itself(files):
        raise UserError(f"{directory / CHECKSUMS}: damaged or edited: it does not match itself")
    for name in names or files:
        check(directory / name, files.get(name))


def check(file: Path, listed: dict | None) -> None:
    if listed is None:
        raise UserError(f"{file}: {CHECKSUMS} does not list it")
    try:
        found = digest(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, though {CHECKSUMS} lists it") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    if found != listed:
        sizes = f"{found['bytes']} bytes, then it had {listed['bytes']}"
        raise UserError(f"{file}: damaged or edited: does not match {CHECKSUMS} ({sizes})")


def is_sound(directory: Path) -> bool:
    try:
        verify(directory)
    except UserError:
        return False
    return True


Files = dict[str, Callable[[Path], Any]]  # name -> what writes it, given its path


def write_directory(
    directory: Path, by_all: Files, by_first: Files, processes: Processes = ALONE
) -> None:
    """Write a directory whole or not at all; what was there before goes last, or stays.

    by_all    written in every process, one after the other; names may differ, their number not
    by_first  written in the first process only
    """
    part = beside(directory, "part")
    in_first(processes, begin, directory)
    for name, write in by_all.items():
        agree(processes, act, write, part / name)
    for name, write in by_first.items():
        in_first(processes, act, write, part / name)
    in_first(processes, finish, directory)


def begin(directory: Path) -> None:
    recover(directory.parent, glob.escape(directory.name))
    act(os.makedirs, beside(directory, "part"))


def finish(directory: Path) -> None:
    part, old = beside(directory, "part"), beside(directory, "old")
    seal(part)
    for path in [*part.iterdir(), part]:
        sync(path)
    if directory.exists():  # a rename cannot replace a full directory: it steps aside
        act(os.rename, directory, old)
    act(os.rename, part, directory)
    sync(directory.parent)
    verify(directory)
    if old.exists():
        discard(old, directory.name)


def write_file(path: Path, text: str) -> None:
    """The same for one file of text."""
    part = beside(path, "part")
    act(part.write_text, text)
    sync(part)
    act(os.replace, part, path)
    sync(path.parent)


def recover(folder: Path, *patterns: str) -> None:
    """Mend what a crash left of the files and directories whose names match."""
    for pattern in patterns:
        for old in folder.glob(f".{pattern}.old"):
            path = folder / old.name.removeprefix(".").removesuffix(".old")
            if path.exists() and is_sound(path):
                discard(old, path.name)
            else:  # the crash came before the new one was there and read back
                if path.exists():
                    discard(path)
                act(os.rename, old, path)
        for part in folder.glob(f".{pattern}.part"):
            clear(part)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raise UserError if another process is in here. A lock ends as its process does."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another run is writing here") from error
        yield
