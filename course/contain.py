"""Run a submission in a child process that is watched, and stopped when its time is over.

    run        starts `python -m MODULE JOB` in a new process group, with a clean environment, in
               a folder of its own; the whole group is killed at the limit
    guard      in the child, before the submission is imported: an audit hook that refuses files
               outside that folder, processes, sockets and ctypes
    snapshot   in the child, before the import; `changed` says afterwards which functions,
               classes and constants of ours, and of torch, are no longer what they were

What this does not stop: it is no sandbox. A hook in the same interpreter can be got round by
someone who sets out to; files can be read; memory is not limited. It stops what a student does
by mistake or for a quick win, and it makes that visible. Grade strangers in a container.
The lecturer's secret is not in the child's environment, only the data it stands for.
"""

import contextlib
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

from config import UserError
from records import one_line

ROOT = Path(__file__).resolve().parent.parent
FILE = "submission.py"  # what the child calls it
REFUSED = (  # audit events, by how they begin, and what they are in words
    ("subprocess.Popen", "starts a process"), ("os.system", "starts a process"),
    ("os.exec", "starts a process"), ("os.fork", "starts a process"),
    ("os.posix_spawn", "starts a process"), ("os.spawn", "starts a process"),
    ("pty.", "starts a process"), ("os.kill", "sends a signal"),
    ("signal.", "sends a signal"), ("socket.", "opens a connection"),
    ("ctypes.", "calls C code by ctypes"), ("sys.addaudithook", "adds an audit hook"),
    ("sys.settrace", "traces other code"), ("sys.setprofile", "traces other code"),
    ("gc.get_", "searches the memory"), ("code.__new__", "makes code objects"),
)  # fmt: skip
CHANGES = {  # audit events that change a file -> which of their arguments are its names
    "os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.link": (0, 1),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,),
    "os.utime": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip
RUNNING: set[int] = set()  # process groups that `run` waits for, of all threads
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Of torch, what a loss, a gradient or a step passes through.
TORCH = ("torch", "torch.nn.functional", "torch.Tensor", "torch.nn.Module", "torch.nn.Linear",
         "torch.optim.AdamW", "torch.optim.Optimizer", "torch.autograd")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a child ended. code None: its time was over."""

    code: int | None
    tail: str  # the last it printed
    stage: str  # the last thing it said it was doing


def environment(folder: Path) -> dict[str, str]:
    """What a child is given: nothing of ours but the path, and one thread for all its sums."""
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
             "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder),
             "TMPDIR": str(folder), "LANG": "C.UTF-8"}  # fmt: skip
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
    return {k: os.environ[k] for k in kept if k in os.environ} | fixed


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def stop_all() -> None:
    """End what other threads wait for, as after Ctrl-C or when one seed has failed."""
    for group in list(RUNNING):
        kill(group)


def run(command: list[str], folder: Path, limit_s: float, cwd: Path | None = None) -> Outcome:
    """Run it to its end or the limit's; no process of its group is left afterwards."""
    said = folder / "said.txt"
    with said.open("wb") as out:
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
        said.read_bytes()[-4000:].decode(errors="replace"),
        stage.read_text() if stage.is_file() else "starting",
    )


def run_job(module: str, job: dict, folder: Path, limit_s: float) -> dict:
    """`python -m MODULE` with this job -> what it left in result.json. Raises UserError.

    job["where"] is what sentences call the submission.
    """
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-s", "-P", "-B", "-m", module, str(folder / "job.json")]
    outcome = run(command, folder, limit_s)
    if outcome.code is None:
        raise UserError(f"{job['where']}: stopped after {limit_s:g} s, while {outcome.stage}")
    file = folder / "result.json"
    if not file.is_file():
        lines = [line for line in outcome.tail.splitlines() if line.strip()]
        last = one_line(lines[-1], 300) if lines else "nothing"
        raise UserError(f"{job['where']}: ended with code {outcome.code}, while {outcome.stage}, "
                        f"and said last: {last}")  # fmt: skip
    result = json.loads(file.read_text())
    if "refused" in result:
        raise UserError(f"{job['where']}{result['refused']}")
    return result


def line_of_submission(file: Path) -> int | None:
    """The line of the submission that is being run, from the innermost frame; None: not in it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == str(file):
            return frame.f_lineno
        frame = frame.f_back
    return None


def place(file: Path) -> str:
    line = line_of_submission(file)
    return f", line {line}: " if line else ": "


def guard(folder: Path, file: Path) -> list[str]:
    """From now on, refuse with a PermissionError; -> the list of what was refused so far.

    A submission may catch the error, but not empty the list: who runs it looks there at the end.
    """
    inside, noted = os.path.realpath(folder), []

    def is_outside(path: Any) -> bool:
        if isinstance(path, int) or path is None:  # an open file
            return False
        real = os.path.realpath(os.fsdecode(path))
        return real != os.devnull and os.path.commonpath([inside, real]) != inside

    def refuse(what: str) -> None:
        noted.append(f"{place(file)}{what}, which no router may")
        raise PermissionError(what)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writes = set("wax+") & set(mode) if mode else (flags or 0) & WRITES
            if writes and is_outside(path):
                refuse("writes a file outside of its folder")
        elif event in CHANGES:
            if any(is_outside(args[i]) for i in CHANGES[event]):
                refuse("changes files outside of its folder")
        else:
            for begins, words in REFUSED:
                if event.startswith(begins):
                    refuse(words)

    sys.addaudithook(hook)
    return noted


def watched() -> dict[str, ModuleType | type]:
    """Our modules that are loaded, and the parts of torch that matter here."""
    ours = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).resolve().is_relative_to(ROOT) and "site-packages" not in file:
            ours[name] = module
    for name in TORCH:
        part: Any = torch
        for attribute in name.split(".")[1:]:
            part = getattr(part, attribute)
        ours[name] = part
    return ours


def fingerprint(value: Any) -> Any:
    """The object itself, so that its identity stays its own, and what a function runs."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, FunctionType):
        return value, value.__code__, value.__defaults__, value.__kwdefaults__
    if isinstance(value, dict | list | set):
        return value, repr(value) if len(value) < 100 else len(value)
    return (value,)


def snapshot() -> dict[str, Any]:
    """Full name -> fingerprint, of all that is defined in our modules and used of torch."""
    found: dict[str, Any] = {}
    for name, module in watched().items():
        for key, value in list(vars(module).items()):
            if key.startswith("__") or isinstance(value, ModuleType):
                continue
            found[f"{name}.{key}"] = fingerprint(value)
            if isinstance(value, type) and value.__module__ == name:
                for inner, member in list(vars(value).items()):
                    if callable(member) or isinstance(member, staticmethod | classmethod):
                        found[f"{name}.{key}.{inner}"] = fingerprint(member)
    return found


def changed(before: dict[str, Any]) -> list[str]:
    """Names whose value is another than in the snapshot; names that are new do not count."""
    after = snapshot()

    def same(a: tuple, b: tuple | None) -> bool:
        if b is None or len(a) != len(b):
            return False
        both = zip(a, b, strict=True)
        return all(x is y or (isinstance(x, str | int) and x == y) for x, y in both)

    return sorted(name for name, was in before.items() if not same(was, after.get(name)))
