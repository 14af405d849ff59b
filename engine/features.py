"""What a frozen tower says of each picture, kept on disk: a picture passes the tower once.

    OUT/features/TOWER-RANK    records of one size, only ever added to: key, crc, values

TOWER begins the hash of the tower's weights and of its matmuls' dtype, so another tower has files
of its own; RANK is the process that writes there, and all read. A picture's key is the hash of its
pixels, which holds its size and padding. A record counts only if its crc is right: what a crash
or the disk has damaged is computed anew.

Shapes: n pictures, S image side, P patches, W tower width.
"""

import errno
import hashlib
import os
import zlib

import numpy as np
import torch
from torch import Tensor

from config import UserError
from engine.run import Run
from flags import TrainConfig
from model import MedMoE, precision
from records import warn_once
from vision import normalise

KEY, CRC = 32, 4  # bytes


def check_cache(flags: TrainConfig) -> None:
    """Raise UserError where --cache-features makes no sense."""
    if flags.cache_features and flags.jitter:
        raise UserError("--cache-features: --jitter (which --tune-vision brings) varies the "
                        "pictures, so that none comes twice: add --no-jitter")  # fmt: skip
    if not flags.cache_gb > 0:  # a NaN too
        raise UserError(f"--cache-gb {flags.cache_gb}: must be above 0")


def open_features(model: MedMoE, flags: TrainConfig, run: Run) -> "Features | None":
    """The run's cache, for Dataset.features; None without --cache-features or a frozen tower."""
    if not flags.cache_features:
        return None
    if any(p.requires_grad for p in model.vision.parameters()):
        print(f"{run.title}: trains the tower, so --cache-features keeps nothing")
        return None
    return Features(model, run, flags.cache_gb)


def tower_key(model: MedMoE, dtype: torch.dtype) -> str:
    """The same for towers that compute the same in matmuls of this dtype."""
    digest = hashlib.sha256(f"{model.config.vision} {dtype}".encode())
    for name, param in model.vision.named_parameters():
        digest.update(f"{name} {param.dtype}".encode())
        digest.update(as_bytes(param))
    return digest.hexdigest()[:16]


class Features:
    """Pixels -> what the tower says of them, from the disk or, if they are new, from the tower."""

    def __init__(self, model: MedMoE, run: Run, limit_gb: float):
        self.tower, self.device, self.dtype = model.vision, run.device, run.dtype
        side = model.config.vision.image_size
        said = self.compute(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        self.none = said[:0]  # (0, P, W) in the dtype that the tower gives
        self.size = KEY + CRC + said.nbytes
        folder, name = run.folder / "features", tower_key(model, run.dtype)
        folder.mkdir(exist_ok=True)
        used = sum(file.stat().st_size for file in folder.iterdir())
        self.limit_gb, self.room = limit_gb, (limit_gb * 1e9 - used) / run.processes.world  # bytes
        self.is_full = False
        own = folder / f"{name}-{run.processes.rank}"
        self.file = own.open("a+b", buffering=0)
        others = [path.open("rb") for path in folder.glob(f"{name}-*") if path != own]
        self.places = {}  # key -> file, offset
        for file in (*others, self.file):
            end = file.seek(0, os.SEEK_END)
            for start in range(0, end - end % self.size, self.size):
                file.seek(start)
                self.places[file.read(KEY)] = file, start
        self.file.truncate(end - end % self.size)  # without what a crash left half-written

    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels (n, 3, S, S) uint8 -> (n, P, W); those that are new pass the tower together."""
        keys = [hashlib.sha256(picture.numpy()).digest() for picture in pixels]
        said = self.none.new_empty(len(keys), *self.none.shape[1:])
        new = {key: i for i, key in enumerate(keys) if not self.read(key, said[i])}
        if new:
            for key, features in zip(new, self.compute(pixels[list(new.values())]), strict=True):
                self.add(key, features)
                said[[i for i in range(len(keys)) if keys[i] == key]] = features
        return said

    def compute(self, pixels: Tensor) -> Tensor:
        with precision(self.device, self.dtype):
            return self.tower(normalise(pixels).to(self.device)).cpu()

    def read(self, key: bytes, into: Tensor) -> bool:
        """Fill `into` (P, W) from the record of this key; False if none is there and whole."""
        if key not in self.places:
            return False
        file, start = self.places[key]
        file.seek(start)
        head, values = file.read(KEY + CRC), as_bytes(into)
        file.readinto(values)
        if is_damaged := head != key + checksum(key, values):
            warn_once(f"{file.name}: damaged; its pictures pass the tower again")
        return not is_damaged

    def add(self, key: bytes, features: Tensor) -> None:
        """Keep a record. The first that finds no room is told, and the last that is tried."""
        if self.is_full:
            return
        values = as_bytes(features)
        try:
            start = self.append(b"".join((key, checksum(key, values), values)))
            self.places[key] = self.file, start
        except OSError as error:
            self.is_full = True
            warn_once(f"{self.file.name}: {error.strerror}; new pictures pass the tower each time")

    def append(self, record: bytes) -> int:
        """-> where the record begins. Raises OSError if it cannot be written whole."""
        if len(record) > self.room:
            raise OSError(errno.ENOSPC, f"--cache-gb {self.limit_gb:g} is full")
        start = self.file.seek(0, os.SEEK_END)
        if self.file.write(record) < len(record):  # the disk took a part
            self.file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(record)
        return start


def as_bytes(x: Tensor) -> np.ndarray:
    """The bytes of x; those of a contiguous tensor on the CPU are its own memory."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def checksum(key: bytes, values: np.ndarray) -> bytes:
    return zlib.crc32(values, zlib.crc32(key)).to_bytes(CRC, "little")
