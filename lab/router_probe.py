"""The routers' logits and choices for a set of questions, from one pass; and retrained routers.

Shapes: B batch, T positions, n questions, G images, L sparse layers, K kinds of token, E experts,
D d_model, M modalities.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import IMAGE_ID, MODALITIES
from data import Batch, Dataset, Sample
from eval import Predictor
from lab.router_stats import detects, entropy, share
from model import autocast, sparse_layers
from router_training import collect, one_per_image, train_router
from routers import Hints
from sources.images import Images
from vision import normalise

KINDS = ("text before the image", "image", "text after it", "answer")
Features = tuple[Tensor, Tensor, Tensor]  # as router_training.collect returns them


class Probe(NamedTuple):
    """Of each question followed by its true answer."""

    logits: Tensor  # (n, L, E) mean over the prompt
    best: Tensor  # (n, L, K, E) positions of a kind whose largest logit is this expert's
    first: Tensor  # (n, L, E) prompt positions whose largest gate is this expert's


def kinds(batch: Batch) -> Tensor:
    """(K, B, T) bool: which positions are of which of KINDS; padding is of none."""
    prompt, is_patch = batch.prompt(), batch.ids == IMAGE_ID
    is_later = is_patch.cumsum(dim=1) > 0
    text = prompt & ~is_patch
    return torch.stack([text & ~is_later, prompt & is_patch, text & is_later, batch.mask & ~prompt])


@torch.no_grad()
def probe(
    predictor: Predictor,
    samples: Sequence[Sample],
    change: Callable[[Tensor], Tensor] | None = None,
) -> Probe:
    """change: applied to the normalised images (n_images, 3, S, S)."""
    config = predictor.model.config
    images = Images(config.vision.image_size, workers=2)
    data = Dataset(samples, predictor.text, config, plain=False, images=images)
    order = sorted(range(len(samples)), key=data.lengths.__getitem__)
    rows = [order[i : i + predictor.batch_size] for i in range(0, len(order), predictor.batch_size)]
    parts = []
    for part in tqdm(rows, desc="routing", file=sys.stderr, mininterval=1):
        batch = data.batch(part).to(predictor.device)
        if change is not None:
            batch = batch._replace(images=change(batch.images))
        hints = Hints(prompt=batch.prompt(), modality=batch.modality)
        with autocast(predictor.device, predictor.dtype):
            _, routings = predictor.model(batch.ids, batch.mask, batch.images, hints)
        logits = torch.stack([r.logits for r in routings], dim=1).float()  # (B, L, T, E)
        gates = torch.stack([r.gates for r in routings], dim=1)
        prompt = batch.prompt()[:, None, :, None].float()  # (B, 1, T, 1)
        best, first = (
            torch.nn.functional.one_hot(x.argmax(dim=-1), x.shape[-1]).float()
            for x in (logits, gates)
        )
        first = first * (gates.amax(dim=-1, keepdim=True) > 0)  # routed to no expert: no choice
        best = torch.einsum("kbt,blte->blke", kinds(batch).float(), best)
        mean = (logits * prompt).sum(dim=2) / prompt.sum(dim=2)
        parts.append([t.cpu() for t in (mean, best, (first * prompt).sum(dim=2))])
    place = torch.tensor([i for part in rows for i in part]).argsort()
    return Probe(*(torch.cat(found)[place] for found in zip(*parts, strict=True)))


class ByImage:
    """Which questions are about which image, and the true modality's index where it is known."""

    def __init__(self, samples: Sequence[Sample]):
        self.images = list(dict.fromkeys(s.image for s in samples))
        number = {image: i for i, image in enumerate(self.images)}
        self.of = np.array([number[s.image] for s in samples], int)  # (n,)
        known = {s.image: MODALITIES.index(s.modality) for s in samples if s.modality}
        self.truth = np.array([known.get(image, -1) for image in self.images], int)  # (G,)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """values (n, ...) -> sums over each image's questions, (G, ...)."""
        total = np.zeros((len(self.images), *values.shape[1:]))
        np.add.at(total, self.of, values)
        return total

    def mean(self, values: np.ndarray) -> np.ndarray:
        counts = np.bincount(self.of, minlength=len(self.images))
        return self.sum(values) / counts.reshape(-1, *[1] * (values.ndim - 1))


def blank(images: Tensor) -> Tensor:
    """CLIP's mean colour everywhere."""
    return torch.zeros_like(images)


def noise(images: Tensor) -> Tensor:
    """Random pixels, the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)
    return normalise(pixels).to(images)


def inverted(images: Tensor) -> Tensor:
    """Black for white."""
    ends = normalise(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)).to(images)
    return ends.sum(dim=-1, keepdim=True) - images


def scrambled(images: Tensor) -> Tensor:
    """Squares of an eighth of the side, shuffled."""
    side = images.shape[-1] // 8
    squares = images.unfold(2, side, side).unfold(3, side, side)  # (n, 3, a, a, side, side)
    n, c, a, b = squares.shape[:4]
    order = torch.randperm(a * b, generator=torch.Generator().manual_seed(0))
    squares = squares.reshape(n, c, a * b, side, side)[:, :, order].view(n, c, a, b, side, side)
    moved = images.clone()
    moved[:, :, : a * side, : b * side] = squares.transpose(3, 4).reshape(n, c, a * side, b * side)
    return moved


UNKNOWN = {f.__name__: f for f in (blank, noise, inverted, scrambled)}


def probabilities(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """logits (n, E) -> probabilities (n, E) and the largest of each, (n,)."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p, p.max(axis=-1)


def describe(logits: np.ndarray, known: np.ndarray | None) -> dict:
    """Confidence, predictions, and the AUROC of confidence against that of `known` images (n,)."""
    p, confidence = probabilities(logits)
    goes = np.bincount(logits.argmax(axis=-1), minlength=logits.shape[-1]) / len(logits)
    return {
        "n": len(logits), "confidence": float(confidence.mean()),
        "entropy_bits": float(entropy(p).mean()), "goes_to": goes.tolist(),
        "auroc": None if known is None else detects(known, confidence),
    }  # fmt: skip


def labelled(predictor: Predictor, samples: Sequence[Sample], n_images: int, seed: int) -> Features:
    """Hidden states to train a router on: one question of up to n_images labelled images."""
    config, part = predictor.model.config, one_per_image(samples, n_images, seed)
    where = sparse_layers(config, config.moe), seed, predictor.device, predictor.dtype
    return collect(predictor.model, part, predictor.text, *where)


def shuffled(train: Features, seed: int) -> Features:
    """The same features with the labels of other images."""
    order = torch.randperm(len(train[2]), generator=torch.Generator().manual_seed(seed))
    return *train[:2], train[2][order.to(train[2].device)]


def set_routers(predictor: Predictor, weights: dict[str, Tensor]) -> None:
    """Copy one router's weights into every sparse block."""
    for block in predictor.model.decoder.blocks:
        if block.is_sparse:
            block.mlp.router.proj.load_state_dict(weights)


def leave_out(train: Features, test: Features, n_experts: int, seed: int) -> dict:
    """Routers retrained on all modalities and on all but one; judged on the test images.

    Of the modality that was left out: the router's confidence, the experts it predicts, and the
    AUROC of confidence against the other modalities' images. "known": accuracy on those.
    """
    found = {}
    labels = sorted({int(m) for m in train[2].tolist()})
    for gone in (None, *(labels if len(labels) > 2 else ())):
        is_kept = train[2] != (-1 if gone is None else gone)
        part = tuple(t[is_kept] for t in train)
        weights, _ = train_router(part, test, n_experts, seed)
        logits = (test[0] @ weights["weight"].T + weights["bias"]).mean(dim=1).cpu().numpy()
        truth = test[2].cpu().numpy()
        is_known = np.isin(truth, [m for m in labels if m != gone])
        confidence = probabilities(logits[is_known])[1]
        is_right = logits.argmax(axis=-1) == truth % n_experts
        entry = {"known": share(is_right[is_known]), "known_confidence": float(confidence.mean())}
        is_gone = truth == gone
        if is_gone.any():
            entry |= describe(logits[is_gone], confidence)
        found["nothing" if gone is None else MODALITIES[gone]] = entry
    return found
