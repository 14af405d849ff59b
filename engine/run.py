"""One phase's run: its log, its checkpoints, how it stops, and how it is continued exactly.

A resumed run computes what it would have computed uninterrupted, to the last bit: weights,
optimizer and random generators are restored, and flags that would change the result are refused.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ops
from checkpoint import load_checkpoint, read_config, save_checkpoint
from config import IMAGE_ID, ModelConfig, MoEConfig, TrainConfig, UserError, to_dict, warn_once
from data import Batch, Sample
from engine.casts import cast_once
from engine.durable import agree, discard, in_first, locked, recover, sync, verify, write_file
from engine.features import cache_features
from engine.first_gate import check_routers
from engine.flops import matmul_rate, model_flops
from engine.inference import compile_blocks
from engine.parallel import shard
from engine.processes import ALONE, Processes, like
from engine.published import router_hash
from model import Loss, MedMoE, choose_device, sparse_layers
from sources.records import parse
from sources.tensorfiles import open_tensors

# Flags that may change when a run is resumed: where and how it computes, or what follows it.
MAY_DIFFER = {
    "phase", "out", "json", "max_missing", "max_bad", "follow_links", "device", "dtype", "kernels",
    "workers", "cache_features", "cache_gb", "compile", "activation_checkpointing",
    "expert_parallel", "save_every", "keep", "resume", "overwrite", "eval",
}  # fmt: skip
# Windows has no SIGHUP.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


class Changed(UserError):
    """Resumed like this, the run would compute something else."""


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl, without a last line that a crash has torn. Raises UserError."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [parse(line.encode(), f"{path}: line {n} is") for n, line in enumerate(lines, 1)]


def unfinished(folder: Path, number: int) -> list[Path]:
    """Checkpoints of this phase to resume from, oldest first."""
    return sorted(folder.glob(f"phase{number}-step*"))


@contextmanager
def claim(folder: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Lock the output folder for this run, and repair what a crash left in it."""
    with ExitStack() as stack:
        in_first(processes, lambda: stack.enter_context(locked(folder)))
        in_first(processes, recover, folder, "phase[123]*", "log.jsonl")
        yield


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full or read-only disk is a UserError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written: {error}") from error


def data_digest(samples: Iterable[Sample]) -> str:
    """16 hex digits that change with the samples or their order."""
    rows = ((s.source, s.id, Path(str(s.image)).parts[-2:],  # folder and file, wherever they lie
             s.image_turn, s.turns, s.modality, s.weight) for s in samples)  # fmt: skip
    return hashlib.sha256("\n".join(map(json.dumps, rows)).encode()).hexdigest()[:16]


def refuse(path: Path, name: str, before: Any, now: Any) -> NoReturn:
    flag = "--" + name.replace("_", "-")
    raise Changed(f"{path}: began with {flag} {before}, now {flag} {now}: "
                  "give the flags that it began with, or another --out")  # fmt: skip


def refuse_changed_flags(path: Path, before: dict, flags: TrainConfig, unread=frozenset()) -> None:
    """before: the flags in a checkpoint's config.json; an older one may lack some."""
    before = to_dict(TrainConfig()) | before
    for name, now in to_dict(flags).items():
        if name not in MAY_DIFFER | unread and before[name] != now:
            refuse(path, name, before[name], now)


def refuse_other_experts(init: Path, number: int, config: ModelConfig, ours: MoEConfig) -> None:
    """Raise UserError where phase `number` cannot go on with init's experts, or flags name others.

    config: init's; ours: what the flags say. How the experts began makes no difference.
    """
    if number < 3:
        raise UserError(f"--init {init}: has experts, and phase {number} trains a dense model")
    theirs, ours = (
        to_dict(replace(moe, start="", layers=tuple(sparse_layers(config, moe))))
        for moe in (config.moe, ours)
    )
    if theirs != ours:
        layers = ",".join(map(str, theirs["layers"]))
        words = {
            "n_experts": f"--experts {theirs['n_experts']}", "top_k": f"--top-k {theirs['top_k']}",
            "router": f"--router {theirs['router']}", "level": f"--router-level {theirs['level']}",
            "layers": f"--moe-layers {layers}", "meta": "--meta" if theirs["meta"] else "--no-meta",
        }  # fmt: skip
        need = " ".join(word for name, word in words.items() if theirs[name] != ours[name])
        raise UserError(f"--init {init}: its experts need {need}; or give phase 2's checkpoint")


def checkpoint_blocks(model: MedMoE) -> None:
    """In training, compute each block's forward again in backward; dropout repeats its masks."""

    def recompute(block: nn.Module, forward: Callable, *args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False) if block.training else forward(*args)

    for block in model.decoder.blocks:
        block.forward = partial(recompute, block, block.forward)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every global random generator of this process, as tensors."""
    others = [random.getstate(), np.random.get_state()]  # noqa: NPY002
    text = json.dumps(others, default=np.ndarray.tolist)  # its floats come back bit for bit
    encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    states = {"rng.cpu": torch.get_rng_state(), "rng.others": encoded}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, Tensor], device: torch.device, seed: str) -> None:
    """The inverse of generators; one without a state is seeded."""
    seed_all(random.Random(seed).getrandbits(32))
    if "rng.cpu" in states:
        torch.set_rng_state(states["rng.cpu"])
    if "rng.cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["rng.cuda"], device)
    if "rng.others" in states:
        (version, keys, gauss), numpys = json.loads(bytes(states["rng.others"].tolist()))
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(numpys))  # noqa: NPY002


class Run:
    """One phase's run: what surrounds the training loop of train.py."""

    def __init__(
        self, number: int, flags: TrainConfig, tokenizer: Path, processes: Processes = ALONE
    ):
        self.number, self.flags, self.tokenizer = number, flags, tokenizer
        self.processes, self.rank, self.world = processes, processes.rank, processes.world
        self.title = f"phase {number}"
        self.folder = Path(flags.out)
        self.path = self.folder / "log.jsonl"
        self.device, self.dtype = choose_device(flags.device, flags.dtype)
        ops.choose(flags.kernels, self.device)
        self.resolved: dict[str, Any] = {
            "dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type,
            "processes": processes.world, "threads": torch.get_num_threads(),
        }  # fmt: skip
        self.bar, self.noted = tqdm(disable=True), 0

    def begin(
        self, model: MedMoE, optimizer: torch.optim.Optimizer, samples: Iterable[Sample],
        n_steps: int, per_epoch: int, **resolved: Any,
    ) -> int:  # fmt: skip
        """Resume if asked to, open the log -> the first step. resolved: flags' final values."""
        self.model, self.optimizer, self.n_steps = model, optimizer, n_steps
        check_routers(model)  # again: their calls so far may have recorded no gradients
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        resolved |= {"data": f"of samples {data_digest(samples)}", "steps": n_steps}
        if moe := model.config.moe:
            resolved["router_sha256"] = router_hash(moe.router)
        self.resolved |= resolved
        first = self.resume() if self.flags.resume else 0
        self.begin_log(first, per_epoch)
        *costs, routed = model_flops(model)
        self.costs = *costs, *routed  # FLOPs of what `count` counts
        self.rate = matmul_rate(self.device, self.dtype) * self.world  # FLOP/s
        layers = [block for block in model.decoder.blocks if block.is_sparse]
        self.load_shape = len(layers), model.config.moe.n_experts if layers else 0
        self.bar = tqdm(initial=first, total=n_steps, desc=self.title, mininterval=1,
                        disable=self.rank > 0)  # fmt: skip
        self.begin_step()
        return first

    def place(self, model: MedMoE) -> None:
        """Move the model to its device, or share it among the processes; apply flags of speed."""
        if self.flags.compile:
            compile_blocks(model)
        if self.flags.activation_checkpointing:
            checkpoint_blocks(model)
        ops.place_experts(model, self.device)
        shard(model, self.processes, self.device, self.flags.expert_parallel)
        # On a GPU without micro-batches each forward casts once a step anyway, and its copies go
        # while the gradients come; recomputed blocks keep none, to save memory.
        saves = self.flags.accumulate > 1 and not self.flags.activation_checkpointing
        if self.world == 1 and (self.device.type == "cpu" or saves):
            cast_once(model)
        cache_features(model, self.flags, self.world)
        check_routers(model)
        if self.rank:  # else all processes would use the same dropout masks
            seed_all(self.flags.seed + self.number + 1000 * self.rank)

    def begin_step(self) -> None:
        n_layers, n_experts = self.load_shape
        self.counts = torch.zeros(6, dtype=torch.float64)
        self.routed = torch.zeros(n_layers, n_experts, dtype=torch.float64)
        self.start = time.perf_counter()

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        return list(values) if self.world == 1 else self.processes.sum(*values)

    def count(self, batch: Batch, out: Loss) -> None:
        """Add a micro-batch to the step's counts, for its MFU and the load of the experts."""
        if not out.n_tokens:  # another process's samples: see train.micro_batches
            return
        lengths = batch.mask.sum(dim=1).cpu().double()  # of real positions; mps has no doubles
        patches = (batch.ids == IMAGE_ID).sum()
        counts = [len(batch.images), patches, len(lengths), lengths.sum(), lengths.square().sum()]
        self.counts += torch.tensor([*counts, out.n_tokens], dtype=torch.float64)
        for routed, routing in zip(self.routed, out.routings, strict=True):
            routed += (routing.gates != 0).sum(dim=(0, 1)).cpu()

    def sum_loss_and_load(self, loss: float) -> tuple[float, Tensor]:
        """Sum the step's loss and counts over the processes -> loss, load (L, E) per position."""
        loss, *counts = self.sum(loss, *self.counts.tolist(), *self.routed.flatten().tolist())
        self.counts, self.routed = counts[:6], torch.tensor(counts[6:]).view(self.load_shape)
        return loss, (self.routed / counts[3]).float()

    def drop_idle_gradients(self) -> None:
        """After a step without images: a gradient of 0 would let AdamW go on by its momentum."""
        if not self.counts[0]:
            for name in self.params:
                if name.startswith(("vision.", "projector.")):
                    self.params[name].grad = None

    def clip_gradients(self, largest: float) -> float:
        """Scale all gradients to a joint norm of at most `largest` (0: as they are) -> their norm.

        Of parameters that are shared among processes, each process adds its share.
        """
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        if self.world > 1:
            grads = [ops.local(grad) for grad in grads]
        norm = self.sum(nn.utils.get_total_norm(grads).item() ** 2)[0] ** 0.5
        if largest:
            scale = min(1.0, largest / (norm + 1e-6))
            for grad in grads:
                grad.mul_(scale)
        return norm

    def after_step(self, step: int, loss: float, lr: float, norm: float, load: Tensor) -> None:
        """Progress bar, log, checkpoint, and leaving if a signal asked for it."""
        seconds, n_positions = time.perf_counter() - self.start, self.counts[3]
        numbers = *self.counts, *self.routed.sum(dim=1).tolist()
        flops = sum(n * c for n, c in zip(numbers, self.costs, strict=True))
        speed, mfu = round(n_positions / seconds), flops / seconds / self.rate
        self.bar.set_postfix(loss=f"{loss:.3f}", tok_s=speed, mfu=f"{mfu:.0%}", refresh=False)
        try:
            self.bar.update()
        except BrokenPipeError:  # as of 2>&1 | head: stop, with a checkpoint
            self.bar.disable, self.noted = True, self.noted or signal.SIGTERM
        loads = {"load": load.double().round(decimals=4).tolist()} if load.numel() else {}
        self.log(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed, mfu=mfu, **loads)
        done, stop = step + 1, self.signal()
        if stop or (done % self.flags.save_every == 0 and done < self.n_steps):
            self.save_step(done)
        if stop:
            self.bar.close()
            self.leave(done, stop)
        if done == self.n_steps:
            self.bar.close()
        self.begin_step()

    def signal(self) -> int:
        """A signal that any process was sent, known to all at the same step; 0: none."""
        (n_sent,) = self.sum(self.noted > 0)
        return (self.noted or signal.SIGTERM) if n_sent else 0

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            os._exit(128 + number)
        self.noted = number
        if self.rank == 0:
            with suppress(OSError):  # Ctrl-C ends `tee` too; not print, which it may interrupt
                os.write(2, b"\nstops after this step; a second signal stops at once\n")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around a phase: the first Ctrl-C or kill lets the step finish, a second one does not.

        After the last step it lets the phase finish: its router, and its checkpoint.
        """
        self.noted = 0
        # nohup wants SIGHUP ignored, a script's & SIGINT; None belongs to somebody else.
        alone = signal.SIG_IGN, None
        before = {n: h for n in SIGNALS if (h := signal.getsignal(n)) not in alone}
        try:
            for number in before:
                signal.signal(number, self.note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.bar.close()
        if stop := self.signal():
            self.leave(self.n_steps, stop)

    def refuse_leftovers(self) -> None:
        """Raise UserError for an unfinished run in --out without --resume."""
        if not self.flags.resume and (found := unfinished(self.folder, self.number)):
            raise UserError(f"{found[-1]} is an unfinished run: --resume continues it; "
                            "or remove it, or choose another --out")  # fmt: skip

    def save(self, path: Path, model: MedMoE, extra: dict, own: dict | None = None, **info) -> None:
        info |= {"phase": self.number, "flags": to_dict(self.flags), "torch": torch.__version__,
                 "run": self.resolved}  # fmt: skip
        with disk_errors(self.path):  # the log before a checkpoint of its steps
            in_first(self.processes, sync, self.path)
        with disk_errors(path):
            save_checkpoint(path, model, model.config, info, self.tokenizer, extra, own,
                            processes=self.processes)  # fmt: skip

    def save_step(self, step: int) -> None:
        """A checkpoint to resume from. Older ones are removed after it has been read back."""
        state = {}
        for name, param in self.params.items():
            state |= {f"{key}.{name}": t for key, t in self.optimizer.state[param].items()}
        path = self.folder / f"phase{self.number}-step{step:07}"
        self.save(path, self.model, {"trainer": state}, generators(self.device), step=step)
        # A later one is damaged, or this run would have resumed from it.
        older = [p for p in unfinished(self.folder, self.number) if p.name <= path.name]
        self.remove(older[: -self.flags.keep])

    def leave(self, step: int, number: int) -> NoReturn:
        """Exit because of a signal; the checkpoint is saved."""
        if self.processes.is_first:
            name = signal.Signals(number).name
            print(f"{self.title}: stopped by {name} after {step} steps, saved in {self.folder}; "
                  "the same command with --resume continues", file=sys.stderr)  # fmt: skip
        raise SystemExit(128 + number)

    def remove(self, paths: Iterable[Path]) -> None:
        with disk_errors(self.folder):
            in_first(self.processes, lambda: [discard(path) for path in paths])

    def resume(self) -> int:
        """Resume from the last checkpoint, or the one before if that is damaged -> its step.

        0 if there are none. Raises UserError if all are damaged, or this run is another one.
        """
        for path in reversed(found := unfinished(self.folder, self.number)):
            try:
                step = agree(self.processes, self.load, path)
            except Changed:
                raise
            except UserError as error:
                warn_once(f"{error}; {path.name} is left out")
                continue
            if self.rank == 0:
                print(f"{self.title}: resumed from step {step}, {path}")
            return step
        if found:
            raise UserError(f"{self.folder}: no checkpoint of {self.title} is whole, of "
                            f"{len(found)}: remove them to begin it anew")  # fmt: skip
        return 0

    def load(self, path: Path) -> int:
        config, info = read_config(path)
        refuse_changed_flags(path, info["flags"], self.flags)
        verify(path, "tokenizer.json")
        is_same = (path / "tokenizer.json").read_bytes() == self.tokenizer.read_bytes()
        if config != self.model.config or not is_same:
            raise Changed(f"{path}: began with another model or tokenizer than this run has now")
        for name, now in (self.resolved | {"torch": torch.__version__}).items():
            before = (info.get("run", {}) | {"torch": info.get("torch")}).get(name)
            warned = "device", "processes", "threads", "torch", "router_sha256"
            if name in warned and before != now:
                warn_once(f"{path}: {name} {before}, now {now}: resumed, but not bit for bit")
            elif before != now:
                refuse(path, name, before, now)
        load_checkpoint(self.model, path)
        for key, tensor in open_tensors(path / "trainer.safetensors"):
            kind, _, name = key.partition(".")
            if (param := self.params.get(name)) is None:
                raise UserError(f"{path}: trained {name}, which this run freezes")
            # How many steps a parameter has made is one number, and never sharded.
            now = tensor.to(self.device) if kind == "step" else like(param, tensor)
            self.optimizer.state[param][kind] = now
        own = path / f"process{self.rank}.safetensors"
        states = dict(open_tensors(own)) if own.is_file() else {}
        step = info["step"]
        set_generators(states, self.device, f"{self.flags.seed} {step} {self.rank}")
        return step

    def begin_log(self, first: int, per_epoch: int) -> None:
        """Drop what an interrupted run logged after its checkpoint, then log how it begins."""

        def rewrite() -> None:
            kept = (r for r in read_log(self.path)
                    if r["phase"] != self.number or 0 <= r.get("step", -1) < first)  # fmt: skip
            write_file(self.path, "".join(json.dumps(r) + "\n" for r in kept))

        with disk_errors(self.path):
            in_first(self.processes, rewrite)
        trained = sum(p.numel() for p in self.params.values())
        self.log(begins=first, steps=self.n_steps, steps_per_epoch=per_epoch, trained=trained,
                 flags=to_dict(self.flags), device=str(self.device), dtype=str(self.dtype),
                 torch=torch.__version__, names=sorted(self.params))  # fmt: skip

    def log(self, **values) -> None:
        if self.rank == 0:
            with disk_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps({"phase": self.number, **values}) + "\n")
