"""One seed of a score, in a child process: train phase 3 with a submission, then measure.

    python -m course.trial FOLDER/job.json      started by course.score through contain.run_job

FOLDER holds the submission as contain.FILE; result.json is written there last. Everything runs on
one thread in fp32 on the CPU, so that the same job gives the same numbers on the same machine.

Shapes: B batch, T positions, S steps, L sparse layers, E experts, M modalities.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch._dynamo  # before the snapshot: the first step imports it, which changes torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import config
import train
from checkpoint import load_model, read_config
from config import MODALITIES, UserError, one_line
from course import contain
from data import Batch, Dataset, Sample, Text
from decoder import Cache
from eval import Predictor
from metrics import split_by
from model import MedMoE, count_parameters
from routers import Hints, Router, Routing, get_router
from sources.images import Images
from sources.load import load_samples

CPU = torch.device("cpu")


def write_stage(folder: Path, name: str) -> None:
    (folder / "stage.txt").write_text(name)


def check_class(cls: type[Router]) -> None:
    """The rules of course.vet about needs and methods, on the class itself. Raises UserError."""
    if "modality" in cls.needs:
        raise UserError(": needs the true modality, which a graded router must not use")
    for name in ("forward", "__call__", "_call_impl", "__getattr__", "__getattribute__"):
        if getattr(cls, name, None) is not getattr(Router, name, None):
            raise UserError(f": replaces Router.{name}; override `gate` instead")


class TrainingLoad:
    """Counts, in a forward hook, to which experts the routers send tokens in training."""

    def __init__(self):
        self.n_real = self.dropped = 0  # real tokens of all layers; those that no expert gets
        self.loads: list[Tensor] = []  # (E,) of each call: tokens of each expert / real tokens

    def hook(self, module: nn.Module, args: tuple, routing: Routing) -> None:
        if isinstance(module, Router) and module.training:
            mask = args[1]  # (B, T)
            is_routed = (routing.gates != 0) & mask[..., None]  # (B, T, E)
            n_real = int(mask.sum())
            self.n_real += n_real
            self.dropped += n_real - int(is_routed.any(dim=-1).sum())
            self.loads.append(is_routed.sum(dim=(0, 1)) / n_real)

    def columns(self, n_steps: int) -> dict:
        """max_vio: its mean over the layers and the steps of each third of the training."""
        load = torch.stack(self.loads).view(n_steps, -1, self.loads[0].numel())  # (S, L, E)
        max_vio = (load.amax(dim=-1) / load.mean(dim=-1).clamp(min=1e-12) - 1).mean(dim=1)  # (S,)
        bounds = [n_steps * third // 3 for third in range(4)]
        start, middle, end = (
            max_vio[first : max(last, first + 1)].mean().item() for first, last in pairwise(bounds)
        )
        return {
            "dropped_in_training": self.dropped / self.n_real,
            "max_vio_start": start, "max_vio_middle": middle, "max_vio_end": end,
            "load_by_step": load[:: max(1, n_steps // 30)].double().round(decimals=3).tolist(),
        }  # fmt: skip


def train_phase_3(job: dict, folder: Path, spec: str) -> Path:
    """From the common checkpoint, for a fixed number of steps -> the new checkpoint."""
    flags = {
        "phase": 3, "preset": "scored", "init": job["init"], "out": str(folder / "run"),
        "data": job["data"], "router": spec, "seed": job["seed"], "steps": job["steps"],
        "batch-size": job["batch_size"], "lr": job["lr"], "experts": job["experts"],
        "top-k": job["top_k"], "device": "cpu", "dtype": "float32", "workers": 0,
        "save-every": 10**6,
    }  # fmt: skip
    # Without user_errors, which would hide the traceback with the submission's line.
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    train.main.__wrapped__([*argv, "--no-eval", "--no-jitter", "--no-tune-vision", "--overwrite"])
    return folder / "run" / "phase3"


def first_images(samples: Sequence[Sample], n: int) -> list[Sample]:
    """All questions about the first n images."""
    wanted = set(list(dict.fromkeys(s.image for s in samples))[:n])
    return [s for s in samples if s.image in wanted]


@torch.no_grad()
def validate(model: MedMoE, text: Text, samples: Sequence[Sample]) -> dict:
    """Mean loss over the answers' tokens, and the balance of the load over all real tokens."""
    images = Images(model.config.vision.image_size)
    data = Dataset(samples, text, model.config, plain=False, images=images)
    order = sorted(range(len(samples)), key=data.lengths.__getitem__)
    total, n_tokens, n_real, dropped, largest = 0.0, 0, 0, 0, 0.0
    load: Tensor | float = 0.0  # (M, L, E)
    for start in range(0, len(order), 64):
        batch = data.batch(order[start : start + 64])
        out = model.loss(batch)
        total, n_tokens = total + out.total.item(), n_tokens + out.n_tokens
        is_routed = torch.stack([r.gates != 0 for r in out.routings], dim=1)  # (B, L, T, E)
        is_routed = is_routed & batch.mask[:, None, :, None]
        n_real += int(batch.mask.sum())
        dropped += int((batch.mask[:, None] & ~is_routed.any(dim=-1)).sum())
        modality = F.one_hot(batch.modality.clamp(min=0), len(MODALITIES)).double()  # (B, M)
        load = load + torch.einsum("bm,ble->mle", modality, is_routed.sum(dim=2).double())
        largest = max(largest, *(r.logits[batch.mask].abs().max().item() for r in out.routings))
    every = max(1, len(samples) // 64)
    changed, compared = zip(
        *(leak(model, data.batch([i])) for i in range(0, len(samples), every)), strict=True
    )
    return {
        "val_loss": total / n_tokens, **balance(load, n_real, dropped), "n_real": n_real,
        "largest_logit": largest, "leak": sum(changed) / sum(compared),
    }  # fmt: skip


def leak(model: MedMoE, batch: Batch) -> tuple[int, int]:
    """How many positions of a sample are routed differently in decoding than in training.

    The sample's tokens are given to the model all at once, as in training, and one by one after
    the prompt, as in decoding, with the same answer. Compared are the positions that predict the
    answer, in each sparse layer: do their gates differ by over 0.001? -> how many do, of how many.
    """
    is_prompt = batch.prompt()  # (1, T)
    hints, n_prompt = Hints(prompt=is_prompt, modality=batch.modality), int(is_prompt.sum())
    _, at_once = model(batch.ids, batch.mask, batch.images, hints)
    cache, differ = Cache(len(model.decoder.blocks)), []
    ends = range(n_prompt, batch.ids.shape[1])
    for start, end in pairwise([0, *ends]):
        ids, images = batch.ids[:, start:end], batch.images[: 1 if start == 0 else 0]
        now = hints._replace(prompt=is_prompt[:, :end] if start == 0 else None)
        _, routings = model(ids, torch.ones_like(ids, dtype=torch.bool), images, now, cache)
        for whole, one in zip(at_once, routings, strict=True):
            gates = whole.gates[0, end - 1], one.gates[0, -1]  # both (E,)
            differ.append(not torch.allclose(*gates, rtol=0, atol=1e-3))
    return sum(differ), len(differ)


def balance(load: Tensor, n_real: int, dropped: int) -> dict:
    """load (M, L, E) token counts -> the columns about balance, means over the sparse layers.

    CV is the standard deviation of the load over the experts, divided by the mean (Shazeer et al.
    2017); MaxVio is the largest load divided by the mean, minus 1 (Wang et al. 2024). Both are 0
    at perfect balance.
    """
    each = load.sum(dim=0)  # (L, E)
    mean = each.mean(dim=1).clamp(min=1e-12)  # (L,)
    return {
        "load_cv": (each.std(dim=1, correction=0) / mean).mean().item(),
        "max_vio": ((each.amax(dim=1) / mean) - 1).mean().item(),
        "dead": int((each == 0).sum()),
        "experts": each.numel(),
        "dropped": dropped / (n_real * len(each)),
        "experts_per_token": (each.sum() / (n_real * len(each))).item(),
        "load": load.tolist(),
    }


def activated(model: MedMoE, experts_per_token: float) -> int:
    """Parameters used per token on average: all but the experts, and the chosen experts."""
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    rest = count_parameters(model)["total"] - experts
    return round(rest + experts * experts_per_token / model.config.moe.n_experts)


def measure(job: dict, checkpoint: Path, spec: str) -> dict:
    model, text, _ = load_model(checkpoint, CPU, torch.float32, spec)
    part = {split: first_images(load_samples([job["data"]], "vqa", split), job["eval_images"])
            for split in ("val", "test")}  # fmt: skip
    found = validate(model, text, part["val"])
    routers = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
    found |= {"facts": None, "closed": None, "open": None, "experts_per_question": None}
    if all(router.causal for router in routers):  # generate() refuses the others
        predictions = Predictor(model, text, CPU, torch.float32).answer(part["test"])
        answers = [p.answer for p in predictions]
        used = torch.stack([p.load for p in predictions]) > 0  # (n, L, E), in prompt and answer
        parts = split_by(part["test"], answers, lambda s: f"{s.kind == 'sign'} {s.answer_type}")
        found |= {"facts": parts["True open"]["open_recall"],
                  "closed": parts["False closed"]["closed_accuracy"],
                  "open": parts["False open"]["open_recall"],
                  "experts_per_question": used.sum(dim=-1).double().mean().item()}  # fmt: skip
    return found | {"activated": activated(model, found["experts_per_token"])}


def speed(log: Path) -> float:
    """Tokens per second of a training step, the median."""
    records = map(json.loads, log.read_text().splitlines())
    return statistics.median(r["tokens_per_s"] for r in records if "tokens_per_s" in r)


def watch(job: dict, folder: Path) -> dict:
    """Import, train and measure under guard -> the numbers, or {"refused": reason}."""
    file = folder / contain.FILE
    # The model's sizes come from the checkpoint; steps, learning rate and batch from the job.
    found, _ = read_config(Path(job["init"]))
    config.PRESETS["scored"] = replace(config.PRESETS["tiny"], model=replace(found, moe=None))
    torch.optim.AdamW([torch.zeros(1)])  # before the snapshot: the first one changes its class
    refusals, before = contain.guard(folder, file), contain.snapshot()
    load = TrainingLoad()
    spec = f"{file}:{job['class']}" if file.read_text() else job["class"]  # or one of ours
    try:
        write_stage(folder, "importing the submission")
        if spec != job["class"]:
            check_class(get_router(spec))
        write_stage(folder, "training")
        with register_module_forward_hook(load.hook):
            checkpoint = train_phase_3(job, folder, spec)
        write_stage(folder, "measuring")
        result = measure(job, checkpoint, spec) | load.columns(job["steps"])
        result["tokens_per_s"], refused = speed(folder / "run/log.jsonl"), ""
    except UserError as error:
        result, refused = {}, f": {str(error).removeprefix(': ')}"
    except (Exception, SystemExit) as error:  # any error of the submission, reported with its line
        lines, trace = [], error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(file):
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        where = f", line {lines[-1]}: " if lines else ": "
        result, refused = {}, f"{where}{type(error).__name__}: {one_line(str(error), 300)}"
    if refusals:
        refused = refusals[0]
    elif patched := contain.changed(before):
        refused = f": changed {patched[0]}, which is not part of the router"
    return {"refused": refused} if refused else result


def main(path: str) -> None:
    job_file = Path(path)
    torch.set_num_threads(1)
    result = watch(json.loads(job_file.read_text()), job_file.parent)
    (job_file.parent / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # without running the submission's exit handlers


if __name__ == "__main__":
    main(sys.argv[1])
