"""One phase's place on the disk: its log, its checkpoints, and how to go on from them."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoint import load_checkpoint, read_meta, save_checkpoint
from config import UserError, to_dict
from engine.processes import ALONE, Processes
from flags import TrainConfig
from model import MedMoE, choose_device
from tensorfiles import open_tensors


class Run:
    """One phase's place on the disk: its log, its checkpoints, and how to go on from them."""

    def __init__(
        self, number: int, flags: TrainConfig, tokenizer: Path, processes: Processes = ALONE
    ):
        self.number, self.flags, self.tokenizer = number, flags, tokenizer
        self.processes = processes
        self.title = f"phase {number}"
        self.folder = Path(flags.out)
        self.device, self.dtype = choose_device(flags.device, flags.dtype)

    def checkpoints(self) -> list[Path]:
        """Those of an unfinished run of this phase, oldest first."""
        return sorted(self.folder.glob(f"phase{self.number}-step*"))

    def refuse_leftovers(self) -> None:
        """Nobody's unfinished work is thrown away because --resume was forgotten."""
        if not self.flags.resume and (found := self.checkpoints()):
            raise UserError(f"{found[-1]} is an unfinished run: --resume goes on with it; "
                            "or remove it, or choose another --out")  # fmt: skip

    def save(self, path: Path, model: MedMoE, extra: dict, **meta) -> None:
        meta |= {"phase": self.number, "flags": to_dict(self.flags), "torch": torch.__version__}
        try:
            save_checkpoint(path, model, model.config, meta, self.tokenizer, extra)
        except (OSError, SafetensorError) as error:  # a full disk is either
            raise UserError(f"{path}: could not be written: {error}") from error

    def save_step(self, model: MedMoE, optimizer, named: dict[str, Tensor], step: int) -> None:
        """A checkpoint to go on from; the one before is removed only after this one is complete."""
        state = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, param in named.items():
            state |= {f"{key}.{name}": t for key, t in optimizer.state[param].items()}
        before = self.checkpoints()
        path = self.folder / f"phase{self.number}-step{step:07}"
        self.save(path, model, {"trainer": state}, step=step)
        self.remove(p for p in before if p != path)

    def remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            shutil.rmtree(path)

    def resume(self, model: MedMoE, optimizer, named: dict[str, Tensor]) -> int:
        """Fill model, optimizer and generators from the last checkpoint; returns its step, or 0."""
        if not (found := self.checkpoints()):
            return 0
        load_checkpoint(model, found[-1])
        state = dict(open_tensors(found[-1] / "trainer.safetensors"))
        torch.set_rng_state(state.pop("rng.cpu"))
        if "rng.cuda" in state:
            torch.cuda.set_rng_state(state.pop("rng.cuda"), self.device)
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if name not in named:
                raise UserError(f"{found[-1]}: trained {name}, which this run freezes")
            optimizer.state[named[name]][kind] = tensor.to(self.device)
        step = read_meta(found[-1])[1]["step"]
        print(f"{self.title}: goes on from step {step}, {found[-1]}")
        return step

    def begin_log(self, first: int, n_steps: int, per_epoch: int, named: dict) -> None:
        """Drop what an interrupted run logged after its checkpoint, then say what begins."""
        self.path = self.folder / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [json.loads(line) for line in lines]
        kept = [r for r in records if r["phase"] != self.number or 0 <= r.get("step", -1) < first]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        trained = sum(p.numel() for p in named.values())
        self.log(begins=first, steps=n_steps, steps_per_epoch=per_epoch, trained=trained,
                 flags=to_dict(self.flags), device=str(self.device), dtype=str(self.dtype),
                 torch=torch.__version__, names=sorted(named))  # fmt: skip

    def log(self, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"phase": self.number, **values}) + "\n")
