"""A directory is written whole or not at all, whatever stops it.

Every disk operation of a save goes through durable.act; here one fails, or is the last that is
done. tests/slow/test_faults.py has more kinds of faults.
"""

import errno
import json
import os
import shutil
import signal
from functools import partial

import pytest

from config import UserError, warn_once
from engine import durable
from engine.durable import CHECKSUMS, agree, in_first, locked, recover, verify, write_directory
from tests.engine.test_parallel import in_two

FILES = ("a.bin", "b.json")


@pytest.fixture(autouse=True)
def synced():
    """What os.fsync was called with, (handle, inode); it is slow, and here does nothing."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: found.append((handle, os.stat(handle).st_ino)))
        yield found


def put(text, path):
    path.write_text(text * 100)


def save(folder, text, name="x"):
    files = {name: partial(put, text) for name in FILES}
    write_directory(folder / name, {"a.bin": files["a.bin"]}, {"b.json": files["b.json"]})


def read(directory):
    """The letter that all its files were written with, if it is whole."""
    verify(directory)
    (letter,) = {c for name in FILES for c in (directory / name).read_text()}
    return letter


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def prepare(tmp_path, before):
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if before:
        save(folder, "o")
    return folder


class Crash(BaseException):
    """Nothing in the project catches it."""


class Faulty:
    """Stands for durable.act: notes the operations, and before the k-th does something else."""

    def __init__(self, at=-1, fault=None):
        self.at, self.fault, self.done = at, fault, []

    def __call__(self, operation, *args):
        self.done.append((operation, args))
        if len(self.done) - 1 == self.at:
            self.fault(operation, *args)
        operation(*args)


def written(operation, args):
    """The file that an operation writes, or None."""
    if operation in (os.rename, os.replace, os.makedirs, os.unlink, shutil.rmtree, durable.fsync):
        return None
    return getattr(operation, "__self__", args[-1])  # file.write_text(text), or write(file)


def torn(operation, *args):
    """Half of a file is written, half of a tree removed; then it crashes."""
    if operation is shutil.rmtree:
        for path in sorted(args[0].iterdir())[::2]:
            path.unlink()
    elif path := written(operation, args):
        operation(*args)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    raise Crash


def full(operation, *args):
    raise OSError(errno.ENOSPC, "No space left on device")


def operations(tmp_path, monkeypatch, before):
    folder = prepare(tmp_path, before)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", noted := Faulty())
        save(folder, "n")
    return noted.done


def check(folder, before):
    """The next start finds the old directory or the new one, mends the rest, and can save again."""
    recover(folder, "*")
    assert names(folder) == ["x"] or (not before and names(folder) == [])
    letter = read(folder / "x") if names(folder) else None
    assert letter in (("o", "n") if before else (None, "n"))
    save(folder, "m")
    assert read(folder / "x") == "m" and names(folder) == ["x"]
    return letter


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fault", [torn, full])
def test_a_fault_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, before, fault):
    n, found = len(operations(tmp_path, monkeypatch, before)), []
    assert n >= 9
    for k in range(n):
        folder = prepare(tmp_path, before)
        with monkeypatch.context() as patch, pytest.raises((Crash, OSError)):
            patch.setattr(durable, "act", Faulty(k, fault))
            save(folder, "n")
        found.append(check(folder, before))
    n_old = found.count("o" if before else None)
    assert 0 < n_old < n and set(found[n_old:]) == {"n"}  # from some operation on it is the new


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    done = operations(tmp_path, monkeypatch, True)
    done = [(op, args[-1].name if isinstance(args[-1], os.PathLike) else "") for op, args in done]
    place = done.index((os.rename, "x"))
    synced = {name for op, name in done[:place] if op is durable.fsync}
    assert synced == {*FILES, CHECKSUMS, ".x.part"}
    assert done[place + 1] == (durable.fsync, "out") and done[-1] == (shutil.rmtree, ".x.part")


def test_the_old_one_goes_only_after_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    folder, rename = prepare(tmp_path, True), os.rename

    def spoil(operation, *args):
        operation(*args)
        if operation is rename and args[1].name == "x":
            (args[1] / "a.bin").write_text("n" * 99 + "?")  # the disk gives back something else

    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", spoil)
        with pytest.raises(UserError, match=r"a.bin: damaged"):
            save(folder, "n")
    assert check(folder, True) == "o"


@pytest.mark.parametrize(("left", "found"), [
    ({".x.part": "n"}, {}),
    ({".x.old": "o"}, {"x": "o"}),
    ({".x.old": "o", ".x.part": "n"}, {"x": "o"}),
    ({".x.old": "o", "x": "n"}, {"x": "n"}),
    ({".x.old": "o", "x": "damaged", ".x.part": "n"}, {"x": "o"}),
    ({".mine.part": "n", ".bashrc.old": "o", "x": "n"}, {".mine.part": "n", ".bashrc.old": "o",
                                                         "x": "n"}),
])  # fmt: skip
def test_a_start_mends_what_a_crash_left_and_nothing_else(tmp_path, left, found):
    (folder := tmp_path / "out").mkdir()
    for name, text in left.items():
        save(tmp_path, text[0], "made")
        if text == "damaged":
            (tmp_path / "made" / "b.json").write_text("n" * 100)
        (tmp_path / "made").rename(folder / name)
    recover(folder, "x*")
    assert {path.name: read(path) for path in folder.iterdir()} == found
    (folder / ".x[1].part").mkdir()
    save(folder, "n", "x[1]")  # clears its own remains
    assert {path.name: read(path) for path in folder.iterdir()} == found | {"x[1]": "n"}


def test_a_file_is_the_old_or_the_new_at_any_crash(tmp_path, monkeypatch):
    file, found = tmp_path / "log", []
    for k in range(4):
        durable.write_file(file, "old")
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(durable, "act", noted := Faulty(k, torn))
            durable.write_file(file, "new")
        recover(tmp_path, "log")
        found.append(file.read_text())
        assert names(tmp_path) == ["log"]
    assert found == ["old", "old", "old", "new"]
    assert [op for op, _ in noted.done[1:]] == [durable.fsync, os.replace, durable.fsync]


def test_sync_flushes_files_and_folders_where_these_can_be(tmp_path, synced, monkeypatch):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    put("o", tmp_path / "file")
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: dropped.append(args), raising=False)
    for path in (tmp_path / "file", tmp_path):
        durable.sync(path)
        handle, inode = synced.pop()
        assert inode == path.stat().st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)  # closed
    # The file is read back from the disk, not from memory.
    assert [args[1:] for args in dropped] == [(0, 0, os.POSIX_FADV_DONTNEED)]
    monkeypatch.setattr(os, "fsync", refuse)
    for number, path in ((errno.EINVAL, tmp_path / "file"), (errno.EIO, tmp_path)):
        with pytest.raises(OSError, match=os.strerror(number)):
            durable.sync(path)
    number = errno.EINVAL
    durable.sync(tmp_path)


def edit_checksums(directory):
    listed = json.loads((directory / CHECKSUMS).read_text())
    listed["files"]["a.bin"]["sha256"] = "0" * 64
    (directory / CHECKSUMS).write_text(json.dumps(listed))


@pytest.mark.parametrize(("harm", "message"), [
    (lambda d: (d / "a.bin").unlink(), r"a\.bin: No such file"),
    (lambda d: (d / "a.bin").write_text("o"), r"a\.bin: damaged"),
    (lambda d: (d / "b.json").write_text("o" * 99 + "n"), r"b\.json: damaged"),
    (lambda d: (d / CHECKSUMS).write_text("{"), r"checksums\.json: not JSON"),
    (lambda d: (d / CHECKSUMS).write_text("{}"), r"checksums\.json: damaged"),
    (edit_checksums, r"checksums\.json: damaged"),  # not a.bin
])  # fmt: skip
def test_what_changed_is_refused_by_name(tmp_path, harm, message):
    save(tmp_path, "o")
    harm(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "x")


def test_one_file_can_be_verified_alone_and_without_checksums_none(tmp_path, capsys):
    warn_once.cache_clear()
    save(tmp_path, "o")
    (tmp_path / "x" / "later").write_text("o")
    with pytest.raises(UserError, match=r"later: .* does not list it"):
        verify(tmp_path / "x", "later")
    for _ in range(2):  # sealed again, it does not list itself
        durable.seal(tmp_path / "x")
    verify(tmp_path / "x")
    (tmp_path / "x" / "a.bin").write_text("harm")
    verify(tmp_path / "x", "b.json", "later")
    (tmp_path / "x" / CHECKSUMS).unlink()
    for _ in range(2):
        verify(tmp_path / "x")
    assert capsys.readouterr().err.count("has no checksums.json") == 1


def outcome(action, *args):
    """What it returns, or the name of its error."""
    try:
        return action(*args)
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_is_an_error_in_all(tmp_path, rank):
    def write(processes, path):
        if processes.rank == rank:
            raise OSError("full")
        if processes.is_first:
            put("n", path)

    def work(processes):
        by_all = {"a.bin": partial(write, processes), f"own{processes.rank}": partial(put, "n")}
        by_first = {"b.json": partial(put, "n")}
        return [outcome(agree, processes, write, processes, tmp_path / "file"),
                outcome(write_directory, tmp_path / "x", by_all, by_first, processes)]  # fmt: skip

    save(tmp_path, "o")
    expected = [["OSError" if r == rank else "UserError"] * 2 for r in (0, 1)]
    assert in_two(tmp_path, work) == expected and read(tmp_path / "x") == "o"


def test_all_processes_write_one_directory_and_the_first_alone_what_all_share(tmp_path):
    def work(processes):
        done, rank = [], processes.rank
        in_first(processes, done.append, rank)
        by_all, by_first = {f"own{rank}": partial(put, "n")}, {"b.json": partial(put, "n")}
        write_directory(tmp_path / "x", by_all, by_first, processes)
        failed = outcome(in_first, processes, lambda: 1 / 0)
        return agree(processes, lambda: rank), done, failed

    assert in_two(tmp_path, work) == [(0, [0], "ZeroDivisionError"), (1, [], "UserError")]
    assert names(tmp_path / "x") == ["b.json", CHECKSUMS, "own0", "own1"]
    verify(tmp_path / "x", "b.json", "own0", "own1")


def test_a_folder_is_locked_until_the_run_in_it_ends_or_is_killed(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another run"), locked(tmp_path):
        pass
    if (child := os.fork()) == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass
