"""Does the router know the modality, what does it do where it cannot, and does it matter?

    python -m lab.router runs/tiny/phase3                    on its own held-out questions
    python -m lab.router runs/tiny/phase3 --break-router     the same report of a broken router

Naming: mean logits over prompt and layers, as eval.py; calibration of the largest probability.
Unknown pictures: blank, noise, inverted, scrambled, and those of --others; then a router trained
anew without one modality. Information: what an expert that is visited tells of the modality.
Answers, of the first --limit pictures: own routes, the true modality's expert and a wrong one with
the router's own gate values, each expert alone, each taken away.

--break-router is the control: the router is trained anew on the checkpoint's own hidden states, its
labels shuffled among the pictures. Whatever then stays as good does not depend on the router.
Intervals are 95 %: Wilson's for shares, else a bootstrap by picture. Letters as in config.py.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asking import Asker, load_questions
from checkpoint import load_model
from config import UserError
from flags import (
    Common,
    argument,
    at_least,
    check_writable,
    flag,
    how_read,
    parse,
    reading,
    user_errors,
    write_json,
)
from lab.router_measures import answered, informed, levels, naming, unknown
from lab.router_probe import Pictures, labelled, leave_out, probe, put, shuffled
from lab.router_show import draw_reliability, show
from lab.tables import clean
from model import choose_device, sparse_layers
from records import Sample
from router_training import train_router
from sources import load_samples


@dataclass(frozen=True)
class RouterConfig(Common):
    """Report on a checkpoint's router."""

    checkpoint: str = argument("DIR of a finished phase 3")
    split: Literal["test", "val"] = flag("test", "which questions")
    limit: int | None = flag(100, "pictures for the parts that answer questions, 13 times each")
    others: tuple[str, ...] = flag((), "another SOURCE of pictures, unknown to it; repeatable")
    router_images: int = flag(400, "pictures for the routers that are trained anew")
    bins: int = flag(10, "of the reliability table")
    break_router: bool = flag(False, "report on a router trained on shuffled labels instead")
    png: str | None = flag(None, "draw the reliability table to this FILE.png")


def read_questions(flags: RouterConfig, known: dict) -> tuple[RouterConfig, list[Sample]]:
    """The questions of the split that show a picture; without --data those of the checkpoint."""
    n_pictures = flags.limit  # which limits some parts only
    flags, samples = load_questions(replace(flags, limit=None), known)
    samples = [s for s in samples if s.image is not None]
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: no pictures in its {flags.split} split")
    return replace(flags, limit=n_pictures), samples


def first_pictures(samples: list[Sample], n: int) -> list[Sample]:
    """All questions of known modality about n pictures, spread evenly over those there are."""
    images = list(dict.fromkeys(s.image for s in samples if s.modality))
    wanted = {images[i] for i in np.linspace(0, len(images) - 1, min(n, len(images))).astype(int)}
    return [s for s in samples if s.image in wanted and s.modality]


def train_anew(asker: Asker, flags: RouterConfig, samples: list[Sample]) -> dict | None:
    """Break the router if that is asked for; and routers that never saw one of the modalities."""
    try:
        seen = load_samples(flags.data, "vqa", "train", **reading(flags))
    except UserError as error:
        if flags.break_router:
            raise
        print(f"no router is trained anew: {error}")
        return None
    if not any(s.modality for s in seen) or not any(s.modality for s in samples):
        if flags.break_router:
            raise UserError("--break-router: the training pictures have no modality to shuffle")
        return None
    n_experts = asker.model.config.moe.n_experts
    parts = [labelled(asker, part, flags.router_images, flags.seed) for part in (seen, samples)]
    train, test = (tuple(t.cpu() for t in part) for part in parts)
    if flags.break_router:
        train = shuffled(train, flags.seed)
        put(asker, train_router(train, test, n_experts, flags.seed)[0])
    return leave_out(train, test, n_experts, flags.seed)


def report(asker: Asker, flags: RouterConfig, samples: list[Sample]) -> dict:
    """All parts; those that need modalities are None where there are none."""
    config = asker.model.config
    blocks = sparse_layers(config, config.moe)
    anew = train_anew(asker, flags, samples)
    others = load_samples(flags.others, "vqa", flags.split, lang="en") if flags.others else []
    pictures, found = Pictures(samples), probe(asker, samples)
    part = first_pictures(samples, flags.limit)
    refused = None
    try:
        answers = answered(asker, part, flags.seed) if part else None
    except UserError as error:
        answers, refused = None, str(error)
    return {
        "n_questions": len(samples), "n_pictures": len(pictures.images),
        "blocks": list(blocks), "experts": config.moe.n_experts,
        "naming": naming(pictures, found, flags.bins),
        "levels": levels(pictures, found, blocks),
        "information": informed(pictures, found, blocks),
        "unknown": unknown(asker, samples, [s for s in others if s.image is not None]),
        "left_out": anew,
        "on_routes": answers, "refused": refused,
    }  # fmt: skip


@user_errors
def main(argv: list[str] | None = None) -> dict[str, Any]:
    flags = parse(RouterConfig, argv, "python -m lab.router")
    at_least(flags, limit=1, bins=2, router_images=20, batch_size=1, max_missing=0)
    for file in (flags.json, flags.png):
        if file:
            check_writable(Path(file))
    device, dtype = choose_device(flags.device, flags.dtype)
    model, text, meta = load_model(Path(flags.checkpoint), device, dtype)
    if model.config.moe is None:
        raise UserError(f"{flags.checkpoint}: is dense, it has no router")
    flags, samples = read_questions(flags, how_read(meta["flags"], Path(flags.checkpoint)))
    asker = Asker(model, text, device, dtype, flags.batch_size or 64)
    words = sys.argv[1:] if argv is None else argv
    result = report(asker, flags, samples) | {
        "checkpoint": flags.checkpoint, "data": list(flags.data), "split": flags.split,
        "seed": flags.seed, "broken": flags.break_router, "device": str(device),
        "dtype": str(dtype),
        "command": shlex.join(["python", "-m", "lab.router", *words]),
    }  # fmt: skip
    show(result)
    if flags.png:
        draw_reliability(result["naming"], Path(flags.png))
    if flags.json:
        write_json(Path(flags.json), clean(Path(flags.json), result))
    return result


if __name__ == "__main__":
    main()
