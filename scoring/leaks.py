"""Were the evaluated questions or images in the training data?

A checkpoint stores hashes of every image and of every question-answer pair it was trained on.
Evaluation compares its split with them and reports what it finds before any score.

An image is recognised by its bytes, and, re-encoded or rescaled, by a perceptual hash: a difference
hash (dHash), one bit for each step to a brighter neighbour in a thumbnail (Krawetz 2013).

    n images    m rows: an image with a question and its answer    256 bits of a dHash: 4 int64
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from tqdm import tqdm

from config import one_line
from data import Image, Packed, Sample
from metrics import words
from sources import medmnist
from sources.images import open_image
from sources.records import open_file

# Measured on SLAKE's 642 and VQA-RAD's 315 images, bits from the original at most: JPEG quality 50
# 9, half the size 3, both 11 (28 px: 41). Mirrored: at least 9, median 58. Other patients' images
# are at least 13 away; 16 of SLAKE's 96 test images are neighbouring slices of a training scan.
MAX_DISTANCE = 12  # bits of 256 that may differ
MARGIN = 2  # grey levels a step must exceed; at 0, JPEG noise on a black ground moves 36 bits
MIN_BITS = 20  # a flatter image gets no dHash and matches none; the emptiest of the 957 has 36
NO_DHASH = (0, 0, 0, 0)
CHUNK = 4096  # hashes compared at once with as many others: 64 MiB of distances
SHOWN = 5  # examples in a report


class ImageHash(NamedTuple):
    """What is kept of an image."""

    exact: int  # of its bytes
    dhash: tuple[int, ...]  # (4,); NO_DHASH for flat images and phantoms


NO_IMAGE = ImageHash(0, NO_DHASH)  # text only


def hash64(data: bytes) -> int:
    """The first 8 bytes of the SHA-256, as an int64."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)


def pair_hash(question: str, answer: str) -> int:
    """Of the words as the metrics compare them: without case, punctuation and articles."""
    return hash64("\n".join(" ".join(words(text)) for text in (question, answer)).encode())


def dhash(image: PIL.Image.Image) -> tuple[int, ...]:
    """16 rows of 16 bits: where the next of 17 grey values is brighter by more than MARGIN."""
    grey = image.convert("L").convert("F").resize((17, 16), PIL.Image.Resampling.LANCZOS)
    bits = np.diff(np.asarray(grey), axis=1) > MARGIN  # (16, 16); F: L would round to whole levels
    return tuple(np.packbits(bits).view("<i8").tolist()) if bits.sum() >= MIN_BITS else NO_DHASH


@functools.cache
def image_hash(image: Image) -> ImageHash:
    """Of a file, a row of an npz or a phantom, once a process. Raises UserError as open_image."""
    if isinstance(image, int):
        return ImageHash(hash64(f"phantom {image}".encode()), NO_DHASH)
    if isinstance(image, Packed):
        array = medmnist.read_split(image.file, image.split)[0][image.index]
        exact = hash64(f"{array.shape}".encode() + array.tobytes())
        return ImageHash(exact, dhash(PIL.Image.fromarray(array)))
    return ImageHash(dhash=dhash(open_image(image)), exact=hash64(open_file(image)))


def image_hashes(samples: Sequence[Sample], workers: int = 2) -> dict[Image | None, ImageHash]:
    """Each different image of the samples, read once."""
    images = list(dict.fromkeys(s.image for s in samples if s.image is not None))
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(image_hash, images), desc="image hashes", total=len(images),
                     file=sys.stderr, mininterval=1, delay=2)  # fmt: skip
        return dict(zip(images, found, strict=True))


def fingerprint(samples: Sequence[Sample]) -> str:
    """16 hex digits, different for two versions of a split, the same in any order and folder."""
    exact = {image: m.exact for image, m in image_hashes(samples).items()}
    rows = ([s.source, s.split, s.id, s.turns, exact.get(s.image)] for s in samples)
    return hashlib.sha256("\n".join(sorted(map(json.dumps, rows))).encode()).hexdigest()[:16]


def seen_by(samples: Sequence[Sample], workers: int = 2) -> Tensor:
    """What training on these samples sees: (m, 6) int64, sorted, each row once.

    A row: hash of the image's bytes, its dHash (both 0 for text only), hash of question and answer.
    """
    known = image_hashes(samples, workers) | {None: NO_IMAGE}
    rows = [(known[s.image].exact, *known[s.image].dhash, pair_hash(*turn))
            for s in samples for turn in s.turns]  # fmt: skip
    return merge(torch.tensor(rows, dtype=torch.int64).reshape(-1, 6))


def merge(*parts: Tensor) -> Tensor:
    """What several phases have seen together."""
    return torch.cat(parts).unique(dim=0)


def signs(hashes: np.ndarray) -> np.ndarray:
    """(n, 4) int64 -> (n, 256) of -1 and 1: their product counts equal minus different bits."""
    bits = np.unpackbits(np.ascontiguousarray(hashes, "<i8").view(np.uint8), axis=1)
    return bits.astype(np.float32) * 2 - 1


def alike(tested: np.ndarray, trained: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows of tested (n, 4) and trained (m, 4) that differ in at most MAX_DISTANCE bits, in pairs.

    A matrix product is as fast as counting bits, needs no NumPy 2, and is exact: sums below 2^24.
    """
    left, right = np.flatnonzero(tested.any(axis=1)), np.flatnonzero(trained.any(axis=1))
    for j in range(0, len(right), CHUNK):
        theirs = signs(trained[right[j : j + CHUNK]]).T
        for i in range(0, len(left), CHUNK):
            equal = signs(tested[left[i : i + CHUNK]]) @ theirs  # (CHUNK, CHUNK), 256 - 2 distance
            for x, y in np.argwhere(equal >= 256 - 2 * MAX_DISTANCE):
                yield int(left[i + x]), int(right[j + y])


def name_of(image: Image) -> str:
    """Folder and file, without where on the disk they lie."""
    if isinstance(image, Packed):
        return f"{image.file.name} {image.split} {image.index}"
    return f"phantom {image}" if isinstance(image, int) else f"{image.parent.name}/{image.name}"


def check(samples: Sequence[Sample], seen: Tensor) -> dict:
    """What training has seen (seen_by) of a split, in JSON values.

    pairs_seen counts the questions that training had with this answer, about whatever image;
    questions_seen those of them that were about this image or one like it.
    """
    images, place = np.unique(seen[:, :5].numpy(), axis=0, return_inverse=True)  # (n, 5), (m,)
    texts = seen[:, 5].tolist()
    pairs = set(zip(texts, place.ravel().tolist(), strict=True))  # text, row of its image
    known = image_hashes(samples)
    tested = list(dict.fromkeys(known.values()))  # two files may be one image
    row = {exact: i for i, exact in enumerate(images[:, 0].tolist())}
    rows = {m: {row[m.exact]} if m.exact in row else set() for m in tested}
    hashes = np.array([m.dhash for m in tested], np.int64).reshape(-1, 4)
    for i, j in alike(hashes, images[:, 1:]):
        rows[tested[i]].add(j)  # rows of training images that are the same or alike
    found = sorted((m for m in tested if rows[m]), key=lambda m: m.exact not in row)  # same first
    names = {m: name_of(image) for image, m in known.items() if rows[m]}
    rows[None] = {row.get(NO_IMAGE.exact)}
    turns = [(s, q, pair_hash(q, a)) for s in samples for q, a in s.turns]
    repeated = [(s, q) for s, q, text in turns
                if any((text, i) in pairs for i in rows[known.get(s.image)])]  # fmt: skip
    texts = set(texts)
    return {
        "fingerprint": fingerprint(samples),
        "images": len(tested),
        "images_seen": sum(m.exact in row for m in found),
        "images_alike": len(found),
        "questions": len(turns),
        "pairs_seen": sum(text in texts for _, _, text in turns),
        "questions_seen": len(repeated),
        "first": [{"id": s.id, "question": q} for s, q in repeated[:SHOWN]],
        "named": [names[m] for m in found[:SHOWN]],
    }


def show(report: dict) -> str:
    """A report in at most 4 lines; the first is whether this split can be trusted."""
    images, same, near = (report[x] for x in ("images", "images_seen", "images_alike"))
    n, pairs, seen = (report[x] for x in ("questions", "pairs_seen", "questions_seen"))
    lines = ["no image and no question of this split was in training"]
    if near or seen:
        parts = [f"{same} of {images} images were in training"] * bool(same)
        parts += [f"{near - same} of {images} look like a training image"] * (near > same)
        parts += [f"{seen} of {n} questions with their answers{' too' * bool(near)}"]
        lines = ["LEAK: " + ", ".join(parts) + ": " * bool(near) + ", ".join(report["named"])]
    elif pairs:
        lines = ["no image of this split was in training, nor a question with its image"]
    if pairs > seen:
        lines += [f"{pairs - seen} of {n} questions were in training with the same answers, about "
                  "other images"]  # fmt: skip
    if seen:
        shown = (f"{x['id']} {x['question'][:60]}" for x in report["first"])
        lines += ["seen questions: " + "; ".join(shown)]
    return "\n  ".join(map(one_line, lines))
