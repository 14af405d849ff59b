"""One seed of a score, in a child process: train phase 3 with a submission, then measure.

    python -m course.trial FOLDER/job.json      started by course.score through contain.run_job

FOLDER holds the submission as contain.FILE; result.json is written there last. Everything runs on
one thread in fp32 on the CPU, so that the same job gives the same numbers on the same machine.

Shapes: B batch, T positions, L sparse layers, E experts, M modalities.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # before the snapshot: the first step imports it, which changes torch
import torch.nn.functional as F
from torch import Tensor

import config
import train
from checkpoint import load_model, read_config
from config import MODALITIES, UserError, one_line
from course import contain
from data import Dataset, Sample, Text
from eval import Predictor
from metrics import split_by
from model import MedMoE, count_parameters
from routers import Router, get_router
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
    total, n_tokens, n_real, dropped = 0.0, 0, 0, 0
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
    return {"val_loss": total / n_tokens, **balance(load, n_real, dropped), "n_real": n_real}


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
        "load": load.sum(dim=1).tolist(),  # (M, E)
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
    found |= {"facts": None, "closed": None, "open": None}
    if all(router.causal for router in routers):  # generate() refuses the others
        answers = [
            p.answer for p in Predictor(model, text, CPU, torch.float32).answer(part["test"])
        ]
        parts = split_by(part["test"], answers, lambda s: f"{s.kind == 'sign'} {s.answer_type}")
        found |= {"facts": parts["True open"]["open_recall"],
                  "closed": parts["False closed"]["closed_accuracy"],
                  "open": parts["False open"]["open_recall"]}  # fmt: skip
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
    refusals, before = contain.guard(folder, file), contain.snapshot()
    spec = f"{file}:{job['class']}" if file.read_text() else job["class"]  # or one of ours
    try:
        write_stage(folder, "importing the submission")
        if spec != job["class"]:
            check_class(get_router(spec))
        write_stage(folder, "training")
        checkpoint = train_phase_3(job, folder, spec)
        write_stage(folder, "measuring")
        result = measure(job, checkpoint, spec) | {"tokens_per_s": speed(folder / "run/log.jsonl")}
        refused = ""
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
