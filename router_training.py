"""The second half of phase 2: train one linear layer to classify an image's modality.

The dense model is frozen. The inputs of every FFN that will become sparse are collected: the
normalised hidden states, pooled over the prompt (for a decision per sample) and at a few single
positions from the image on (for a decision per token). One Linear(d_model, E) learns the modality
from all of them (paper, equation 3); phase 3 copies it into every MoE layer. (The released notebook
averages over all layers and positions, before normalisation.)

Shapes: B batch, T positions, D d_model, E experts, L sparse layers, M sampled positions.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import MODALITIES, TrainConfig
from data import Batch, Dataset, Sample, Text
from metrics import expert_names, format_confusion, router_report
from model import MedMoE, autocast
from routers import Hints, pool
from sources.images import Images

N_POSITIONS = 4  # M: single positions taken from each sample and layer
# Of n samples: pooled (n, L, D), single (n, L, M, D), truth (n,) indices of MODALITIES.
Features = tuple[Tensor, Tensor, Tensor]


def by_modality(samples: Iterable[Sample], rng: random.Random) -> dict[str | None, list]:
    """Modality -> the samples of each image together, the images shuffled."""
    images: dict[object, list[Sample]] = {}
    for sample in samples:
        key = (sample.source, sample.id) if sample.image is None else sample.image
        images.setdefault(key, []).append(sample)
    strata: dict[str | None, list[list[Sample]]] = {}
    for group in images.values():
        strata.setdefault(group[0].modality, []).append(group)
    for groups in strata.values():
        rng.shuffle(groups)
    return strata


def hold_out(samples: Iterable[Sample], share: float, seed: int) -> tuple[list, list]:
    """Split by image into (kept, held out), the same share of each modality."""
    kept, held = [], []
    for groups in by_modality(samples, random.Random(seed)).values():
        n = min(max(round(share * len(groups)), 1), len(groups) - 1)
        held += chain.from_iterable(groups[:n])
        kept += chain.from_iterable(groups[n:])
    return kept, held


def one_per_image(samples: Iterable[Sample], n: int, seed: int) -> list[Sample]:
    """Up to n images of known modality, in turn from each modality, with one sample each."""
    rng = random.Random(seed)
    strata = by_modality((s for s in samples if s.modality and s.image is not None), rng)
    in_turn = chain.from_iterable(zip_longest(*strata.values()))  # None where one has run out
    return [rng.choice(group) for group in in_turn if group][:n]


@torch.no_grad()
def ffn_inputs(model: MedMoE, batch: Batch, layers: Sequence[int]) -> Tensor:
    """The inputs of the FFNs of these blocks, (L, B, T, D) in fp32."""
    inputs: list[Tensor] = []
    ffns = [model.decoder.blocks[i].mlp for i in layers]
    hooks = [ffn.register_forward_pre_hook(lambda _, x: inputs.append(x[0].float()))
             for ffn in ffns]  # fmt: skip
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks call no new hooks
            model(batch.ids, batch.mask, batch.images, Hints())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(inputs)


def router_inputs(
    model: MedMoE, batch: Batch, layers: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-> pooled prompts (B, L, D) and single positions (B, L, M, D)."""
    x = ffn_inputs(model, batch, layers)  # (L, B, T, D)
    prompt = batch.prompt()
    pooled = torch.stack([pool(layer, prompt)[:, 0] for layer in x], dim=1)  # (B, L, D)
    after = batch.prompt_from_image().float().cpu()
    picks = torch.multinomial(after, N_POSITIONS, generator=generator)  # (B, M)
    picks = picks.to(x.device)
    sample = torch.arange(len(picks), device=x.device)[:, None]  # (B, 1)
    return pooled, x[:, sample, picks].transpose(0, 1)


def collect(
    model: MedMoE, samples: Sequence[Sample], text: Text, layers: Sequence[int], seed: int,
    device: torch.device, dtype: torch.dtype,
) -> Features:  # fmt: skip
    """The router inputs and labels of all samples."""
    images = Images(model.config.vision.image_size)
    data = Dataset(samples, text, model.config, plain=False, images=images, max_bad=len(samples))
    if not data.samples:  # as of those held out, if there is one image of each modality
        shape = 0, len(layers), N_POSITIONS, model.config.decoder.d_model
        single = torch.zeros(shape, device=device)
        return single[:, :, 0], single, torch.zeros(0, dtype=torch.long, device=device)
    generator, found = torch.Generator().manual_seed(seed), []
    parts = torch.arange(len(data.samples)).split(64)
    for rows in tqdm(parts, desc="router features", file=sys.stderr, mininterval=1):
        batch = data.batch(rows.tolist()).to(device)
        with autocast(device, dtype):
            found.append((*router_inputs(model, batch, layers, generator), batch.modality))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def train_router(
    train: Features, held_out: Features, n_experts: int, seed: int, epochs: int = 60
) -> tuple[dict[str, Tensor], dict]:
    """Adam on the cross-entropy of single decisions -> the weights, and a report on held_out."""
    pooled, single, truth = train
    x = torch.cat([pooled[:, :, None], single], dim=2)  # (n, L, 1 + M, D)
    # With fewer experts than modalities some share an expert.
    y = (truth % n_experts)[:, None, None].expand(x.shape[:3]).flatten()
    x = x.flatten(0, 2)  # (n * L * (1 + M), D)
    torch.manual_seed(seed)
    linear = nn.Linear(pooled.shape[-1], n_experts).to(x.device)
    optimizer = torch.optim.Adam(linear.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device="cpu").to(x.device).split(512):
            F.cross_entropy(linear(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: p.detach() for name, p in linear.named_parameters()}
    return weights, evaluate_router(linear, held_out, n_experts)


@torch.no_grad()
def evaluate_router(linear: nn.Linear, held_out: Features, n_experts: int) -> dict:
    """Sample level: mean logits over the layers; token level: each single position by itself."""
    pooled, single, truth = held_out
    truth = truth % n_experts
    predicted = linear(pooled).mean(dim=1).argmax(dim=-1)  # (n,)
    report = router_report(truth.tolist(), predicted.tolist(), expert_names(n_experts))
    right = linear(single).argmax(dim=-1) == truth[:, None, None]  # (n, L, M)
    report["token_accuracy"] = right.float().mean().item() if len(truth) else 0.0
    return report


def mislabel(samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """A random share of the samples, each with another modality than its own, uniformly chosen."""
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(samples)), round(share * len(samples))))
    return [
        replace(s, modality=rng.choice([m for m in MODALITIES if m != s.modality]))
        if i in wrong else s
        for i, s in enumerate(samples)
    ]  # fmt: skip


def learn_router(
    model: MedMoE, samples: Sequence[Sample], text: Text, flags: TrainConfig,
    layers: Sequence[int], device: torch.device, dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict]:  # fmt: skip
    """Train on one question an image, a fifth of them held out -> weights, report; or {}, {}.

    layers: the blocks that will be sparse.
    """
    labelled = one_per_image(samples, flags.router_images, flags.seed)
    train_samples, held_out = hold_out(labelled, 0.2, flags.seed)
    if not train_samples:
        print("phase 2: no sample has a modality, so there is no router to train")
        return {}, {}
    if flags.router_noise:
        train_samples = mislabel(train_samples, flags.router_noise, flags.seed)
    train_features, held_out_features = (
        collect(model, part, text, layers, flags.seed, device, dtype)
        for part in (train_samples, held_out)
    )
    n_experts = flags.experts or len(MODALITIES)
    weights, report = train_router(train_features, held_out_features, n_experts, flags.seed)
    print(f"router: {len(train_samples)} labels; on {report['n']} held-out images "
          f"{report['accuracy']:.1%}, single positions {report['token_accuracy']:.1%}")  # fmt: skip
    print(format_confusion(report))
    return weights, report
