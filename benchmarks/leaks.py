"""Were the evaluated questions or images in the training data?

Training keeps, beside its weights, what it has seen: hashes of every image and of every question
with its answer. Evaluation compares its split with them and says what it finds before any score.

An image is found again by its bytes, and, re-encoded or rescaled, by its look: a difference hash,
one bit for each step to a brighter neighbour in a thumbnail (Krawetz 2013, "Kind of like that").

    n images    m different question-answer pairs    256 bits of a look, kept as 4 int64
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

from benchmarks import medmnist
from metrics import words
from records import Image, Packed, Sample, open_file
from vision import open_image

# Measured on SLAKE's 642 and VQA-RAD's 315 images. Longest distance to the original, in bits:
#     JPEG quality 50: 9    half the size: 3    both: 11    1.1 times as bright, plus 8: 23
# (so within LOOK: all, all, all and 947 of 957); mirrored: at least 9 (a symmetric brain), the
# median 58. Not the same file, yet within LOOK of a training image:
#     SLAKE, English: 16 of 96 test images. Looked at, each is a neighbouring slice of one scan;
#         the nearest test image of another patient is 13 bits away.
#     PneumoniaMNIST, 28 px: 0 of 624; the nearest, two other children, differ in 19. So small
#         pictures need no rule of their own, but there quality 50 moves up to 41 and is missed.
#     VQA-RAD: no two files are closer than 34.
LOOK = 12  # bits of 256 that may differ
MARGIN = 2  # grey levels a step must exceed; at 0, JPEG noise on a black ground moves 36 bits
MIN_BITS = 20  # a flatter picture has no look, and is like none; the emptiest of the 957 has 36
NO_LOOK = (0, 0, 0, 0)
CHUNK = 4096  # looks compared at once with as many others: 64 MiB of distances
SHOWN = 5  # examples in a report


class Mark(NamedTuple):
    """What of an image is kept."""

    exact: int  # of its bytes
    look: tuple[int, ...]  # (4,); NO_LOOK for flat pictures and phantoms


def number(data: bytes) -> int:
    """The first 8 bytes of the SHA-256, as an int64."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)


def text_number(question: str, answer: str) -> int:
    """Of the words as the metrics compare them: without case, punctuation and articles."""
    return number("\n".join(" ".join(words(text)) for text in (question, answer)).encode())


def look_of(picture: PIL.Image.Image) -> tuple[int, ...]:
    """16 rows of 16 bits: where the next of 17 grey values is brighter by more than MARGIN."""
    grey = picture.convert("L").convert("F").resize((17, 16), PIL.Image.Resampling.LANCZOS)
    bits = np.diff(np.asarray(grey), axis=1) > MARGIN  # (16, 16); F: L would round to whole levels
    return tuple(np.packbits(bits).view("<i8").tolist()) if bits.sum() >= MIN_BITS else NO_LOOK


@functools.cache
def mark(image: Image) -> Mark:
    """Of a file, a row of an npz or a phantom, once a process. Raises UserError as open_image."""
    if isinstance(image, int):
        return Mark(number(f"phantom {image}".encode()), NO_LOOK)
    if isinstance(image, Packed):
        array = medmnist.read_split(image.file, image.split)[0][image.index]
        return Mark(number(f"{array.shape}".encode() + array.tobytes()),
                    look_of(PIL.Image.fromarray(array)))  # fmt: skip
    return Mark(look=look_of(open_image(image)), exact=number(open_file(image)))


def marks(samples: Sequence[Sample], workers: int = 2) -> dict[Image | None, Mark]:
    """Each different image of the samples, read once."""
    images = list(dict.fromkeys(s.image for s in samples if s.image is not None))
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(mark, images), desc="image hashes", total=len(images),
                     file=sys.stderr, mininterval=1, delay=2)  # fmt: skip
        return dict(zip(images, found, strict=True))


def fingerprint(samples: Sequence[Sample]) -> str:
    """16 hex digits that tell two versions of a split apart, in any order and any folder."""
    exact = {image: m.exact for image, m in marks(samples).items()}
    rows = ([s.source, s.split, s.id, s.turns, exact.get(s.image)] for s in samples)
    return hashlib.sha256("\n".join(sorted(map(json.dumps, rows))).encode()).hexdigest()[:16]


def without_doubles(images: np.ndarray, looks: np.ndarray, pairs: np.ndarray) -> dict[str, Tensor]:
    """Sorted, so that what was seen has one form, however it came together."""
    images, first, where = np.unique(images, return_index=True, return_inverse=True)
    where = np.append(where, -1)  # text only: row -1 stays -1
    pairs = np.stack([pairs[:, 0], where[pairs[:, 1]]], axis=1)
    pairs = np.unique(pairs, axis=0) if len(pairs) else pairs
    seen = {"images": images, "looks": looks[first], "pairs": pairs}
    return {name: torch.from_numpy(array) for name, array in seen.items()}


def seen_by(samples: Sequence[Sample], workers: int = 2) -> dict[str, Tensor]:
    """What training on these samples sees, all int64.

    images  (n,) hashes of the images' bytes
    looks   (n, 4) difference hashes, NO_LOOK where there is none
    pairs   (m, 2) hash of a question with its answer; row of its image in images, -1: text only
    """
    known = marks(samples, workers)
    row = {image: i for i, image in enumerate(known)} | {None: -1}
    pairs = [(text_number(*turn), row[s.image]) for s in samples for turn in s.turns]
    return without_doubles(
        np.array([m.exact for m in known.values()], np.int64),
        np.array([m.look for m in known.values()], np.int64).reshape(-1, 4),
        np.array(pairs, np.int64).reshape(-1, 2),
    )


def merge(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """What two phases have seen together; {} stands for nothing."""
    if not first or not second:
        return second or first
    a, b = ({name: t.numpy() for name, t in seen.items()} for seen in (first, second))
    rows = b["pairs"][:, 1]
    moved = np.where(rows < 0, rows, rows + len(a["images"]))
    pairs = np.concatenate([a["pairs"], np.stack([b["pairs"][:, 0], moved], axis=1)])
    images, looks = (np.concatenate([a[name], b[name]]) for name in ("images", "looks"))
    return without_doubles(images, looks, pairs)


def signs(looks: np.ndarray) -> np.ndarray:
    """(n, 4) int64 -> (n, 256) of -1 and 1: their product counts equal minus different bits."""
    bits = np.unpackbits(np.ascontiguousarray(looks, "<i8").view(np.uint8), axis=1)
    return bits.astype(np.float32) * 2 - 1


def look_classes(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) -> the different looks there are, and the class of each row.

    What looks the same is one class; what has no look is a class of its own.
    """
    different, classes = np.unique(looks, axis=0, return_inverse=True)
    classes = classes.reshape(-1)
    flat = ~looks.any(axis=1)
    classes[flat] = len(different) + np.arange(flat.sum())
    return different, classes


def alike(asked: np.ndarray, trained: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row of asked, row of trained) wherever two looks, (n, 4) and (m, 4), are within LOOK.

    A matrix product is as fast as counting bits, needs no NumPy 2, and is exact: sums below 2^24.
    """
    left, right = np.flatnonzero(asked.any(axis=1)), np.flatnonzero(trained.any(axis=1))
    for j in range(0, len(right), CHUNK):
        theirs = signs(trained[right[j : j + CHUNK]]).T
        for i in range(0, len(left), CHUNK):
            equal = signs(asked[left[i : i + CHUNK]]) @ theirs  # (CHUNK, CHUNK), 256 - 2 distance
            for x, y in np.argwhere(equal >= 256 - 2 * LOOK):
                yield int(left[i + x]), int(right[j + y])


def name_of(image: Image) -> str:
    """Folder and file, without where on the disk they lie."""
    if isinstance(image, Packed):
        return f"{image.file.name} {image.split} {image.index}"
    return f"phantom {image}" if isinstance(image, int) else f"{image.parent.name}/{image.name}"


def check(samples: Sequence[Sample], seen: dict[str, Tensor]) -> dict:
    """What training has seen of a split, in JSON values.

    pairs_seen counts the questions that training had with this answer, about whatever image;
    questions_seen those of them that were about this image or one like it.
    With seen = {} nothing is found; that there is no record is for the caller to say.
    """
    seen = seen or seen_by([])
    trained, classes = look_classes(seen["looks"].numpy())
    classes = np.append(classes, -1)  # text only: row -1 is class -1
    pairs = {(text, int(classes[image])) for text, image in seen["pairs"].tolist()}
    texts = {text for text, _ in pairs}
    known = marks(samples)
    asked = list(dict.fromkeys(known.values()))  # two files may be one image
    row = {exact: int(classes[i]) for i, exact in enumerate(seen["images"].tolist())}
    looks = np.array(sorted({m.look for m in asked}), np.int64).reshape(-1, 4)
    like: dict[tuple, set[int]] = {}  # a look -> the classes of training images like it
    for i, j in alike(looks, trained):
        like.setdefault(tuple(looks[i].tolist()), set()).add(j)
    rows = {m: ({row[m.exact]} if m.exact in row else set()) | like.get(m.look, set())
            for m in asked}  # fmt: skip
    found = sorted((m for m in asked if rows[m]), key=lambda m: m.exact not in row)  # same first
    names = {m: name_of(image) for image, m in known.items() if rows[m]}
    rows[None] = {-1}  # text only
    turns = [(s, q, text_number(q, a)) for s in samples for q, a in s.turns]
    very = [(s, q) for s, q, x in turns if any((x, i) in pairs for i in rows[known.get(s.image)])]
    return {
        "fingerprint": fingerprint(samples),
        "images": len(asked),
        "images_seen": sum(m.exact in row for m in found),
        "images_alike": len(found),
        "questions": len(turns),
        "pairs_seen": sum(text in texts for _, _, text in turns),
        "questions_seen": len(very),
        "first": [{"id": s.id, "question": q} for s, q in very[:SHOWN]],
        "named": [names[m] for m in found[:SHOWN]],
    }


def show(report: dict) -> str:
    """A report in at most 4 lines; the first says whether this split can be trusted."""
    images, same, near = (report[x] for x in ("images", "images_seen", "images_alike"))
    n, pairs, very = (report[x] for x in ("questions", "pairs_seen", "questions_seen"))
    lines = ["no image and no question of this split was in training"]
    if near or very:
        parts = [f"{same} of {images} images were in training"] * bool(same)
        parts += [f"{near - same} of {images} look like a training image"] * (near > same)
        parts += [f"{very} of {n} questions with their answers{' too' * bool(near)}"]
        lines = ["LEAK: " + ", ".join(parts) + ": " * bool(near) + ", ".join(report["named"])]
    elif pairs:
        lines = ["no image of this split was in training, nor a question with its image"]
    if pairs > very:
        lines += [f"{pairs - very} of {n} questions were, with their answers, about other images"]
    if very:
        told = (f"{x['id']} {x['question'][:60]}" for x in report["first"])
        lines += ["asked before: " + "; ".join(told)]
    # Names and questions are the data's: nothing of them may break a line or steer a terminal.
    return "\n  ".join("".join(c if c.isprintable() else " " for c in line) for line in lines)
