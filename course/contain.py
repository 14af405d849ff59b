"""Run a submission in a child process with a time limit and an audit hook.

    run        starts a command in a new process group, with a clean environment, in a folder of
               its own; the whole group is killed at the time limit
    guard      in the child, before the submission is imported: an audit hook that refuses writing
               files outside that folder, processes, sockets and ctypes; code of the submission,
               and what it calls, may not write in that folder either
    snapshot   in the child, before the import; `changed` lists afterwards which functions,
               classes and constants, of this repository or of torch, have been replaced

This is not a sandbox. A hook in the same interpreter can be circumvented on purpose; files can be
read; memory is not limited. It stops mistakes and simple cheating, and reports them. Run code that
you do not trust in a container.

The lecturer's secret is in no environment that a child can read, only the seeds derived from it are
in its job: Linux shows the environment that a process was started with, in /proc, to all processes
of the same user, so `take_secret` starts the command again without it.
"""

import contextlib
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from config import UserError, one_line
from routers import OWN

ROOT = Path(__file__).resolve().parent.parent
FILE = "submission.py"  # its name in the child's folder
SECRET, PIPE = "COURSE_SECRET", "COURSE_SECRET_PIPE"
FOLDER = "COURSE_FOLDER"  # set in a child's environment: its folder
REFUSED = (  # (prefix of an audit event, its description in messages)
    ("subprocess.Popen", "starts a process"), ("os.system", "starts a process"),
    ("os.exec", "starts a process"), ("os.fork", "starts a process"),
    ("os.posix_spawn", "starts a process"), ("os.spawn", "starts a process"),
    ("pty.", "starts a process"), ("os.kill", "sends a signal"),
    ("signal.", "sends a signal"), ("socket.", "opens a connection"),
    ("ctypes.", "calls C code by ctypes"), ("sys.addaudithook", "adds an audit hook"),
    ("sys.settrace", "traces other code"), ("sys.setprofile", "traces other code"),
    ("gc.get_", "searches the memory"), ("code.__new__", "makes code objects"),
)  # fmt: skip
CHANGES = {  # audit events that change a file -> which of their arguments are paths
    "os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.link": (0, 1),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,),
    "os.utime": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip
RUNNING: set[int] = set()  # process groups that `run` waits for, in all threads
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The parts of torch that compute a loss, a gradient or an optimizer step.
TORCH = ("torch", "torch.nn.functional", "torch.Tensor", "torch.nn.Module", "torch.nn.Linear",
         "torch.optim.AdamW", "torch.optim.Optimizer", "torch.autograd")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    code: int | None  # its exit code; None: stopped at the time limit
    tail: str  # the end of its output
    stage: str  # "starting", "importing the submission", "training" or "measuring"


def environment(folder: Path) -> dict[str, str]:
    """A child's environment: PATH and the like, the import path, and one thread."""
    ours = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
             "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder),
             "TMPDIR": str(folder), "LANG": "C.UTF-8", FOLDER: str(folder)}  # fmt: skip
    inherited = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
    return {k: os.environ[k] for k in inherited if k in os.environ} | ours


def take_secret() -> str:
    """COURSE_SECRET, "" if it is not set. To be called first by the main of a command.

    Replaces this process, if it was started as `python -m course.…`, by the same command without
    the secret in its environment, which reads it from a pipe. A test or a notebook that calls main
    is not replaced.
    """
    if PIPE in os.environ:
        return read_pipe(int(os.environ[PIPE]))
    secret, command = os.environ.get(SECRET, ""), getattr(sys.modules["__main__"], "__spec__", None)
    if secret and command and command.name.startswith("course."):
        out, into = os.pipe()
        os.write(into, secret.encode())
        os.close(into)
        os.set_inheritable(out, True)
        rest = {name: value for name, value in os.environ.items() if name != SECRET}
        os.execve(sys.executable, sys.orig_argv, rest | {PIPE: str(out)})
    return secret


@functools.cache  # it can be read once
def read_pipe(number: int) -> str:
    with open(number, encoding="utf-8") as pipe:
        return pipe.read()


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def stop_all() -> None:
    """Kill the children of all threads, as after Ctrl-C or when one seed has failed."""
    for group in list(RUNNING):
        kill(group)


def run(command: list[str], folder: Path, limit_s: float, cwd: Path | None = None) -> Outcome:
    """Run the command until it ends or the limit is reached; then kill its process group."""
    output = folder / "output.txt"
    with output.open("wb") as out:
        child = subprocess.Popen(
            command, cwd=cwd or folder, env=environment(folder), stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        RUNNING.add(child.pid)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            RUNNING.discard(child.pid)
            kill(child.pid)
            child.wait()
    stage = folder / "stage.txt"
    return Outcome(
        code,
        output.read_bytes()[-4000:].decode(errors="replace"),
        stage.read_text() if stage.is_file() else "starting",
    )


def run_job(module: str, job: dict, folder: Path, limit_s: float) -> dict:
    """Run `python -m MODULE` on a job -> its result.json. Raises UserError.

    job["where"] is the submission's name in messages.
    """
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-s", "-P", "-B", "-m", module, str(folder / "job.json")]
    outcome = run(command, folder, limit_s)
    if outcome.code is None:
        raise UserError(f"{job['where']}: stopped after {limit_s:g} s, while {outcome.stage}")
    file = folder / "result.json"
    if not file.is_file():
        lines = [line for line in outcome.tail.splitlines() if line.strip()]
        last = one_line(lines[-1], 300) if lines else "none"
        raise UserError(f"{job['where']}: ended with code {outcome.code}, while {outcome.stage}, "
                        f"last output: {last}")  # fmt: skip
    result = json.loads(file.read_text())
    if "refused" in result:
        raise UserError(f"{job['where']}{result['refused']}")
    return result


def line_of_submission(file: Path) -> int | None:
    """The line of the submission that is executing; None: no frame of the stack is in it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == str(file):
            return frame.f_lineno
        frame = frame.f_back
    return None


def location(file: Path) -> str:
    line = line_of_submission(file)
    return f", line {line}: " if line else ": "


def guard(folder: Path, file: Path, is_test: bool = False) -> list[str]:
    """Install the audit hook; -> a list to which each refused action is added.

    The hook raises PermissionError. A submission may catch it, so the caller checks the list too.
    is_test: the tests of the contract start processes, which is then refused to the submission
    alone, that is while a line of it is executing.
    """
    inside, refused = os.path.realpath(folder), []

    def is_refused(path: Any) -> bool:
        """Whether this file must not be changed now."""
        if isinstance(path, int) or path is None:  # an open file
            return False
        real = os.path.realpath(os.fsdecode(path))
        is_inside = os.path.commonpath([inside, real]) == inside
        return real != os.devnull and (not is_inside or line_of_submission(file) is not None)

    def refuse(action: str) -> None:
        refused.append(f"{location(file)}{action}, which a router must not do")
        raise PermissionError(action)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            path = os.fsdecode(path) if isinstance(path, bytes) else path
            writes = set("wax+") & set(mode) if mode else (flags or 0) & WRITES
            if writes and is_refused(path):
                refuse("writes a file")
            if os.path.basename(str(path)) in ("environ", "mem"):  # perhaps relative to a folder
                refuse("reads another process")
        elif event in CHANGES:
            if any(is_refused(args[i]) for i in CHANGES[event]):
                refuse("changes files")
        elif event == "subprocess.Popen" and is_test and line_of_submission(file) is None:
            return
        else:
            for prefix, action in REFUSED:
                if event.startswith(prefix):
                    refuse(action)

    def refuse_subclass(cls: type, **_: Any) -> None:
        """A tensor's subclass could give other counts than the tensor."""
        if cls.__module__.startswith(OWN):
            refuse("makes a subclass of Tensor")

    torch.Tensor.__init_subclass__ = classmethod(refuse_subclass)
    sys.addaudithook(hook)
    return refused


def guard_tests() -> list[str]:
    """The same in a process of course.judge's pytest, and in those that its tests start.

    Elsewhere, as for a student who runs the tests, it does nothing.
    """
    if FOLDER not in os.environ:
        return []
    folder = Path(os.environ[FOLDER])
    return guard(folder, folder / FILE, is_test=True)


def watched() -> dict[str, ModuleType | type]:
    """Name -> module: this repository's loaded modules, and the parts of torch in TORCH."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).resolve().is_relative_to(ROOT) and "site-packages" not in file:
            found[name] = module
    for name in TORCH:
        part: Any = torch
        for attribute in name.split(".")[1:]:
            part = getattr(part, attribute)
        found[name] = part
    return found


def fingerprint(value: Any) -> Any:
    """What `changed` compares: the object itself, a function's code, a container's contents."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, FunctionType):
        return value, value.__code__, value.__defaults__, value.__kwdefaults__
    if isinstance(value, dict | list | set):
        return value, repr(value) if len(value) < 100 else len(value)
    return (value,)


def snapshot() -> dict[str, Any]:
    """Full name -> fingerprint, of everything defined in the modules of `watched`."""
    found: dict[str, Any] = {}
    for name, module in watched().items():
        keys = dir(module) if isinstance(module, type) else list(vars(module))  # with inherited
        for key in keys:
            value = inspect.getattr_static(module, key)
            if key.startswith("__") or isinstance(value, ModuleType):
                continue
            found[f"{name}.{key}"] = fingerprint(value)
            if isinstance(value, type) and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    if callable(member) or not inner.startswith("__"):
                        found[f"{name}.{key}.{inner}"] = fingerprint(member)
    return found


def changed(before: dict[str, Any]) -> list[str]:
    """Names whose value differs from the snapshot; new names do not count."""
    after = snapshot()

    def same(a: tuple, b: tuple | None) -> bool:
        if b is None or len(a) != len(b):
            return False
        both = zip(a, b, strict=True)
        return all(x is y or (isinstance(x, str | int) and x == y) for x, y in both)

    return sorted(name for name, old in before.items() if not same(old, after.get(name)))
