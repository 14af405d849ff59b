"""Samples -> chat template -> token ids and labels -> batches.

Labels are built together with the ids, segment by segment, so that they cover exactly what the
model learns to generate: each answer and the token that ends it. LLaVA's code tokenises a dialogue
whole, measures where its answers should lie, and loses a sample wherever the two disagree.

Shapes: B batch, T positions (text tokens + patches), P patches per image, S image side.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import IGNORE, IMAGE_ID, MODALITIES, ModelConfig, UserError, tolerate, warn_once
from vision import normalise

EOS = "<|endoftext|>"  # ends every answer, in Phi-2's and StableLM-2's vocabularies alike

Turns = Sequence[tuple[str, str | None]]  # (question, answer); None: for the model to answer
Segment = tuple[str | int, bool]  # a text or a token id, and whether it is supervised
Encoded = tuple[list[int], list[int]]  # token ids and labels, equally long


class Packed(NamedTuple):
    """An image inside an npz file."""

    file: Path
    split: str
    index: int


Image = Path | Packed | int  # a file, a row of an npz, the seed of an embedded image (phantom)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, or none, with its questions and answers. Every source yields these."""

    id: str  # unique within a source and split
    source: str
    split: str
    image: Image | None  # None: text only
    turns: tuple[tuple[str, str], ...]  # (question, answer); a caption answers ""
    modality: str | None = None  # one of MODALITIES
    answer_type: str = ""  # "open", "closed"
    kind: str = ""  # of question, for reports
    options: tuple[str, ...] = ()  # classification: all possible answers, in the labels' order
    weight: float = 1.0  # times an epoch in training
    image_turn: int = 0  # the turn whose question the image comes before
    fault: str = ""  # why it cannot be asked: it counts as wrong in an evaluation
    wording: str = ""  # "seen" in training or "new", for reports


class Text:
    """A tokenizer.json in which text from users or files never becomes a special token.

    vocab_size: rows of the embedding, where it is known; UserError for a token beyond them.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None):
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
        token, largest = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if vocab_size is not None and largest >= vocab_size:
            raise UserError(f"{path}: token {token!r} has id {largest}; the model's embedding has "
                            f"ids 0 to {vocab_size - 1}")  # fmt: skip

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Without special tokens and patches; an answer begins with its space."""
        return self.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)


def chat(
    turns: Turns, has_image: bool, system: str, eos_id: int, image_turn: int = 0
) -> Iterator[Segment]:
    """The chat template, in segments; the image is IMAGE_ID before the question of image_turn.

    {system} USER: <image>\\n{question} ASSISTANT: {answer}<|endoftext|>USER: {question} ...
    Source: Med-MoE conversation.py:312-335 @148cbd6, the same for both decoders.
    """
    opening = f"{system} USER: " if system else "USER: "
    for turn, (question, answer) in enumerate(turns):
        if has_image and turn == image_turn:
            yield opening, False
            yield IMAGE_ID, False
            opening = "\n"
        yield f"{opening}{question} ASSISTANT:", False
        if answer is not None:
            yield f" {answer}", True
            yield eos_id, True
        opening = "USER: "


def caption(turns: Turns, has_image: bool) -> Iterator[Segment]:
    """Phase 1's plain form: the image, then its caption and a newline; no question, no end."""
    if has_image:
        yield IMAGE_ID, False
    yield f"{turns[0][1]}\n", True


def encode(segments: Iterable[Segment], text: Text, n_patches: int) -> Encoded:
    """Segments -> token ids, n_patches IMAGE_IDs per image; labels, IGNORE if unsupervised."""
    ids, labels = [], []
    for segment, is_supervised in segments:
        if isinstance(segment, str):
            new = text.encode(segment)
        else:
            new = [segment] * (n_patches if segment == IMAGE_ID else 1)
        ids += new
        labels += new if is_supervised else [IGNORE] * len(new)
    return ids, labels


def encode_sample(sample: Sample, text: Text, config: ModelConfig, plain: bool = False) -> Encoded:
    """A sample with its answers -> token ids and labels.

    plain: a caption in phase 1's form. Cut on the right to the decoder's max_len. Raises UserError,
    naming the sample, if no supervised token or only a part of its image is left.
    """
    turns, has_image, max_len = sample.turns, sample.image is not None, config.decoder.max_len
    if plain:
        segments = caption(turns, has_image)
    else:
        segments = chat(turns, has_image, config.system, text.eos_id, sample.image_turn)
    ids, labels = encode(segments, text, config.vision.n_patches)
    if len(ids) > max_len:
        warn_once(f"--data: samples are cut to {max_len} positions, all that the model reads")
        ids, labels = ids[:max_len], labels[:max_len]
    name = f"{sample.source} {sample.split} sample {sample.id}"
    if all(label == IGNORE for label in labels[1:]):  # the first token is never predicted
        raise UserError(f"{name}: nothing to learn in its first {len(ids)} positions")
    if has_image and ids.count(IMAGE_ID) < config.vision.n_patches:
        raise UserError(f"{name}: its image is not within its first {max_len} positions")
    return ids, labels


def encode_prompt(
    question: str, has_image: bool, text: Text, config: ModelConfig, earlier: Turns = (),
    room: int = 1,
) -> Encoded:  # fmt: skip
    """A question without its answer -> ids up to "ASSISTANT:", for the model to continue.

    earlier: the dialogue before it. All labels are IGNORE. Raises UserError if it leaves no `room`
    positions for an answer within max_len.
    """
    segments = chat([*earlier, (question, None)], has_image, config.system, text.eos_id)
    ids, _ = encode(segments, text, config.vision.n_patches)
    if len(ids) + room > config.decoder.max_len:
        raise UserError(f"the question that begins {question[:60]!r} takes {len(ids)} positions; "
                        f"the model reads {config.decoder.max_len}")  # fmt: skip
    return ids, [IGNORE] * len(ids)


def encode_all(
    samples: Sequence[Sample], encode: Callable[[Sample], Encoded], max_bad: int,
    then: str = "leaves them out",
) -> dict[int, Encoded]:  # fmt: skip
    """Row -> token ids and labels. Up to max_bad samples that cannot be encoded are left out."""
    encoded, faults = {}, []
    for row, sample in enumerate(samples):
        try:
            encoded[row] = encode(sample)
        except UserError as error:
            faults.append((sample.id, str(error)))
    tolerate("--data", faults, max_bad, then)
    return encoded


class Batch(NamedTuple):
    """What the model takes."""

    ids: Tensor  # (B, T) int64; IMAGE_ID at the P positions of each image
    mask: Tensor  # (B, T) bool, True = real token or patch
    labels: Tensor  # (B, T) int64, the id where supervised, else IGNORE; not shifted
    images: Tensor  # (n_images, 3, S, S) CLIP-normalised, in the order of their placeholders
    modality: Tensor  # (B,) int64 index into MODALITIES, -1 unknown

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))

    def n_supervised(self) -> int:
        """Tokens with a label; the first token is never predicted."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def prompt(self) -> Tensor:
        """(B, T) bool: real positions before the first answer token."""
        return self.mask & ((self.labels != IGNORE).cumsum(dim=1) == 0)

    def prompt_from_image(self) -> Tensor:
        """(B, T) bool: positions of the prompt from the image on; text before has not seen it."""
        return self.prompt() & ((self.ids == IMAGE_ID).cumsum(dim=1) > 0)


def collate(
    samples: Sequence[Sample], encoded: Sequence[Encoded], images: Any, eos_id: int,
    side: str = "right",
) -> Batch:  # fmt: skip
    """Samples with their token ids and labels -> a batch.

    images  sources.images.Images, which reads a sample's image as (3, S, S) uint8
    side    where the shorter ones are padded: "right" to train, "left" to generate
    Raises UserError for a batch without a supervised token, unless it is padded on the left.
    """
    n_rows, longest = len(samples), max(len(ids) for ids, _ in encoded)
    ids = torch.full((n_rows, longest), eos_id)  # (B, T)
    labels = torch.full((n_rows, longest), IGNORE)  # (B, T)
    mask = torch.zeros(n_rows, longest, dtype=torch.bool)  # (B, T) True = real
    for row, (row_ids, row_labels) in enumerate(encoded):
        n = len(row_ids)
        columns = slice(longest - n, None) if side == "left" else slice(n)
        ids[row, columns] = torch.tensor(row_ids)
        labels[row, columns] = torch.tensor(row_labels)
        mask[row, columns] = True
    if side == "right" and bool((labels[:, 1:] == IGNORE).all()):
        named = ", ".join(f"{s.source} {s.id}" for s in samples)
        raise UserError(f"no answer to learn in the batch of samples {named}")
    pixels = [images.get(s) for s in samples if s.image is not None]
    none = torch.zeros(0, 3, images.size, images.size, dtype=torch.uint8)
    stacked = torch.stack(pixels) if pixels else none  # (n_images, 3, S, S)
    modality = torch.tensor([MODALITIES.index(s.modality) if s.modality else -1 for s in samples])
    return Batch(ids, mask, labels, normalise(stacked), modality)


def epoch_rows(weights: Sequence[float], rng: random.Random) -> list[int]:
    """Every index `weight` times: 2.5 is twice, and half of those indices a third time."""
    groups: dict[float, list[int]] = {}
    for row, weight in enumerate(weights):
        groups.setdefault(weight, []).append(row)
    rows = []
    for weight, group in groups.items():
        rows += group * int(weight)
        rest = round(weight % 1 * len(group), 6)  # 1.1 % 1 * 10 is a little more than 1
        rows += rng.sample(group, math.ceil(rest))
    rng.shuffle(rows)
    return rows


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int,
    weights: Sequence[float] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Every index, as often as its weight says, in batches of similar lengths, to pad little.

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
    """Samples as a model of these dimensions reads them: token ids, labels and images.

    max_bad: how many may be left out because nothing can be learned from them.
    """

    def __init__(
        self, samples: Sequence[Sample], text: Text, config: ModelConfig, plain: bool,
        images: Any, max_bad: int = 0,
    ):  # fmt: skip
        encoded = encode_all(samples, lambda s: encode_sample(s, text, config, plain), max_bad)
        self.samples, self.encoded = [samples[row] for row in encoded], [*encoded.values()]
        self.images, self.eos_id = images, text.eos_id
        # Of image and questions alone: sorted by their answers too, a batch would hold one class.
        self.lengths = [labels.count(IGNORE) for _, labels in self.encoded]
        self.weights = [s.weight for s in self.samples]

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The rows of each batch of this epoch."""
        return epoch_batches(self.lengths, batch_size, seed, epoch, self.weights)

    def prefetch(self, batches: Iterable[Sequence[int]]) -> None:
        self.images.prefetch(self.samples[row] for rows in batches for row in rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        samples, encoded = ([part[r] for r in rows] for part in (self.samples, self.encoded))
        return collate(samples, encoded, self.images, self.eos_id)
