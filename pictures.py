"""The picture of a sample, whatever it is: a file, a row of an npz, or a phantom's seed.

Read ahead by a few threads and kept as bytes, since most pictures have several questions.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import PIL.Image
import torch
from torch import Tensor

import phantoms
from benchmarks import medmnist
from records import Image, Packed, Sample
from vision import open_image, square

CACHE_BYTES = 1_500_000_000  # of decoded images: 40 000 at 112 px, 4 400 at 336 px


class Images:
    """Pictures at the tower's size, kept in memory as bytes until CACHE_BYTES are full."""

    def __init__(self, size: int, pad: bool = True, workers: int = 0):
        self.size, self.pad = size, pad
        self.room = CACHE_BYTES // (3 * size * size)
        self.kept: dict[Image, Tensor] = {}
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[Image, Future[Tensor]] = {}

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Let the workers read these pictures while something else is computed."""
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
            picture = PIL.Image.fromarray(stored).convert("RGB")
        else:
            picture = open_image(image)
        return square(picture, self.size, self.pad)
