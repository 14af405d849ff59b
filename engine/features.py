"""The frozen tower's features of each image, kept on disk: an image passes the tower once.

    OUT/features/TOWER/IMAGE.safetensors    (P, W), and its crc in the header

TOWER is from the hash of the tower's weights and of its matmuls' dtype, IMAGE the hash of the
pixels after preprocessing. A file that does not match its crc, after a crash, is computed again.

Shapes: n images, S image side, P patches, W tower width.
"""

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import TrainConfig, UserError, warn_once
from engine.processes import Processes
from model import MedMoE
from vision import VisionTower


def check_cache(flags: TrainConfig) -> None:
    """Raise UserError where --cache-features makes no sense."""
    if flags.cache_features and flags.jitter:
        raise UserError("--cache-features: --jitter (which --tune-vision implies) varies the "
                        "images, so that none comes twice: add --no-jitter")  # fmt: skip
    if not flags.cache_gb > 0:  # a NaN too
        raise UserError(f"--cache-gb {flags.cache_gb}: must be above 0")


def tower_key(model: MedMoE, dtype: torch.dtype) -> str:
    """The same for towers that compute the same in matmuls of this dtype."""
    digest = hashlib.sha256(f"{model.config.vision} {dtype}".encode())
    for name, param in model.vision.named_parameters():
        digest.update(f"{name} {param.dtype}".encode())
        digest.update(as_bytes(param))
    return digest.hexdigest()[:16]


class CachedTower(VisionTower):
    """A tower that looks its features up on disk, and computes those that are new."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) CLIP-normalised -> (n, P, W)."""
        return self.cache(images, super().forward)


def cache_features(
    model: MedMoE, flags: TrainConfig, folder: Path, dtype: torch.dtype, processes: Processes
) -> None:
    """Apply --cache-features to a model that is on its device. A tower that is trained is not."""
    if not flags.cache_features:
        return
    if any(p.requires_grad for p in model.vision.parameters()):
        print(f"phase {flags.phase}: trains the tower, so --cache-features keeps nothing")
        return
    folder = folder / "features" / tower_key(model, dtype)
    model.vision.cache = Cache(folder, flags.cache_gb, processes)
    model.vision.__class__ = CachedTower


class Cache:
    """The files of one tower, which all processes read and write."""

    def __init__(self, folder: Path, limit_gb: float, processes: Processes):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rank, self.limit_gb = folder, processes.rank, limit_gb
        used = sum(file.stat().st_size for file in folder.parent.rglob("*") if file.is_file())
        self.room, self.is_full = (limit_gb * 1e9 - used) / processes.world, False  # bytes

    def __call__(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """images (n, 3, S, S) -> (n, P, W); those that are new pass the tower in one batch."""
        files = [self.folder / f"{hash_of(image)}.safetensors" for image in images]
        features = [self.read(file) for file in files]
        new = {file: i for i, file in enumerate(files) if features[i] is None}
        if new:
            computed = compute(images[list(new.values())]).cpu()
            found = dict(zip(new, computed, strict=True))
            for file, values in found.items():
                self.add(file, values)
            features = [found.get(f, old) for f, old in zip(files, features, strict=True)]
        return torch.stack(features).to(images.device) if features else compute(images)

    def read(self, file: Path) -> Tensor | None:
        """(P, W); None if there is no such file, or a damaged one."""
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                values, crc = opened.get_tensor("features"), opened.metadata()["crc"]
            if crc == str(zlib.crc32(as_bytes(values))):
                return values
        except (OSError, SafetensorError, TypeError, KeyError):
            pass
        warn_once(f"{file.parent}: damaged files; their images pass the tower again")
        return None

    def add(self, file: Path, values: Tensor) -> None:
        """Write a file. If there is no room, warn once and write no more."""
        if self.is_full:
            return
        part = file.with_suffix(f".{self.rank}.part")
        try:
            if values.nbytes > self.room:
                raise OSError(0, f"--cache-gb {self.limit_gb:g} is full")
            header = {"crc": str(zlib.crc32(as_bytes(values)))}
            save_file({"features": values.contiguous()}, part, header)
            self.room -= part.stat().st_size
            os.replace(part, file)
        except (OSError, SafetensorError) as error:
            self.is_full = True
            part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            warn_once(f"{self.folder}: {reason}; new images pass the tower each time")


def hash_of(image: Tensor) -> str:
    return hashlib.sha256(as_bytes(image)).hexdigest()


def as_bytes(x: Tensor) -> np.ndarray:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
