"""One seed of a score, in a child process: train phase 3 with a submission, then measure.

    python -m course.trial FOLDER/job.json      course.score starts it, by contain.run_job

FOLDER holds the submission as contain.FILE; result.json is written there last. Everything is one
thread in fp32 on the CPU, so that the same job gives the same numbers on the same machine.

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
import torch._dynamo  # the first step would load it, and it changes torch as it loads
from torch import Tensor

import config
import train
from asking import Asker
from checkpoint import load_model, read_meta
from config import MODALITIES, UserError
from course import contain
from data import Dataset, Text
from model import MedMoE, count_parameters
from records import Sample, one_line
from routers import Router, get_router
from scoring import score
from sources import load_samples

CPU = torch.device("cpu")


def stage(folder: Path, words: str) -> None:
    (folder / "stage.txt").write_text(words)


def check_class(cls: type[Router]) -> None:
    """What vetting reads in the text, asked of the class itself. Raises UserError."""
    if "modality" in cls.needs:
        raise UserError(": needs the true modality, which a router that is graded may not")
    for name in ("forward", "__call__", "_call_impl", "__getattr__", "__getattribute__"):
        if getattr(cls, name, None) is not getattr(Router, name, None):
            raise UserError(f": replaces Router.{name}, which is given more than gate's inputs")


def train_phase_3(job: dict, folder: Path, spec: str) -> Path:
    """From the common checkpoint, for a fixed number of steps -> the new checkpoint."""
    flags = {
        "phase": 3, "preset": "scored", "init": job["init"], "out": str(folder / "run"),
        "data": job["data"], "router": spec, "seed": job["seed"], "steps": job["steps"],
        "batch-size": job["batch_size"], "lr": job["lr"], "experts": job["experts"],
        "top-k": job["top_k"], "device": "cpu", "dtype": "float32", "workers": 0,
        "save-every": 10**6,
    }  # fmt: skip
    # Without the wrapper that makes one line of an error: its traceback has the line to name.
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    train.main.__wrapped__([*argv, "--no-eval", "--no-jitter", "--no-tune-vision"])
    return folder / "run" / "phase3"


def first_pictures(samples: Sequence[Sample], n: int) -> list[Sample]:
    """All questions about the first n pictures."""
    wanted = set(list(dict.fromkeys(s.image for s in samples))[:n])
    return [s for s in samples if s.image in wanted]


@torch.no_grad()
def validate(model: MedMoE, text: Text, samples: Sequence[Sample]) -> dict:
    """Mean loss of an answer's token, and who visited whom over all real positions."""
    data = Dataset(samples, text, model.config, plain=False)
    order = sorted(range(len(samples)), key=data.lengths.__getitem__)
    total, n_tokens, n_real, dropped = 0.0, 0, 0, 0
    visits: Tensor | float = 0.0  # (M, L, E)
    for start in range(0, len(order), 64):
        batch = data.batch(order[start : start + 64])
        out = model.loss(batch)
        total, n_tokens = total + out.total.item(), n_tokens + out.n_tokens
        goes = torch.stack([r.gates != 0 for r in out.routings], dim=1)  # (B, L, T, E)
        goes = goes & batch.mask[:, None, :, None]
        n_real += int(batch.mask.sum())
        dropped += int((batch.mask[:, None] & ~goes.any(dim=-1)).sum())
        of = torch.nn.functional.one_hot(batch.modality.clamp(min=0), len(MODALITIES)).double()
        visits = visits + torch.einsum("bm,ble->mle", of, goes.sum(dim=2).double())
    return {"val_loss": total / n_tokens, **load(visits, n_real, dropped), "n_real": n_real}


def load(visits: Tensor, n_real: int, dropped: int) -> dict:
    """visits (M, L, E) counts -> the columns about balance, means over the sparse layers.

    CV is the standard deviation over the experts by their mean (Shazeer et al. 2017); MaxVio is
    the largest load by the mean, less 1 (Wang et al. 2024). 0 is perfect balance for both.
    """
    each = visits.sum(dim=0)  # (L, E)
    mean = each.mean(dim=1).clamp(min=1e-12)  # (L,)
    return {
        "load_cv": (each.std(dim=1, correction=0) / mean).mean().item(),
        "max_vio": ((each.amax(dim=1) / mean) - 1).mean().item(),
        "dead": int((each == 0).sum()),
        "slots": each.numel(),
        "dropped": dropped / (n_real * len(each)),
        "visits_per_token": (each.sum() / (n_real * len(each))).item(),
        "visits": visits.sum(dim=1).tolist(),  # (M, E)
    }


def activated(model: MedMoE, visits_per_token: float) -> int:
    """Parameters that a token passes on average: all but the experts, and what it visited."""
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    rest = count_parameters(model)["total"] - experts
    return round(rest + experts * visits_per_token / model.config.moe.n_experts)


def measure(job: dict, checkpoint: Path, spec: str) -> dict:
    model, text, _ = load_model(checkpoint, CPU, torch.float32, spec)
    part = {split: first_pictures(load_samples([job["data"]], "vqa", split), job["pictures"])
            for split in ("val", "test")}  # fmt: skip
    found = validate(model, text, part["val"])
    routers = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
    found |= {"closed": None, "open": None}
    if all(router.causal for router in routers):  # else generate() refuses
        answers = [p.answer for p in Asker(model, text, CPU, torch.float32).answer(part["test"])]
        scores = score(part["test"], answers)
        found |= {"closed": scores["closed_accuracy"], "open": scores["open_recall"]}
    return found | {"activated": activated(model, found["visits_per_token"])}


def speed(log: Path) -> float:
    """Tokens per second of a training step, the median."""
    records = map(json.loads, log.read_text().splitlines())
    return statistics.median(r["tokens_per_s"] for r in records if "tokens_per_s" in r)


def watch(job: dict, folder: Path) -> dict:
    """Import, train and measure under guard -> the numbers, or {"refused": a sentence's end}."""
    file = folder / contain.FILE
    # The checkpoint says which model it is; phase 3 takes steps, rate and batch from the job.
    found, _ = read_meta(Path(job["init"]))
    config.PRESETS["scored"] = replace(config.PRESETS["tiny"], model=replace(found, moe=None))
    noted, before = contain.guard(folder, file), contain.snapshot()
    spec = f"{file}:{job['class']}"
    try:
        stage(folder, "importing the submission")
        check_class(get_router(spec))
        stage(folder, "training")
        checkpoint = train_phase_3(job, folder, spec)
        stage(folder, "measuring")
        result = measure(job, checkpoint, spec) | {"tokens_per_s": speed(folder / "run/log.jsonl")}
        refused = ""
    except UserError as error:
        result, refused = {}, str(error)
    except (Exception, SystemExit) as error:  # whatever a submission raises is told, with its line
        lines, trace = [], error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(file):
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        where = f", line {lines[-1]}: " if lines else ": "
        result, refused = {}, f"{where}{type(error).__name__}: {one_line(str(error), 300)}"
    if noted:
        refused = noted[0]
    elif patched := contain.changed(before):
        refused = f": changed {patched[0]}, which is not its own"
    return {"refused": refused} if refused else result


def main(path: str) -> None:
    job_file = Path(path)
    torch.set_num_threads(1)
    result = watch(json.loads(job_file.read_text()), job_file.parent)
    (job_file.parent / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # nothing that a submission left for the end is run


if __name__ == "__main__":
    main(sys.argv[1])
