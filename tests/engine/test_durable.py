"""A directory is written whole or not at all, at whatever disk operation it is stopped."""

import errno
import os
import shutil
import subprocess
import sys
from functools import partial
from unittest.mock import Mock

import pytest

from config import UserError, warn_once
from engine import durable
from engine.durable import CHECKSUMS, agree, in_first, locked, recover, verify, write_directory
from tests.engine.test_parallel import in_two

FILES = ("a.bin", "b.json")


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """os.fsync is slow, and here does nothing."""
    monkeypatch.setattr(os, "fsync", Mock())


def put(text, path):
    path.write_text(text * 100)


def save(folder, text, name="x"):
    by_all, by_first = ({name: partial(put, text)} for name in FILES)
    write_directory(folder / name, by_all, by_first)


def read(directory):
    """The letter that all its files were written with, if it is whole."""
    verify(directory)
    (letter,) = {c for name in FILES for c in (directory / name).read_text()}
    return letter


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


def operations(tmp_path, monkeypatch, before):
    folder = prepare(tmp_path, before)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", noted := Faulty())
        save(folder, "n")
    return noted.done


def check(folder, before):
    """The next start finds the old directory or the new one, mends the rest, and can save again."""
    recover(folder, "*")
    found = os.listdir(folder)
    letter = read(folder / "x") if found else None
    assert found in ([], ["x"]) and letter in (("o", "n") if before else (None, "n"))
    save(folder, "m")
    assert read(folder / "x") == "m" and os.listdir(folder) == ["x"]
    return letter


@pytest.mark.parametrize("before", [False, True])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, before):
    n, found = len(operations(tmp_path, monkeypatch, before)), []
    assert n >= 9 and os.fsync.called
    for k in range(n):
        folder = prepare(tmp_path, before)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(durable, "act", Faulty(k, torn))
            save(folder, "n")
        found.append(check(folder, before))
    n_old = found.count("o" if before else None)
    assert 0 < n_old < n and set(found[n_old:]) == {"n"}  # from some operation on it is the new


def test_the_old_one_goes_only_after_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    folder, rename = prepare(tmp_path, True), os.rename

    def spoil(operation, *args):
        operation(*args)
        if operation is rename and args[1].name == "x":
            (args[1] / "a.bin").write_text("n" * 99 + "?")  # the disk gives back something else

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"a.bin: damaged"):
        patch.setattr(durable, "act", spoil)
        save(folder, "n")
    assert check(folder, True) == "o"


@pytest.mark.parametrize(("left", "found"), [
    ({".x.old": "o", ".x.part": "n"}, {"x": "o"}), ({".x.old": "o", "x": "n"}, {"x": "n"}),
    ({".x.old": "o", "x": "damaged", ".x.part": "n"}, {"x": "o"}),
    ({".y.part": "n", ".y.old": "o", "x": "n"}, {".y.part": "n", ".y.old": "o", "x": "n"}),
])  # fmt: skip
def test_a_start_mends_what_a_crash_left_and_nothing_else(tmp_path, left, found):
    (folder := tmp_path / "out").mkdir()
    for name, text in left.items():
        save(folder, text[0], "made")
        if text == "damaged":
            (folder / "made" / "b.json").write_text("n" * 100)
        (folder / "made").rename(folder / name)
    recover(folder, "x*")
    (folder / ".x[1].part").mkdir()
    save(folder, "n", "x[1]")  # clears its own remains
    assert {path.name: read(path) for path in folder.iterdir()} == found | {"x[1]": "n"}


def test_a_file_is_the_old_or_the_new_at_any_crash(tmp_path, monkeypatch):
    file, found = tmp_path / "log", []
    for k in range(4):
        durable.write_file(file, "old")
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(durable, "act", Faulty(k, torn))
            durable.write_file(file, "new")
        recover(tmp_path, "log")
        found.append(file.read_text())
    assert found == ["old", "old", "old", "new"] and os.listdir(tmp_path) == ["log"]


def test_what_is_damaged_missing_or_not_listed_is_refused_by_name(tmp_path, capsys):
    for name, text, message in [
        ("a.bin", "o", r"a\.bin: damaged"), ("b.json", "o" * 99 + "n", r"b\.json: damaged"),
        (CHECKSUMS, "{", r"checksums\.json: not JSON"),
        (CHECKSUMS, '{"files": {}, "sha256": "0"}', r"checksums\.json: damaged")]:  # fmt: skip
        save(tmp_path, "o")
        (tmp_path / "x" / name).write_text(text)
        with pytest.raises(UserError, match=message):
            verify(tmp_path / "x")
    save(tmp_path, "o")
    (tmp_path / "x" / "a.bin").rename(tmp_path / "x" / "new")
    verify(tmp_path / "x", "b.json")
    for name, message in [("a.bin", "a.bin: No such file"), ("new", "new: .* does not list it")]:
        with pytest.raises(UserError, match=message):
            verify(tmp_path / "x", name)
    for _ in range(2):  # sealed again, it does not list itself
        durable.seal(tmp_path / "x")
    verify(tmp_path / "x")
    warn_once.cache_clear()
    (tmp_path / "x" / CHECKSUMS).unlink()
    verify(tmp_path / "x")
    assert "has no checksums.json" in capsys.readouterr().err


def test_processes_write_one_directory_and_an_error_in_one_is_an_error_in_all(tmp_path):
    def work(processes):
        def fail(rank, path):
            if processes.rank == rank:
                raise OSError("full")

        rank, done = processes.rank, []
        in_first(processes, done.append, rank)
        done.append(agree(processes, lambda: rank))
        by_all, by_first = {f"own{rank}": partial(put, "n")}, {"b.json": partial(put, "n")}
        write_directory(tmp_path / "x", by_all, by_first, processes)
        for failing in ({"bad": partial(fail, 1)}, {}), ({}, {"bad": partial(fail, 0)}):
            try:
                write_directory(tmp_path / "x", *failing, processes)
            except (OSError, UserError) as error:
                done.append(type(error).__name__)
        return done

    expected = [[0, 0, "UserError", "OSError"], [1, "OSError", "UserError"]]
    assert in_two(tmp_path, work) == expected
    assert sorted(os.listdir(tmp_path / "x")) == ["b.json", CHECKSUMS, "own0", "own1"]
    verify(tmp_path / "x")


@pytest.mark.parametrize(("module", "name", "code", "message"), [
    ("fcntl", "flock", 0, None), ("msvcrt", "locking", 0, None),  # the second one is Windows'
    ("fcntl", "flock", errno.EAGAIN, "another run"), ("msvcrt", "locking", errno.EACCES, "another"),
    ("fcntl", "flock", errno.ENOLCK, None), ("fcntl", "flock", errno.EOPNOTSUPP, None),
])  # fmt: skip
def test_a_second_run_is_refused_or_warned_of(tmp_path, monkeypatch, module, name, code, message):
    fake, error = Mock(LOCK_EX=2, LOCK_NB=4), code and OSError(code, "no locks")
    getattr(fake, name).side_effect = error or None
    for other in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, other, fake if other == module else None)
    monkeypatch.setattr(durable, "warn_once", warned := Mock())
    with pytest.raises(UserError if message else Crash, match=message), locked(tmp_path):
        raise Crash
    assert getattr(fake, name).called and warned.called == (code > 0 and not message)


def test_windows_imports_all_and_syncs_no_folder_and_files_it_may_write(tmp_path, monkeypatch):
    def windows_open(path, flags):
        assert path.is_file() and flags & os.O_RDWR
        return posix_open(path, flags)

    posix_open = os.open
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", windows_open)
    save(tmp_path, "n")
    assert read(tmp_path / "x") == "n" and os.fsync.call_count == 3
    lacking = "import signal, sys; sys.modules['fcntl'] = None; del signal.SIGHUP"
    subprocess.run([sys.executable, "-c", f"{lacking}; import train, eval, chat"], check=True)
