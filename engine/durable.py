"""Directories that are written completely or not at all, and checked before they are read.

A directory is written as a hidden sibling, flushed to disk, renamed, and read back; only then is
the one that it replaces deleted. A crash leaves at most two of these, which `recover` repairs:

    NAME         complete
    .NAME.part   being written or deleted
    .NAME.old    what NAME was, kept until the new one has been read back

checksums.json, written last, has the length and the SHA-256 of every other file.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from config import UserError, warn_once
from engine.processes import ALONE, Processes
from sources.records import read_json

CHECKSUMS = "checksums.json"


def act(operation: Callable, *args: Any) -> None:
    """Every disk operation of a save goes through here, so that tests can make it fail."""
    operation(*args)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    act(fsync, path)


def fsync(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":  # which opens none, and journals their entries
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes only those
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise") and not is_folder:
            # Drop it from the page cache, so that it is read back from the disk.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL or not is_folder:  # some file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def agree(processes: Processes, action: Callable, *args: Any) -> Any:
    """Run it in each process; if it fails in one, raise in all, so that none waits forever."""
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
    """Run it in the first process; the others wait, and raise if it fails."""
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
    """Delete the directory `name`, or what is left of it; a crash cannot leave half of it."""
    part = path.with_name(f".{name or path.name}.part")
    clear(part)
    act(os.rename, path, part)
    clear(part)


def digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size,
                "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}  # fmt: skip


def of_itself(files: dict) -> str:
    """checksums.json's own checksum."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def seal(directory: Path) -> None:
    """Write checksums.json for what is in the directory now."""
    files = {p.name: digest(p) for p in sorted(directory.iterdir()) if p.name != CHECKSUMS}
    text = json.dumps({"files": files, "sha256": of_itself(files)}, indent=1)
    act((directory / CHECKSUMS).write_text, text)


def verify(directory: Path, *names: str) -> None:
    """Raise UserError, naming the file, if one of these files (by default all) has changed.

    A directory without checksums.json, of an older version or made by hand, passes with a warning.
    """
    if not (directory / CHECKSUMS).exists():
        warn_once(f"{directory} has no {CHECKSUMS}: it cannot be checked")
        return
    listed = read_json(directory / CHECKSUMS, dict)
    files = listed.get("files")
    if not isinstance(files, dict) or listed.get("sha256") != of_itself(files):
        raise UserError(f"{directory / CHECKSUMS}: damaged or edited: it does not match itself")
    for name in names or files:
        file = directory / name
        if name not in files:
            raise UserError(f"{file}: {CHECKSUMS} does not list it")
        try:
            found = digest(file)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}, though {CHECKSUMS} lists it") from error
        if found != files[name]:
            raise UserError(f"{file}: damaged or edited: does not match {CHECKSUMS}")


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
    """Write a directory completely or not at all; the one that was there is deleted last.

    by_all    written in every process; names may differ, their number not
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
    if directory.exists():  # a rename cannot replace a directory that is not empty
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
    """Repair what a crash left of the files and directories whose names match."""
    for pattern in patterns:
        for old in folder.glob(f".{pattern}.old"):
            path = folder / old.name.removeprefix(".").removesuffix(".old")
            if path.exists() and is_sound(path):
                discard(old, path.name)
            else:  # the crash came before the new one was read back
                if path.exists():
                    discard(path)
                act(os.rename, old, path)
        for part in folder.glob(f".{pattern}.part"):
            clear(part)


def lock(file: IO) -> None:
    """Until the file is closed or the process ends. Raises OSError, if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # one byte
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raise UserError if another process has the lock; where there are no locks, warn."""
    with (folder / ".lock").open("a") as file:
        try:
            lock(file)
        except (BlockingIOError, PermissionError) as error:  # flock's, and Windows'
            raise UserError(f"{folder}: another run is writing here") from error
        except OSError as error:  # network file systems
            warn_once(f"{folder}: cannot be locked: {error.strerror}. Start no second run with "
                      "this --out: the two would overwrite each other's files")  # fmt: skip
        yield
