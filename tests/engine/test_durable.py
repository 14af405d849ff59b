"""A directory is written whole or not at all, whatever stops it.

Every operation on the disk goes through durable.act; here each in turn fails, or is the last.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from functools import partial

import pytest

from config import UserError
from engine import durable
from engine.durable import (
    CHECKSUMS,
    agree,
    in_first,
    locked,
    recover,
    seal,
    verify,
    write_directory,
    write_file,
)
from engine.processes import Processes
from engine.run import claim

FILES = ("a.bin", "b.json")


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """The inodes that os.fsync was called with; it is slow, and here Disk stands for the disk."""
    found = []
    monkeypatch.setattr(os, "fsync", lambda handle: found.append(os.fstat(handle).st_ino))
    return found


def put(text, path):
    path.write_text(text * 100)


def save(folder, text):
    files = {name: partial(put, text) for name in FILES}
    write_directory(folder / "x", {"a.bin": files["a.bin"]}, {"b.json": files["b.json"]})


def read(directory):
    """What the directory holds, if it is whole: the letter that all its files were written with."""
    verify(directory)
    (letter,) = {c for name in FILES for c in (directory / name).read_text()}
    return letter


class Crash(BaseException):
    pass


class Faulty:
    """Stands for durable.act: counts the operations, and at the k-th does something else."""

    def __init__(self, at, fault):
        self.at, self.fault, self.done = at, fault, []

    def __call__(self, operation, *args):
        self.done.append((operation, args))
        if len(self.done) - 1 == self.at:
            self.fault(operation, *args)
        operation(*args)


def crash(operation, *args):
    raise Crash


def written(operation, args):
    """The file that an operation writes, or None."""
    if operation in (os.rename, os.replace, os.makedirs, os.unlink, shutil.rmtree, durable.fsync):
        return None
    return getattr(operation, "__self__", args[-1])  # file.write_text(text), or write(file)


def torn(operation, *args):
    """Half of a file is written, half of a tree removed."""
    if operation is shutil.rmtree:
        for path in sorted(args[0].iterdir())[::2]:
            path.unlink()
    elif path := written(operation, args):
        operation(*args)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    raise Crash


def kill(operation, *args):
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(tmp_path, before, name="o"):
    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if before:
        save(folder, "o")
    return folder


def n_operations(tmp_path, monkeypatch, before):
    folder = prepare(tmp_path, before)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", counted := Faulty(-1, crash))
        save(folder, "n")
    return len(counted.done)


def check(folder, before):
    """The next start finds the old directory or the new one, mends the rest, and can save again."""
    recover(folder, "*")
    there = [p.name for p in folder.iterdir()]
    assert there == ["x"] or (not before and there == [])
    letter = read(folder / "x") if there else None
    assert letter in ("o", "n") if before else letter in (None, "n")
    save(folder, "m")
    assert read(folder / "x") == "m" and [p.name for p in folder.iterdir()] == ["x"]
    return letter


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("fault", [crash, torn])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, before, fault):
    n, found = n_operations(tmp_path, monkeypatch, before), []
    assert n >= (13 if before else 9)
    for k in range(n):
        folder = prepare(tmp_path, before)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(durable, "act", Faulty(k, fault))
            save(folder, "n")
        found.append(check(folder, before))
    old = "o" if before else None
    assert found == sorted(found, key=lambda x: x == "n")  # from some operation on it is the new
    assert found[0] == old and found[-1] == "n"


def test_a_crash_while_a_crash_is_mended_costs_nothing_either(tmp_path, monkeypatch):
    for k in range(n_operations(tmp_path, monkeypatch, True)):
        for again in range(4):
            folder = prepare(tmp_path, True)
            with monkeypatch.context() as patch, pytest.raises(Crash):
                patch.setattr(durable, "act", Faulty(k, crash))
                save(folder, "n")
            with monkeypatch.context() as patch:
                patch.setattr(durable, "act", Faulty(again, torn))
                with contextlib.suppress(Crash):
                    recover(folder, "*")
            check(folder, True)


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, before):
    for k in range(n_operations(tmp_path, monkeypatch, before)):
        folder = prepare(tmp_path, before)
        child = os.fork()
        if child == 0:
            durable.act = Faulty(k, kill)
            save(folder, "n")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        check(folder, before)


class Disk(Faulty):
    """Knows what has reached the disk: contents of files, entries of folders."""

    def __init__(self, at, folder, copy):
        super().__init__(at, crash)
        self.folder, self.copy, self.loose = folder, copy, set()
        self.synced()

    def synced(self):
        """The names in the folder are on the disk as they are now."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folder, self.copy)

    def __call__(self, operation, *args):
        super().__call__(operation, *args)
        if file := written(operation, args):
            self.loose |= {file.stat().st_ino, file.parent.stat().st_ino}
        elif operation is durable.fsync:
            self.loose.discard(args[0].stat().st_ino)
            if args[0] == self.folder:
                self.synced()

    def cut(self, names_are_lost):
        for path in [*self.folder.glob("*"), *self.folder.glob("*/*")]:
            if path.exists() and path.stat().st_ino in self.loose:
                if path.is_dir():
                    shutil.rmtree(path)
                    path.mkdir()
                else:
                    path.write_bytes(b"\0" * 7)
        if names_are_lost:
            shutil.rmtree(self.folder)
            shutil.copytree(self.copy, self.folder)


@pytest.mark.parametrize("before", [False, True])
def test_a_power_cut_takes_only_what_was_not_synced(tmp_path, monkeypatch, before):
    for k in range(n_operations(tmp_path, monkeypatch, before) + 1):
        for names_are_lost in (False, True):
            folder = prepare(tmp_path, before)
            disk = Disk(k, folder, tmp_path / "copy")
            with monkeypatch.context() as patch:
                patch.setattr(durable, "act", disk)
                try:
                    save(folder, "n")
                    is_over = True
                except Crash:
                    is_over = False
            disk.cut(names_are_lost)
            letter = check(folder, before)
            assert letter == "n" or not is_over  # once save has returned, it is on the disk


def test_sync_syncs_files_and_folders(tmp_path, synced):
    put("o", tmp_path / "file")
    for path in (tmp_path / "file", tmp_path):
        durable.sync(path)
        assert synced.pop() == path.stat().st_ino


def test_a_disk_that_syncs_no_folders_will_do(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    put("o", tmp_path / "file")
    monkeypatch.setattr(os, "fsync", refuse)
    number = errno.EINVAL
    durable.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        durable.sync(tmp_path / "file")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        durable.sync(tmp_path)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_error_at_any_operation_is_raised_and_leaves_the_old_or_the_new(
    tmp_path, monkeypatch, before, number
):
    def fail(operation, *args):
        raise OSError(number, os.strerror(number))

    for k in range(n_operations(tmp_path, monkeypatch, before)):
        folder = prepare(tmp_path, before)
        with monkeypatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(durable, "act", Faulty(k, fail))
            save(folder, "n")
        assert error.value.errno == number
        check(folder, before)


def test_the_old_one_goes_only_after_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    folder = prepare(tmp_path, True)
    rename = os.rename

    def spoil(operation, *args):
        operation(*args)
        if operation is rename and args[1].name == "x":
            (args[1] / "a.bin").write_text("n" * 99 + "?")  # the disk gives back something else

    with monkeypatch.context() as patch:
        patch.setattr(durable, "act", spoil)
        with pytest.raises(UserError, match=r"a.bin: damaged"):
            save(folder, "n")
    assert check(folder, True) == "o"


def test_a_crash_while_a_damaged_one_is_rolled_back_does_not_hide_the_damage(tmp_path, monkeypatch):
    for k in range(4):
        folder = prepare(tmp_path, True)
        shutil.copytree(folder / "x", folder / ".x.old")
        (folder / "x" / "b.json").write_text("n" * 100)
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(durable, "act", Faulty(k, torn))
            recover(folder, "x")
        assert check(folder, True) == "o"


def test_a_file_is_the_old_or_the_new_at_any_crash(tmp_path, monkeypatch):
    file = tmp_path / "log"
    for fault in (crash, torn):
        for k in range(4):
            write_file(file, "old")
            with monkeypatch.context() as patch, pytest.raises(Crash):
                patch.setattr(durable, "act", Faulty(k, fault))
                write_file(file, "new")
            recover(tmp_path, "log")
            assert file.read_text() == ("old" if k < 3 else "new")
            assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_only_what_is_named_is_mended(tmp_path):
    for name in (".phase1.part", ".mine.part", ".bashrc.old", ".phase2-step0000003.old"):
        (tmp_path / name).mkdir()
    recover(tmp_path, "phase[123]*")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".bashrc.old", ".mine.part", "phase2-step0000003"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda d: (d / "a.bin").unlink(),
            r"a\.bin: No such file or directory, though checksums.json lists it",
        ),
        (
            lambda d: (d / "a.bin").write_text("o"),
            r"a\.bin: damaged or edited: does not match checksums.json",
        ),
        (lambda d: (d / "b.json").write_text("o" * 99 + "n"), r"b\.json: damaged or edited"),
        (lambda d: (d / CHECKSUMS).write_text("{"), r"checksums\.json: not JSON"),
        (lambda d: (d / CHECKSUMS).write_text("{}"), r"checksums\.json: damaged or edited"),
    ],
)
def test_what_changed_is_refused_by_name(tmp_path, harm, message):
    save(tmp_path, "o")
    harm(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "x")


def test_a_list_that_was_changed_itself_accuses_no_other_file(tmp_path):
    save(tmp_path, "o")
    file = tmp_path / "x" / CHECKSUMS
    listed = json.loads(file.read_text())
    listed["files"]["a.bin"]["sha256"] = "0" * 64
    file.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"checksums\.json: damaged or edited"):
        verify(tmp_path / "x")


def test_one_file_is_asked_for_by_name_and_must_be_listed(tmp_path):
    save(tmp_path, "o")
    (tmp_path / "x" / "a.bin").write_text("harm")
    verify(tmp_path / "x", "b.json")
    (tmp_path / "x" / "later").write_text("")
    with pytest.raises(UserError, match=r"later: .* does not list it"):
        verify(tmp_path / "x", "later")


def test_without_a_list_there_is_a_warning_once(tmp_path, capsys):
    save(tmp_path, "o")
    (tmp_path / "x" / CHECKSUMS).unlink()
    for _ in range(2):
        verify(tmp_path / "x")
    assert capsys.readouterr().err.count("has no checksums.json") == 1
    seal(tmp_path / "x")
    (tmp_path / "x" / "a.bin").write_text("harm")
    with pytest.raises(UserError, match=r"a\.bin"):
        verify(tmp_path / "x")


class Threads(Processes):
    """Processes that are threads of this one; a sum that not all come to fails after 5 s."""

    def __init__(self, rank, values, barrier):
        super().__init__(rank, len(values))
        self.values, self.barrier = values, barrier

    def sum(self, *values):
        self.values[self.rank] = values
        self.barrier.wait(5)
        total = [float(sum(v)) for v in zip(*self.values, strict=True)]
        self.barrier.wait(5)
        return total


def in_threads(work, world=2):
    """work(processes) in each -> its result or its error, by rank."""
    values, barrier, found = [()] * world, threading.Barrier(world), [None] * world

    def one(rank):
        try:
            found[rank] = work(Threads(rank, values, barrier))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_is_an_error_in_all(rank):
    def fail(processes):
        def action():
            if processes.rank == rank:
                raise OSError("full")
            return 7

        agree(processes, action)

    found = in_threads(fail)
    assert [type(e) for e in found] == [OSError if r == rank else UserError for r in (0, 1)]
    assert in_threads(lambda p: agree(p, lambda: p.rank)) == [0, 1]


def test_the_first_process_fails_for_all(tmp_path):
    done = []

    def fail(processes):
        in_first(processes, lambda: done.append(processes.rank))
        in_first(processes, lambda: 1 / 0)

    assert [type(e) for e in in_threads(fail)] == [ZeroDivisionError, UserError] and done == [0]


def save_in_threads(folder, text, broken=()):
    def work(processes):
        def write(path):
            if processes.rank in broken:
                raise OSError("full")
            if processes.is_first:
                put(text, path)

        own = {f"own{processes.rank}": partial(put, text)}
        write_directory(folder / "x", {"a.bin": write, **own}, {"b.json": partial(put, text)},
                        processes)  # fmt: skip

    return in_threads(work)


def test_several_processes_write_one_directory(tmp_path):
    assert save_in_threads(tmp_path, "n") == [None, None]
    names = {"a.bin", "b.json", "own0", "own1"}
    assert {p.name for p in (tmp_path / "x").iterdir()} == names | {CHECKSUMS}
    assert json.loads((tmp_path / "x" / CHECKSUMS).read_text())["files"].keys() == names


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_write_stops_all_and_the_old_one_stays(tmp_path, rank):
    save(tmp_path, "o")
    found = save_in_threads(tmp_path, "n", broken=(rank,))
    assert [type(e) for e in found] == [OSError if r == rank else UserError for r in (0, 1)]
    assert check(tmp_path, True) == "o"


def test_a_folder_is_for_one_run_until_that_ends(tmp_path):
    with locked(tmp_path):
        with pytest.raises(UserError, match="another run is writing here"), locked(tmp_path):
            pass
        found = in_threads(lambda p: claim(tmp_path, p).__enter__())
        assert [type(e) for e in found] == [UserError] * 2  # no process goes on alone
    with locked(tmp_path):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        pass
