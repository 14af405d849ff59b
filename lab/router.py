"""How well the router classifies modality, what it does with unknown images, and what that changes.

    python -m lab.router runs/tiny/phase3                    on its own held-out questions
    python -m lab.router runs/tiny/phase3 --break-router     the same report of a broken router

Accuracy: mean logits over prompt and layers, as in eval.py; calibration of the largest probability.
Unknown images: blank, noise, inverted, scrambled, and those of --others; then a router retrained
without one modality. Information: mutual information of the chosen expert and the modality.
Answers, for the first --limit images: with the router's own routing, with the true modality's
expert or a wrong one forced at the router's own gate values, with each expert alone, without each.

--break-router is the control: the router is retrained on the checkpoint's own hidden states with
the labels shuffled among the images. What then stays as good does not depend on the router.
Intervals are 95 %: Wilson's for shares, else a bootstrap over images. Letters as in config.py.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from checkpoint import load_model
from config import Common, UserError, argument, flag
from data import Sample
from engine.cli import at_least, check_writable, parse, user_errors, write_json
from eval import Predictor, load_questions
from lab.router_measures import answered, informed, levels, naming, unknown
from lab.router_probe import ByImage, labelled, leave_out, probe, set_routers, shuffled
from lab.router_show import draw_reliability, show
from lab.tables import clean
from model import choose_device, sparse_layers
from router_training import train_router
from sources.load import how_read, load_samples, reading


@dataclass(frozen=True)
class RouterConfig(Common):
    """Report on a checkpoint's router."""

    checkpoint: str = argument("DIR of a finished phase 3")
    split: Literal["test", "val"] = flag("test", "which questions")
    limit: int | None = flag(100, "images for the parts that answer questions, 13 times each")
    others: tuple[str, ...] = flag((), "a SOURCE of images that it was not trained on; repeatable")
    router_images: int = flag(400, "images for the routers that are retrained")
    bins: int = flag(10, "of the reliability table")
    break_router: bool = flag(False, "report on a router retrained on shuffled labels")
    png: str | None = flag(None, "draw the reliability table to this FILE.png")


def read_questions(flags: RouterConfig, known: dict) -> tuple[RouterConfig, list[Sample]]:
    """The split's questions that have an image; without --data those of the checkpoint."""
    n_images = flags.limit  # of some parts only
    flags, samples = load_questions(replace(flags, limit=None), known)
    samples = [s for s in samples if s.image is not None]
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: no images in its {flags.split} split")
    return replace(flags, limit=n_images), samples


def spread_images(samples: list[Sample], n: int) -> list[Sample]:
    """All questions of known modality about n images, spread evenly over those there are."""
    images = list(dict.fromkeys(s.image for s in samples if s.modality))
    wanted = {images[i] for i in np.linspace(0, len(images) - 1, min(n, len(images))).astype(int)}
    return [s for s in samples if s.image in wanted and s.modality]


def retrain(predictor: Predictor, flags: RouterConfig, samples: list[Sample]) -> dict | None:
    """--break-router, if set; and the report on routers retrained without one modality each."""
    try:
        training = load_samples(flags.data, "vqa", "train", **reading(flags))
    except UserError as error:
        if flags.break_router:
            raise
        print(f"no router is retrained: {error}")
        return None
    if not any(s.modality for s in training) or not any(s.modality for s in samples):
        if flags.break_router:
            raise UserError(
                "--break-router: the training images have no modality labels to shuffle"
            )
        return None
    n_experts = predictor.model.config.moe.n_experts
    parts = [
        labelled(predictor, part, flags.router_images, flags.seed) for part in (training, samples)
    ]
    train, test = (tuple(t.cpu() for t in part) for part in parts)
    if flags.break_router:
        train = shuffled(train, flags.seed)
        set_routers(predictor, train_router(train, test, n_experts, flags.seed)[0])
    return leave_out(train, test, n_experts, flags.seed)


def report(predictor: Predictor, flags: RouterConfig, samples: list[Sample]) -> dict:
    """All parts; those that need modalities are None where there are none."""
    config = predictor.model.config
    blocks = sparse_layers(config, config.moe)
    left_out = retrain(predictor, flags, samples)
    others = load_samples(flags.others, "vqa", flags.split, lang="en") if flags.others else []
    images, found = ByImage(samples), probe(predictor, samples)
    part = spread_images(samples, flags.limit)
    refused = None
    try:
        answers = answered(predictor, part, flags.seed) if part else None
    except UserError as error:
        answers, refused = None, str(error)
    return {
        "n_questions": len(samples), "n_images": len(images.images),
        "blocks": list(blocks), "experts": config.moe.n_experts,
        "naming": naming(images, found, flags.bins),
        "levels": levels(images, found, blocks),
        "information": informed(images, found, blocks),
        "unknown": unknown(predictor, samples, [s for s in others if s.image is not None]),
        "left_out": left_out,
        "forced_routing": answers, "refused": refused,
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
    predictor = Predictor(model, text, device, dtype, flags.batch_size or 64)
    words = sys.argv[1:] if argv is None else argv
    result = report(predictor, flags, samples) | {
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
