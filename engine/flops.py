"""How many floating-point operations (FLOPs) a training step needs, and how many matmuls reach.

Useful FLOPs a second over what the machine's matmuls reach is the model FLOPs utilisation, MFU
(Chowdhery et al. 2022, appendix B). Counted are matrix products by the model's definition, 2 FLOPs
for a multiplication with its addition: forward, backward to the input where something trained lies
before it, and backward to weights that are trained. Padding is not useful, nor is what activation
checkpointing computes again. Attention counts every pair of a sample's positions, those that the
causal mask hides too, as is usual.

Letters are those of config.py.
"""

import statistics
import time
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from config import IMAGE_ID
from data import Batch
from decoder import PhiBlock
from model import Loss, MedMoE
from moe import MoE


class Flops(NamedTuple):
    """FLOPs, forward and backward, of one of each."""

    picture: int  # in the tower
    patch: int  # in the projector
    sample: int  # routers that decide once a sample
    position: int  # what every position of the decoder goes through
    pair: int  # of positions, in attention
    visits: list[int]  # to an expert, by sparse block
    answer: int  # lm_head, at a supervised position

    def of(self, batch: Batch, out: Loss) -> int:
        """FLOPs of a micro-batch and what the model made of it; waits for a GPU."""
        counts = [(batch.ids == IMAGE_ID).sum(), *((r.gates != 0).sum() for r in out.routings)]
        patches, *visits = torch.stack(counts).tolist()
        lengths = batch.mask.sum(dim=1).tolist()  # of real positions
        return (
            len(batch.images) * self.picture
            + patches * self.patch
            + len(lengths) * self.sample
            + sum(lengths) * self.position
            + sum(n * n for n in lengths) * self.pair
            + sum(n * cost for n, cost in zip(visits, self.visits, strict=True))
            + out.n_tokens * self.answer
        )


def model_flops(model: MedMoE) -> Flops:
    """What this model costs with the parameters that are frozen now; the tower wholly or not."""
    vision, tuned = model.vision, trains(model.vision)
    n_patches = model.config.vision.n_patches
    picture = n_patches * linear(vision.patch_embed, False)
    for block in vision.blocks:
        row, pair = attention(block, tuned)
        row += linear(block.fc1, tuned) + linear(block.fc2, tuned)
        picture += (n_patches + 1) * row + (n_patches + 1) ** 2 * pair
    patch = ffn(model.projector, tuned)
    decoder = model.decoder
    before = trains(vision, model.projector, decoder.embed)  # is anything trained before here?
    sample, position, pairs, visits = 0, 0, 0, []
    for block in decoder.blocks:
        if isinstance(block, PhiBlock):
            at_attn = at_mlp = before or trains(block.ln)
        else:
            at_attn = before or trains(block.ln_1)
            at_mlp = at_attn or trains(block.attn, block.ln_2)
        row, pair = attention(block.attn, at_attn)
        position, pairs = position + row, pairs + pair
        if block.is_sparse:
            visits.append(ffn(block.mlp.experts, at_mlp))
            position += always_on(block.mlp, at_mlp)
            decision = linear(block.mlp.router, at_mlp)
            if block.mlp.router.level == "sequence":
                sample += decision
            else:
                position += decision
        else:
            position += ffn(block.mlp, at_mlp)
        before = before or trains(block)
    answer = linear(decoder.lm_head, before or trains(decoder.ln_f))
    return Flops(picture, patch, sample, position, pairs, visits, answer)


def trains(*modules: nn.Module) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def linear(module: nn.Module, before: bool) -> int:
    """A row through the matrices of a layer; `before`: its input needs a gradient.

    There is one matrix; LoRA adds two, the second of which reads what the first has made. Stacked
    matrices are those of the experts, of which a visit takes one.
    """
    total = 0
    for name, param in module.named_parameters():
        if not name.endswith("bias"):
            size = param.numel() // (param.shape[0] if param.dim() == 3 else 1)
            total += 2 * size * (1 + before + param.requires_grad)
            before = before or param.requires_grad
    return total


def attention(attn: nn.Module, before: bool) -> tuple[int, int]:
    """A position through q, k, v and o; a pair of positions through q k' and softmax(..) v."""
    inside = before or trains(attn.q, attn.k, attn.v)
    row = sum(linear(f, before) for f in (attn.q, attn.k, attn.v)) + linear(attn.o, inside)
    return row, 2 * 2 * attn.q.out_features * (1 + 2 * inside)


def ffn(mlp: nn.Module, before: bool) -> int:
    """A row through fc1 and fc2, or gate, up and down: the last reads what the others made."""
    *first, last = mlp.children()
    return sum(linear(f, before) for f in first) + linear(last, before or trains(*first))


def always_on(moe: MoE, before: bool) -> int:
    """A position through what stands beside the experts, where it is there."""
    total = sum(ffn(part, before) for part in (moe.meta, moe.dense) if part is not None)
    return total + (linear(moe.coefficient, before) if moe.coefficient is not None else 0)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second that square matmuls reach: the median of about 0.3 s of them, kept."""
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device)  # the run's own is left as it is
    a, b = torch.randn(2, n, n, device=device, dtype=dtype, generator=generator)
    seconds = []
    while sum(seconds[1:]) < 0.3:  # the first one warms up
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[1:])
