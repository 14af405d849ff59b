"""Samples -> chat template -> tokens and labels -> batches.

Labels are built together with the tokens, piece by piece, so that they cover exactly what the
model has to say: each answer and the token that ends it. Tokenising a dialogue whole and measuring
where its answers lie, as LLaVA's code does, loses a sample wherever the two do not meet.

Shapes: B batch, T positions (text tokens + patches), P patches an image, S image side.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import IGNORE, IMAGE_ID, MODALITIES, ModelConfig, UserError
from pictures import Images
from records import Sample, warn_once
from vision import normalise

EOS = "<|endoftext|>"  # ends every answer, in Phi-2's and StableLM-2's vocabularies alike

Turns = Sequence[tuple[str, str | None]]  # (question, answer); None: to be answered
Piece = tuple[str | int, bool]  # a text or a token id, and whether the model has to say it
Encoded = tuple[list[int], list[int]]  # token ids and labels, equally long


class Text:
    """A tokenizer.json that cannot be talked into special tokens by what users or files say."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer: {error}") from error
        self.tokenizer.encode_special_tokens = True  # as plain text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos_id = self.tokenizer.token_to_id(EOS)
        if self.eos_id is None or self.eos_id in self.encode(EOS):
            raise UserError(f"{path}: {EOS} must be one of its special tokens")

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Without special tokens and patches; an answer begins with its space."""
        return self.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)


def chat(turns: Turns, has_image: bool, system: str, eos_id: int) -> Iterator[Piece]:
    """The chat template, in pieces: the image is IMAGE_ID before the first question.

    {system} USER: <image>\\n{question} ASSISTANT: {answer}<|endoftext|>USER: {question} ...
    Source: Med-MoE conversation.py:312-335 @148cbd6, the same for both decoders.
    """
    opening = f"{system} USER: " if system else "USER: "
    for turn, (question, answer) in enumerate(turns):
        if has_image and turn == 0:
            yield opening, False
            yield IMAGE_ID, False
            opening = "\n"
        yield f"{opening}{question} ASSISTANT:", False
        if answer is not None:
            yield f" {answer}", True
            yield eos_id, True
        opening = "USER: "


def caption(turns: Turns, has_image: bool) -> Iterator[Piece]:
    """Phase 1's plain form: the image, then its caption and a newline; no question, no end."""
    if has_image:
        yield IMAGE_ID, False
    yield f"{turns[0][1]}\n", True


def encode(pieces: Iterable[Piece], text: Text, n_patches: int) -> Encoded:
    ids, labels = [], []
    for piece, is_said in pieces:
        if isinstance(piece, str):
            new = text.encode(piece)
        else:
            new = [piece] * (n_patches if piece == IMAGE_ID else 1)
        ids += new
        labels += new if is_said else [IGNORE] * len(new)
    return ids, labels


def encode_sample(
    sample: Sample,
    text: Text,
    n_patches: int,
    system: str = "",
    plain: bool = False,
    max_len: int | None = None,
) -> Encoded:
    """A sample with its answers -> ids, with IMAGE_ID n_patches times, and labels.

    Cut on the right to max_len. Raises UserError, naming the sample, if that leaves nothing that
    the model has to say.
    """
    has_image = sample.image is not None
    if plain:
        pieces = caption(sample.turns, has_image)
    else:
        pieces = chat(sample.turns, has_image, system, text.eos_id)
    ids, labels = encode(pieces, text, n_patches)
    if max_len is not None:
        ids, labels = ids[:max_len], labels[:max_len]
        if set(labels[1:]) <= {IGNORE}:  # the first has no position before it to predict it from
            name = f"{sample.source} {sample.split} sample {sample.id}"
            raise UserError(f"{name}: nothing to learn in its first {max_len} positions")
    return ids, labels


def encode_prompt(
    question: str,
    has_image: bool,
    text: Text,
    n_patches: int,
    system: str = "",
    max_len: int | None = None,
) -> list[int]:
    """The same up to "ASSISTANT:", for the model to go on from.

    Raises UserError if it leaves no room for an answer within max_len.
    """
    ids, _ = encode(chat([(question, None)], has_image, system, text.eos_id), text, n_patches)
    if max_len is not None and len(ids) >= max_len:
        begins = f"the question that begins {question[:60]!r}"
        raise UserError(f"{begins} takes {len(ids)} positions; the model reads {max_len}")
    return ids


def encode_all(
    samples: Sequence[Sample],
    text: Text,
    n_patches: int,
    system: str = "",
    plain: bool = False,
    max_len: int | None = None,
) -> list[Encoded]:
    """encode_sample for each; how many were cut is told on stderr."""
    how = (text, n_patches, system, plain)
    encoded = [encode_sample(s, *how, max_len) for s in samples]
    full = [i for i, (ids, _) in enumerate(encoded) if len(ids) == max_len]
    n_cut = sum(len(encode_sample(samples[i], *how)[0]) > max_len for i in full)
    if n_cut:
        warn_once(f"{n_cut} of {len(encoded)} samples are cut to {max_len} positions")
    return encoded


class Batch(NamedTuple):
    """What the model takes."""

    ids: Tensor  # (B, T) int64; IMAGE_ID at the P positions of each image
    mask: Tensor  # (B, T) bool, True = real token or patch
    labels: Tensor  # (B, T) int64, the id where the model must say it, else IGNORE; not shifted
    images: Tensor  # (n_images, 3, S, S) CLIP-normalised, in the order of their placeholders
    modality: Tensor  # (B,) int64 index into MODALITIES, -1 unknown
    features: Tensor | None = None  # (n_images, P, W) the tower's, if known; then images is empty

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in self))

    def prompt(self) -> Tensor:
        """(B, T) bool: real positions before the first answer token."""
        return self.mask & ((self.labels != IGNORE).cumsum(dim=1) == 0)


def collate(
    samples: Sequence[Sample],
    encoded: Sequence[Encoded],
    images: Images,
    eos_id: int,
    side: str = "right",
    features: Callable[[Tensor], Tensor] | None = None,
) -> Batch:
    """Samples with their token ids and labels -> a batch.

    side       where the shorter ones are padded: "right" to train, "left" to generate
    features   what the tower says of pixels (n, 3, S, S), (n, P, W), to give instead of images
    Raises UserError for a batch that teaches nothing; on the left, where prompts have no labels,
    it may.
    """
    n_rows, longest = len(samples), max(len(ids) for ids, _ in encoded)
    ids = torch.full((n_rows, longest), eos_id)  # (B, T)
    labels = torch.full((n_rows, longest), IGNORE)  # (B, T)
    mask = torch.zeros(n_rows, longest, dtype=torch.bool)  # (B, T) True = real
    for row, (row_ids, row_labels) in enumerate(encoded):
        n = len(row_ids)
        place = slice(longest - n, None) if side == "left" else slice(n)
        ids[row, place] = torch.tensor(row_ids)
        labels[row, place] = torch.tensor(row_labels)
        mask[row, place] = True
    if side == "right" and bool((labels[:, 1:] == IGNORE).all()):
        named = ", ".join(f"{s.source} {s.id}" for s in samples)
        raise UserError(f"no answer to learn in the batch of samples {named}")
    pixels = [images.get(s) for s in samples if s.image is not None]
    empty = torch.zeros(0, 3, images.size, images.size, dtype=torch.uint8)
    stacked = torch.stack(pixels) if pixels else empty  # (n_images, 3, S, S)
    known = [MODALITIES.index(s.modality) if s.modality else -1 for s in samples]
    modality = torch.tensor(known)
    if features is not None:
        return Batch(ids, mask, labels, normalise(empty), modality, features(stacked))
    return Batch(ids, mask, labels, normalise(stacked), modality)


def epoch_rows(weights: Sequence[float], rng: random.Random) -> list[int]:
    """Every index `weight` times: 2.5 is twice, and half of those indices a third time."""
    groups: dict[float, list[int]] = {}
    for row, weight in enumerate(weights):
        groups.setdefault(weight, []).append(row)
    rows = []
    for weight, group in groups.items():
        rows += group * int(weight)
        rows += rng.sample(group, math.ceil(weight % 1 * len(group)))
    rng.shuffle(rows)
    return rows


def epoch_batches(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
) -> list[list[int]]:
    """Every index as often as it weighs (once), in batches of similar lengths, to pad little.

    The same for the same seed and epoch. Lengths are sorted within windows of 50 batches only, so
    that epochs still differ.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = epoch_rows(weights or [1.0] * len(lengths), rng)
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        near = sorted(order[start : start + 50 * batch_size], key=lengths.__getitem__)
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


class Dataset:
    """Samples as a model of these dimensions reads them: token ids, labels and pictures."""

    def __init__(
        self,
        samples: Sequence[Sample],
        text: Text,
        config: ModelConfig,
        plain: bool,
        workers: int = 0,
    ):
        n_patches, max_len = config.vision.n_patches, config.decoder.max_len
        self.samples = samples
        self.encoded = encode_all(samples, text, n_patches, config.system, plain, max_len)
        # Of what is given, image and questions. Sorted with its answers' lengths too, a batch of a
        # classification would hold a single class.
        self.lengths = [labels.count(IGNORE) for _, labels in self.encoded]
        self.weights = [s.weight for s in samples]
        # As released: captions are learnt on cropped pictures, everything else on padded ones.
        self.images = Images(config.vision.image_size, pad=not plain, workers=workers)
        self.eos_id = text.eos_id
        self.features: Callable[[Tensor], Tensor] | None = None  # of a frozen tower; see collate

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The rows of each batch of this epoch."""
        return epoch_batches(self.lengths, batch_size, seed, epoch, self.weights)

    def prefetch(self, batches: Iterable[Sequence[int]]) -> None:
        self.images.prefetch(self.samples[row] for rows in batches for row in rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        samples, encoded = ([part[r] for r in rows] for part in (self.samples, self.encoded))
        return collate(samples, encoded, self.images, self.eos_id, features=self.features)
