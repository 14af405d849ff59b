"""The image of a sample, whether a file, a row of an npz, or a phantom's seed.

Read ahead by a few threads and kept as bytes, since most images have several questions.
"""

import functools
import io
import sys
import warnings
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm

from config import UserError
from data import Image, Packed, Sample
from sources import dicom, medmnist, packed, phantoms
from sources.records import open_file
from vision import square

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's other decoders are not used
PHOTOMETRIC = 262  # TIFF's tag; 0: white is zero
MAX_PIXELS = 50_000_000  # of an image file; 4 bytes each once decoded
MAX_RATIO = 100  # of its sides; a 1 x 100000 strip is no image, and would make a huge square
PERCENTILES = (0.5, 99.5)
CACHE_BYTES = 1_500_000_000  # of decoded images: 40 000 at 112 px, 4 400 at 336 px


class Images:
    """Images at the tower's size, kept in memory as bytes until CACHE_BYTES are full."""

    def __init__(self, size: int, pad: bool = True, workers: int = 0):
        self.size, self.pad = size, pad
        self.room = CACHE_BYTES // (3 * size * size)
        self.kept: dict[Image, Tensor] = {}
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[Image, Future[Tensor]] = {}

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Let the workers read these images while something else is computed."""
        for image in {s.image for s in samples if s.image is not None}:
            if self.pool and image not in self.kept and image not in self.coming:
                self.coming[image] = self.pool.submit(self.read, image)

    def get(self, sample: Sample) -> Tensor:
        """(3, S, S) uint8. Raises UserError for a file that cannot be read."""
        image = sample.image
        if image in self.kept:
            return self.kept[image]
        future = self.coming.pop(image, None)
        pixels = future.result() if future else self.read(image)
        if len(self.kept) < self.room:
            self.kept[image] = pixels
        return pixels

    def read(self, image: Image) -> Tensor:
        """Decode or draw it, pad or crop it to a square, scale it."""
        if isinstance(image, int):
            drawn = phantoms.draw(image, self.size).image  # (S, S, 3)
            return torch.from_numpy(drawn).permute(2, 0, 1).contiguous()
        if isinstance(image, Packed):
            stored = medmnist.read_split(image.file, image.split)[0][image.index]
            pixels = PIL.Image.fromarray(stored).convert("RGB")
        else:
            pixels = open_image(image)
        return square(pixels, self.size, self.pad)


def open_image(path: str | Path) -> PIL.Image.Image:
    """An image file -> RGB, as a viewer shows it: first frame, upright, on black.

    Raises UserError with the file and the reason for whatever cannot be read or claims too much.
    """
    path = Path(path)
    if not packed.is_there(path):
        reason = "is not a file" if path.exists() else "no such file"
        raise UserError(f"image {path}: {reason}")
    try:
        file, inner = (path, "") if path.is_file() else packed.holder(path)
        if packed.is_dicom(file):
            return to_rgb(dicom.read(file, inner, check_size), False)
        with (
            warnings.catch_warnings(action="ignore", category=PIL.Image.DecompressionBombWarning),
            # Not by its name: Pillow would shear a plain TIFF whose tags say that it is rotated.
            io.BytesIO(open_file(path)) if inner else file.open("rb") as stream,
            PIL.Image.open(stream, formats=FORMATS) as image,  # reads the header alone
        ):
            check_size(*image.size)
            image.load()
            white_is_zero = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
            return to_rgb(upright(image), white_is_zero)
    except PIL.UnidentifiedImageError:
        empty = path.is_file() and path.stat().st_size == 0
        reason = f"not a readable image ({', '.join(FORMATS)} and DICOM are)"
        reason = "is empty" if empty else reason
    except UserError:  # it names the file
        raise
    except Exception as error:  # a broken file makes a decoder raise anything, struct.error too
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise UserError(f"image {path}: {reason}")


@functools.cache
def fault(path: Path) -> str:
    """Why open_image refuses this file; "" if it does not. Decoded once in a process."""
    try:
        open_image(path)
    except UserError as error:
        return str(error)
    return ""


def unreadable(paths: Collection[Path], workers: int = 2) -> dict[Path, str]:
    """The files that cannot be read, and why."""
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(fault, paths), desc="image files", total=len(paths),
                     file=sys.stderr, mininterval=1, delay=2)  # fmt: skip
        return {path: reason for path, reason in zip(paths, found, strict=True) if reason}


def check_size(width: int, height: int) -> None:
    """Refuse what a header claims before memory is allocated. Raises ValueError."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"claims {width} x {height} pixels; at most {MAX_PIXELS} are allowed")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: a side is over {MAX_RATIO} times the other")


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Rotated by its EXIF data; unreadable EXIF data is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: PIL.Image.Image, white_is_zero: bool) -> PIL.Image.Image:
    """Any of Pillow's modes -> RGB: transparent is black, deep grey is stretched to 0 .. 255."""
    if image.mode.startswith(("I", "F")):  # convert("RGB") would clip them at 255
        grey = np.asarray(image, dtype=np.float32)
        return stretch(-grey if white_is_zero else grey).convert("RGB")  # Pillow inverts 8 bits
    if image.has_transparency_data:
        black = PIL.Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = PIL.Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert("RGB")


def stretch(grey: np.ndarray) -> PIL.Image.Image:
    """16-bit, 32-bit or float grey (H, W) -> 8 bits: PERCENTILES black and white.

    So that a few pixels, of metal or damaged, do not decide. Where most pixels are of one value, as
    in a mask, the least value is black and the largest white.
    """
    finite = np.isfinite(grey)
    values = grey[finite] if finite.any() else np.zeros(1)
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        low, high = float(values.min()), float(values.max())
    unit = (np.where(finite, grey, low) - low) / ((high - low) or 1.0)
    return PIL.Image.fromarray((unit.clip(0, 1) * 255).round().astype(np.uint8))  # (H, W)


def jitter(images: Tensor) -> Tensor:
    """(B, 3, S, S) rotated, zoomed, shifted and brightened a little, each image at random.

    For a tower that is trained on few images. Never mirrored: left has to stay left.
    """
    angle, zoom, dx, dy, gain, lift = torch.rand(6, len(images), 1, device=images.device) * 2 - 1
    angle, zoom = 0.15 * angle, 1 + 0.12 * zoom  # radians; grid_sample's units are half sides
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.cat([cos, -sin, 0.12 * dx, sin, cos, 0.12 * dy], dim=1)  # (B, 6)
    grid = F.affine_grid(rows.unflatten(1, (2, 3)), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved * (1 + 0.15 * gain[..., None, None]) + 0.15 * lift[..., None, None]
