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

from engine.features import CachedTower
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


# Parts of a layer that read the same input; in a Phi block, attention and FFN do, too.
BESIDE = [{"q", "k", "v"}, {"gate", "up"}, {"cls", "positions", "patch_embed"},
          {"router", "meta", "experts", "dense", "coefficient"}]  # fmt: skip


def model_flops(model: MedMoE) -> Flops:
    """What this model costs with the parameters that are frozen now."""
    config = model.config
    beside = BESIDE + [{"attn", "mlp"}] * (config.decoder.family == "phi")
    n_rows = config.vision.n_patches + 1  # with CLS
    cost, routed, trained = dict.fromkeys(Flops._fields, 0), {}, []
    for name, param in model.named_parameters(remove_duplicate=False):
        module, *path = name.split(".")
        is_looked_up = name in ("vision.positions", "decoder.embed.weight")
        is_matrix = param.dim() > 1 and path[-1] != "bias" and not is_looked_up
        if is_matrix and not (module == "vision" and isinstance(model.vision, CachedTower)):
            before = any(is_upstream(other, name, beside) for other in trained)
            flops = 2 * param.numel() * (1 + before + param.requires_grad)
            pair = 2 * 2 * param.shape[1] * (1 + 2 * before) if path[-2] == "o" else 0  # q k', w v
            if module == "vision":
                cost["image"] += flops * (n_rows - (path[0] == "patch_embed")) + pair * n_rows**2
            elif module == "projector":
                cost["patch"] += flops
            elif path[0] == "lm_head":
                cost["answer"] += flops
            elif "experts" in path:
                routed[path[1]] = routed.get(path[1], 0) + flops // len(param)
            elif (
                "router" in path and model.decoder.blocks[int(path[1])].mlp.router.level != "token"
            ):
                cost["sample"] += flops
            else:
                cost["position"] += flops
                cost["pair"] += pair
        if param.requires_grad:
            trained.append(name)
    return Flops(**cost | {"routed": list(routed.values())})


def is_upstream(first: str, second: str, beside: list[set[str]]) -> bool:
    """Does the second parameter's layer read what the first, an earlier one, has computed?"""
    pairs = zip(first.split("."), second.split("."), strict=False)
    parted = next({a, b} for a, b in pairs if a != b)
    return not any(parted <= group for group in beside)


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
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[1:])
