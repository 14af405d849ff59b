"""Is an image like those that a checkpoint was trained on? Out-of-distribution detection.

An image's features are the mean and the standard deviation, over its patches, of what the tower
makes of them. Their Mahalanobis distance to the training images' (Lee et al. 2018) is compared with
what 99 % of held-out images stay below. A phase measures both when it is saved, for chat.py.

Shapes: n images, S image side, P patches, W tower width.
"""

import random
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from config import TrainConfig, UserError, warn_once
from data import Sample
from model import MedMoE, autocast
from sources.images import Images
from sources.load import has_splits, load_samples, reading
from sources.tensorfiles import open_tensors
from vision import normalise

FILE = "image_features"
N_TRAINED, N_HELD_OUT = 500, 200  # images that are measured at most
LEAST = 50  # of either; fewer tell nothing about 1 %
# To the covariance, this share of its mean variance: 500 images do not fill 2 W dimensions. Of
# SLAKE's images 0 to 1.5 % then pass for phantoms in `tiny`; at 0.1, 5 to 10 % do.
SHRINK = 1e-3
KEPT = 0.99  # of held-out images are below the limit


@torch.no_grad()
def image_features(model: MedMoE, images: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, 2 W) float64, on the CPU."""
    patches = model.vision(normalise(images)).cpu().double()  # (n, P, W)
    return torch.cat([patches.mean(dim=1), patches.std(dim=1, correction=0)], dim=1)


def fit(trained: Tensor, held_out: Tensor) -> dict[str, Tensor]:
    """Features (n, 2 W) of either -> what distance() needs, and its limit."""
    covariance = trained.T.cov()  # (2 W, 2 W)
    size, variance = len(covariance), covariance.diag().mean()
    covariance = (1 - SHRINK) * covariance + (SHRINK * variance + 1e-12) * torch.eye(size)
    inverse = torch.linalg.inv(covariance)
    known = {"mean": trained.mean(dim=0), "whiten": torch.linalg.cholesky(inverse)}
    known["limit"] = distance(held_out, known).quantile(KEPT)
    return {name: tensor.float() for name, tensor in known.items()}


def distance(features: Tensor, known: dict[str, Tensor]) -> Tensor:
    """Features (n, 2 W) -> their Mahalanobis distances to the training images', (n,)."""
    mean, whiten = known["mean"].double(), known["whiten"].double()
    return ((features - mean) @ whiten).norm(dim=1)


def choose(samples: list[Sample], flags: TrainConfig) -> tuple[list[Sample], list[Sample]]:
    """One sample each of some training images and of some held-out ones, in a fixed random order.

    Held out is the val split. Where a source has none, a third of the training images is left out.
    """

    def different(some: list[Sample]) -> list[Sample]:
        found = list({s.image: s for s in some if s.image is not None}.values())
        return random.Random(0).sample(found, len(found))

    trained, held_out = different(samples), []
    if len(trained) >= LEAST and all(map(has_splits, flags.data)):
        with suppress(UserError):  # training needs no val split
            held_out = different(load_samples(flags.data, "vqa", "val", **reading(flags)))
    if {s.source for s in held_out} != {s.source for s in trained}:
        n = min(len(trained) // 3, N_HELD_OUT)
        held_out, trained = trained[:n], trained[n:]
    return trained[:N_TRAINED], held_out[:N_HELD_OUT]


def measure(
    model: MedMoE, samples: list[Sample], flags: TrainConfig, device: torch.device,
    dtype: torch.dtype,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """{FILE: tensors} for the checkpoint of a model trained on these samples.

    {} for too few images. Every process computes the same.
    """
    chosen = choose(samples, flags)
    if min(map(len, chosen)) < LEAST:
        return {}
    images = Images(model.config.vision.image_size, workers=flags.workers)
    images.prefetch(sample for part in chosen for sample in part)
    try:
        pixels = [torch.stack([images.get(s) for s in part]) for part in chosen]
    except UserError as error:  # a held-out image: nothing that was trained may be lost for it
        warn_once(f"{error}: chat.py will not know which images are unlike the trained ones")
        return {}
    if is_sharded := hasattr(model, "unshard"):  # the tower is trained by several processes
        model.unshard()
    features: list[list[Tensor]] = [[], []]
    with autocast(device, dtype):
        for found, part in zip(features, pixels, strict=True):
            found += [image_features(model, some.to(device)) for some in part.split(50)]
    if is_sharded:
        model.reshard()
    return {FILE: fit(*map(torch.cat, features))}


def read(directory: Path) -> dict[str, Tensor] | None:
    """What measure() gave for a checkpoint that load_model has verified; None: nothing."""
    file = directory / f"{FILE}.safetensors"
    return dict(open_tensors(file)) if file.is_file() else None


def unlike(model: MedMoE, image: Tensor, known: dict[str, Tensor] | None) -> str:
    """A sentence if an image (3, S, S) uint8 is beyond the limit, else "". known None: ""."""
    if known is None:
        return ""
    far, limit = float(distance(image_features(model, image[None]), known)), float(known["limit"])
    if far <= limit:
        return ""
    return (f"This image is unlike the images that the model was trained on (distance {far:.1f}; "
            f"{KEPT:.0%} of held-out ones are below {limit:.1f}).")  # fmt: skip
