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

from decoder import PhiBlock
from engine.features import CachedTower
from engine.tinymed import ResidualMoE
from model import MedMoE


class Flops(NamedTuple):
    """FLOPs, forward and backward, of one of each; Run.count counts them in the same order."""

    image: int  # in the tower
    patch: int  # in the projector
    sample: int  # routers that decide once a sample
    position: int  # everything that all positions of the decoder go through
    pair: int  # of positions, in attention
    answer: int  # lm_head, at a supervised position
    routed: list[int]  # a token through one of its experts, by sparse block


def model_flops(model: MedMoE) -> Flops:
    """What this model costs with the parameters that are frozen now; the tower wholly or not."""
    vision, decoder, tuned = model.vision, model.decoder, trains(model.vision)
    cost = dict.fromkeys(Flops._fields, 0) | {"routed": []}
    if not isinstance(vision, CachedTower):  # else features are read from disk
        n_patches = model.config.vision.n_patches
        cost["image"] = n_patches * linear(vision.patch_embed, False)
        for block in vision.blocks:
            row, pair = attention(block, tuned)
            row += linear(block.fc1, tuned) + linear(block.fc2, tuned)
            cost["image"] += (n_patches + 1) * row + (n_patches + 1) ** 2 * pair
    cost["patch"] = ffn(model.projector, tuned)
    before = trains(vision, model.projector, decoder.embed)  # is anything trained before here?
    for block in decoder.blocks:
        is_phi = isinstance(block, PhiBlock)
        at_attn = before or trains(block.ln if is_phi else block.ln_1)
        at_mlp = at_attn or (not is_phi and trains(block.attn, block.ln_2))
        row, pair = attention(block.attn, at_attn)
        cost["position"] += row
        cost["pair"] += pair
        dense = [block.mlp]
        if block.is_sparse:
            moe, dense = block.mlp, [block.mlp.meta]
            cost["routed"].append(ffn(moe.experts, at_mlp))
            level = "sample" if moe.router.level == "sequence" else "position"
            cost[level] += linear(moe.router, at_mlp)
            if isinstance(moe, ResidualMoE):
                dense.append(moe.dense)
                cost["position"] += linear(moe.coefficient, at_mlp)
        cost["position"] += sum(ffn(mlp, at_mlp) for mlp in filter(None, dense))
        before = before or trains(block)
    cost["answer"] = linear(decoder.lm_head, before or trains(decoder.ln_f))
    return Flops(**cost)


def trains(*modules: nn.Module) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def linear(module: nn.Module, before: bool) -> int:
    """A row through the matrices of a layer; `before`: its input needs a gradient.

    There is one matrix; LoRA adds two, the second of which reads what the first has made. Stacked
    matrices are those of the experts: a routed token goes through one of them.
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
