"""--cache-features: the frozen tower's features of each image, kept in this process's memory.

However often a phase comes back to an image, it passes the tower once.

Shapes: n images, S image side, P patches, W tower width.
"""

import hashlib

import torch
from torch import Tensor

from config import TrainConfig, UserError, warn_once
from model import MedMoE
from vision import VisionTower


def check_cache(flags: TrainConfig) -> None:
    """Raise UserError where --cache-features makes no sense."""
    if flags.cache_features and flags.jitter:
        raise UserError("--cache-features: --jitter (which --tune-vision implies) varies the "
                        "images, so that none comes twice: add --no-jitter")  # fmt: skip
    if flags.cache_gb <= 0:
        raise UserError(f"--cache-gb {flags.cache_gb}: must be above 0")


class CachedTower(VisionTower):
    """A tower that remembers the features of the images it has seen, up to `room` bytes."""

    known: dict[bytes, Tensor]  # hash of an image -> (P, W), on the CPU
    room: float

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) CLIP-normalised -> (n, P, W); those that are new pass it in one batch."""
        if not len(images):
            return super().forward(images)
        keys = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in images]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        computed = super().forward(images[list(new.values())]) if new else []
        fresh = dict(zip(new, computed, strict=True))
        for key, features in fresh.items():
            if features.nbytes > self.room:
                warn_once("--cache-gb is reached: more images pass the tower each time")
                break
            self.known[key] = features.cpu().clone()  # a view would keep the whole batch
            self.room -= features.nbytes
        rows = (fresh[key] if key in fresh else self.known[key] for key in keys)
        return torch.stack([row.to(images.device) for row in rows])


def cache_features(model: MedMoE, flags: TrainConfig, n_processes: int) -> None:
    """Apply --cache-features to a model that is on its device. A tower that is trained is not."""
    if not flags.cache_features:
        return
    if any(p.requires_grad for p in model.vision.parameters()):
        print("  --cache-features: this phase trains the tower, so it keeps nothing")
        return
    model.vision.__class__ = CachedTower
    model.vision.known, model.vision.room = {}, flags.cache_gb * 1e9 / n_processes
