"""What lab.report finds beside a checkpoint: its run's log, earlier points, tables of ablations."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import load_model
from config import UserError
from data import Sample
from engine.run import read_log
from eval import Predictor
from model import MedMoE, autocast, make_sparse
from routers import Hints
from sources.records import read_json

N_FOLLOWED = 64  # questions whose prompts are routed at every earlier point


def read_steps(checkpoint: Path, phase: int) -> list[dict]:
    """The steps of this phase in the log.jsonl of the checkpoint's run; [] if there is none."""
    records = read_log(checkpoint.absolute().parent / "log.jsonl")
    steps = [r for r in records if isinstance(r, dict) and r.get("phase") == phase]
    return [r for r in steps if isinstance(r.get("step"), int) and is_finite(r.get("loss"))]


def is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def balance(load: Sequence[Sequence[float]]) -> dict[str, float]:
    """Load (L, E) -> CV, standard deviation over mean, and MaxVio, largest load over mean, minus 1.

    Each is 0 when balanced; means over the layers. MaxVio: Wang et al. 2024, arXiv 2408.15664.
    """
    table = torch.tensor(load, dtype=torch.float64)  # (L, E)
    mean = table.mean(dim=1)  # (L,)
    mean = mean.where(mean > 0, torch.ones_like(mean))
    cv = table.std(dim=1, correction=0) / mean
    return {"cv": float(cv.mean()), "max_vio": float((table.amax(dim=1) / mean - 1).mean())}


@torch.inference_mode()
def first_experts(predictor: Predictor, samples: Sequence[Sample]) -> Tensor:
    """The expert with the largest gate, (L, N) over the real positions of the prompts."""
    found = []
    for _, batch in predictor.batches(samples, "saturation"):
        hints = Hints(prompt=batch.mask, modality=batch.modality)
        with autocast(predictor.device, predictor.dtype):
            _, routings = predictor.model(batch.ids, batch.mask, batch.images, hints)
        gates = torch.stack([r.gates for r in routings])  # (L, B, T, E)
        found.append(gates[:, batch.mask].argmax(dim=-1).cpu())
    return torch.cat(found, dim=1)


def start_of_phase_3(checkpoint: Path, final: MedMoE, predictor: Predictor) -> MedMoE | None:
    """Phase 2's model with the final routers in it, which is the start of phase 3.

    None where that is not known: the run's phase 2 is missing, or the routers were trained.
    """
    source = checkpoint.absolute().parent / "phase2"
    routers = [block.mlp.router for block in final.decoder.blocks if block.is_sparse]
    if not (source / "config.json").is_file() or not all(router.frozen for router in routers):
        return None
    model, _, _ = load_model(source, torch.device("cpu"), torch.float32)
    if model.config.decoder != final.config.decoder or model.config.moe is not None:
        return None
    make_sparse(model, final.config.moe)
    copies = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
    for copy, router in zip(copies, routers, strict=True):
        copy.load_state_dict(router.state_dict())
        copy.level = router.level
    return model.eval().to(predictor.device)


def saturation(
    checkpoint: Path, meta: dict, predictor: Predictor, samples: Sequence[Sample]
) -> list[dict]:
    """Earlier points -> {"step", "same": (L,) share of the tokens with their final first expert}.

    After Muennighoff et al. 2024 (OLMoE, section 5.1), over the prompts of N_FOLLOWED questions.
    """
    final = predictor.model
    if final.config.moe is None or meta["phase"] != 3:
        return []
    every = max(1, len(samples) // N_FOLLOWED)
    part = samples[::every][:N_FOLLOWED]
    last = first_experts(predictor, part)  # (L, N)
    found = []

    def compare(step: int, model: MedMoE) -> None:
        other = Predictor(
            model, predictor.text, predictor.device, predictor.dtype, predictor.batch_size
        )
        same = (first_experts(other, part) == last).double().mean(dim=1)
        found.append({"step": step, "same": same.tolist(), "tokens": last.shape[1]})

    if "from" not in meta and (model := start_of_phase_3(checkpoint, final, predictor)):
        compare(0, model)
    for folder in sorted(checkpoint.absolute().parent.glob("phase3-step*")):
        if folder.name.removeprefix("phase3-step").isdecimal() and folder != checkpoint.absolute():
            model, _, theirs = load_model(
                folder, predictor.device, predictor.dtype, final.config.moe.router
            )
            if theirs["flags"]["seed"] == meta["flags"]["seed"] and (
                model.config.moe == final.config.moe
            ):
                compare(int(folder.name.removeprefix("phase3-step")), model)
    return found


def read_ablations(folder: Path) -> list[dict]:
    """Every table of ablations in the folder; [] if there is none. Raises UserError for another."""
    tables = []
    for file in sorted(folder.glob("*.json")):
        table = read_json(file)
        try:
            rows = [check_row(row) for row in table["rows"]]
            name, seeds = str(table["name"]), [int(seed) for seed in table["seeds"]]
            tables.append({"name": name, "command": str(table["command"]), "seeds": seeds,
                           "rows": rows})  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file}: is no table of ablations: {error!r}") from error
    return tables


def check_row(row: Any) -> dict:
    """Raises KeyError, TypeError or ValueError for a row that lacks something."""
    against = row.get("against")
    if against is not None:
        low, high = map(float, against["ci95"])
        against = {"row": str(against["row"]), "difference": float(against["difference"]),
                   "ci95": [low, high]}  # fmt: skip
    scores = {}
    for part in ("together", "closed", "open"):
        found = row[part]
        sd = found.get("sd")
        scores[part] = {"mean": float(found["mean"]), "sd": None if sd is None else float(sd)}
    counts = {name: int(row["parameters"][name]) for name in ("total", "activated")}
    return {"title": str(row["title"]), "group": str(row.get("group", "")), "row": str(row["row"]),
            "n_seeds": int(row["n_seeds"]), "against": against, "parameters": counts,
            **scores}  # fmt: skip
