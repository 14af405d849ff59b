"""One phase's place on the disk: its log, its checkpoints, and how to go on from them.

A run that goes on computes what it would have computed undisturbed, to the last bit: weights,
optimizer and random generators are as they were, and nothing may be asked of it that would make
it another run.
"""

import hashlib
import json
import secrets
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor

import kernels
from checkpoint import load_checkpoint, read_meta, save_checkpoint
from config import UserError, to_dict
from engine.durable import (
    agree,
    discard,
    in_first,
    is_sound,
    locked,
    recover,
    sync,
    verify,
    write_file,
)
from engine.generators import generators, set_generators
from engine.parallel import like, put, write_tensors
from engine.processes import ALONE, Processes
from flags import TrainConfig
from model import MedMoE, choose_device
from records import Sample, warn_once
from tensorfiles import open_tensors

# Flags that a run may go on with changed: they say where and how it computes, or what comes after.
MAY_DIFFER = {
    "phase", "out", "json", "max_missing", "device", "dtype", "kernels", "workers",
    "cache_features", "cache_gb", "compile", "activation_checkpointing", "expert_parallel",
    "save_every", "keep", "resume", "eval",
}  # fmt: skip
# What it settles on must be the same, except where it computes; then it is not to the last bit.
WHERE = ("device", "processes")


class Changed(UserError):
    """The run would not be the one that began."""


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl; a crash may have torn the last line, which is then left out.

    Raises UserError for any other line that is not JSON.
    """
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    lines = [line for line in lines if line]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON: {error}") from error
    return records


def unfinished(folder: Path, number: int) -> list[Path]:
    """Checkpoints to go on from, of this phase, oldest first."""
    return sorted(folder.glob(f"phase{number}-step*"))


def run_id(path: Path) -> str | None:
    """Which run saved this checkpoint; None if it cannot be told."""
    try:
        return read_meta(path)[1].get("run", {}).get("id")
    except UserError:
        return None


@contextmanager
def claim(folder: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Have the output folder for this run alone, and mend what a crash left in it."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(locked(folder))
            recover(folder, "phase[123]*", "log.jsonl")
            for number in (1, 2, 3):
                finished = folder / f"phase{number}"
                if finished.is_dir() and (rest := unfinished(folder, number)):
                    same = [p for p in rest if run_id(p) == run_id(finished) is not None]
                    for path in same if is_sound(finished) else ():
                        discard(path)  # the crash came between the last save and this

        in_first(processes, enter)
        yield


@contextmanager
def told(path: Path) -> Iterator[None]:
    """A disk that is full, or read-only, is the user's to mend."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written: {error}") from error


def data_digest(samples: Iterable[Sample]) -> str:
    """16 hex digits that differ if the samples do, or their order."""
    rows = ((s.source, s.id, s.turns, s.modality, s.weight) for s in samples)
    return hashlib.sha256("\n".join(map(json.dumps, rows)).encode()).hexdigest()[:16]


def as_typed(name: str, value: Any) -> str:
    """A flag as it stands on a command line."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False or value == []:
        return f"without {flag}"
    values = value if isinstance(value, list) else [value]
    return "with " + " ".join(flag if v is True else f"{flag} {v}" for v in values)


def refuse(path: Path, name: str, before: Any, now: Any) -> NoReturn:
    raise Changed(f"{path}: began {as_typed(name, before)}, would go on {as_typed(name, now)}: "
                  "give the flags that it began with, or another --out")  # fmt: skip


def refuse_changed_flags(path: Path, before: dict, flags: TrainConfig) -> None:
    """before: the flags in a checkpoint's config.json; an older one may lack some."""
    before = to_dict(TrainConfig()) | before
    for name, now in to_dict(flags).items():
        if name not in MAY_DIFFER and before[name] != now:
            refuse(path, name, before[name], now)


class Run:
    """One phase's place on the disk: its log, its checkpoints, and how to go on from them."""

    def __init__(
        self, number: int, flags: TrainConfig, tokenizer: Path, processes: Processes = ALONE
    ):
        self.number, self.flags, self.tokenizer = number, flags, tokenizer
        self.processes = processes
        self.title = f"phase {number}"
        self.folder = Path(flags.out)
        self.path = self.folder / "log.jsonl"
        self.device, self.dtype = choose_device(flags.device, flags.dtype)
        kernels.choose(flags.kernels, self.device)
        self.settled: dict[str, Any] = {
            "id": secrets.token_hex(8), "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type, "processes": processes.world,
        }  # fmt: skip

    def settle(self, samples: Iterable[Sample], **values: Any) -> None:
        """What a run has settled on, now that all defaults are known, and keeps to."""
        self.settled |= {"data": f"of samples {data_digest(samples)}", **values}

    def checkpoints(self) -> list[Path]:
        return unfinished(self.folder, self.number)

    def refuse_leftovers(self) -> None:
        """Nobody's unfinished work is thrown away because --resume was forgotten."""
        if not self.flags.resume and (found := self.checkpoints()):
            raise UserError(f"{found[-1]} is an unfinished run: --resume goes on with it; "
                            "or remove it, or choose another --out")  # fmt: skip

    def save(self, path: Path, model: MedMoE, extra: dict, own: dict | None = None, **meta) -> None:
        meta |= {"phase": self.number, "flags": to_dict(self.flags), "torch": torch.__version__,
                 "run": self.settled}  # fmt: skip
        with told(path):
            save_checkpoint(path, model, model.config, meta, self.tokenizer, extra, own,
                            write_tensors, self.processes)  # fmt: skip

    def save_step(self, model: MedMoE, optimizer, named: dict[str, Tensor], step: int) -> None:
        """A checkpoint to go on from. Older ones are removed after it has been read back."""
        state = {}
        for name, param in named.items():
            kept = optimizer.state[param].items()  # its step follows from the run's
            state |= {f"{key}.{name}": t for key, t in kept if key != "step"}
        path = self.folder / f"phase{self.number}-step{step:07}"
        with told(self.path):
            in_first(self.processes, sync, self.path)
        self.save(path, model, {"trainer": state}, generators(self.device), step=step)
        # A later one is damaged, or this run would have gone on from there.
        older = [p for p in self.checkpoints() if p.name <= path.name]
        self.remove(older[: -self.flags.keep])

    def leave(self, step: int, number: int) -> NoReturn:
        """A signal asked for it, and the checkpoint is saved."""
        if self.processes.is_first:
            name = signal.Signals(number).name
            print(f"{self.title}: stopped by {name} after {step} steps, saved in {self.folder}; "
                  "the same command with --resume goes on", file=sys.stderr)  # fmt: skip
        raise SystemExit(128 + number)

    def remove(self, paths: Iterable[Path]) -> None:
        with told(self.folder):
            in_first(self.processes, lambda: [discard(path) for path in paths])

    def resume(self, model: MedMoE, optimizer, named: dict[str, Tensor]) -> int:
        """Go on from the last checkpoint, or from the one before if that is damaged; -> its step.

        0 if there are none. Raises UserError if none is whole, or the run is not the one it was.
        """
        for path in reversed(found := self.checkpoints()):
            try:
                step = agree(self.processes, self.load, path, model, optimizer, named)
            except Changed:
                raise
            except UserError as error:
                warn_once(f"{error}; {path.name} is left out")
                continue
            if self.processes.is_first:
                print(f"{self.title}: goes on from step {step}, {path}")
            return step
        if found:
            raise UserError(f"{self.folder}: no checkpoint of {self.title} is whole, of "
                            f"{len(found)}: remove them to begin it anew")  # fmt: skip
        return 0

    def load(self, path: Path, model: MedMoE, optimizer, named: dict[str, Tensor]) -> int:
        config, meta = read_meta(path)
        refuse_changed_flags(path, meta["flags"], self.flags)
        if "run" not in meta:
            raise Changed(f"{path}: of an older version, which kept too little to go on from")
        verify(path, "tokenizer.json")
        is_same = (path / "tokenizer.json").read_bytes() == self.tokenizer.read_bytes()
        if config != model.config or not is_same:
            raise Changed(f"{path}: began with another model or tokenizer than this run has now")
        for name, now in self.settled.items():
            before = meta["run"].get(name)
            if name in WHERE and before != now:
                warn_once(f"{path}: {name} {before}, now {now}: it goes on, but not bit for bit")
            elif name != "id" and before != now:
                refuse(path, name, before, now)
        load_checkpoint(model, path, put)
        for key, tensor in open_tensors(path / "trainer.safetensors"):
            kind, _, name = key.partition(".")
            if name not in named:
                raise UserError(f"{path}: trained {name}, which this run freezes")
            optimizer.state[named[name]][kind] = like(named[name], tensor)
        own = path / f"process{self.processes.rank}.safetensors"
        states = dict(open_tensors(own)) if own.is_file() else {}
        step = meta["step"]
        for param in named.values():
            optimizer.state[param]["step"] = torch.tensor(float(step), device=self.device)
        set_generators(states, self.device, f"{self.flags.seed} {step} {self.processes.rank}")
        self.settled["id"] = meta["run"]["id"]
        return step

    def begin_log(self, first: int, n_steps: int, per_epoch: int, named: dict) -> None:
        """Drop what an interrupted run logged after its checkpoint, then say what begins."""

        def rewrite() -> None:
            kept = (r for r in read_log(self.path)
                    if r["phase"] != self.number or 0 <= r.get("step", -1) < first)  # fmt: skip
            write_file(self.path, "".join(json.dumps(r) + "\n" for r in kept))

        with told(self.path):
            in_first(self.processes, rewrite)
        trained = sum(p.numel() for p in named.values())
        self.log(begins=first, steps=n_steps, steps_per_epoch=per_epoch, trained=trained,
                 flags=to_dict(self.flags), device=str(self.device), dtype=str(self.dtype),
                 torch=torch.__version__, names=sorted(named))  # fmt: skip

    def log(self, **values) -> None:
        if self.processes.is_first:
            with told(self.path), self.path.open("a") as file:
                file.write(json.dumps({"phase": self.number, **values}) + "\n")
