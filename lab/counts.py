"""What Med-MoE and dense models of as many parameters cost, by count: parameters and FLOPs.

Variants differ in the FFNs of every second block: one FFN ("dense"), experts with or without a
meta expert, or one FFN three or five times as wide, which has the parameters that top-2 and meta
activate, or has in all. Counted are tower, projector and decoder, by formula; tests build the
models and count. "Touched" are the parameters that a whole answer uses at least once, if each of
its tokens is routed by itself and every expert gets some.
"""

from typing import NamedTuple

import torch
from torch import nn

from config import ModelConfig, MoEConfig, preset
from engine.flops import model_flops
from lab import memory
from lab.bench import MID
from model import MedMoE, make_sparse

SEVEN_B = 7_000_000_000  # the model whose cost the paper compares with
PROMPT, ANSWER = 64, 16  # text positions of a question at full size, tokens of its answer


class Variant(NamedTuple):
    """What stands in every second block."""

    title: str
    moe: MoEConfig | None = None
    width: int = 1  # of a dense FFN, in FFNs


VARIANTS = {
    "dense": Variant("dense"),
    "medmoe": Variant("top-2 of 4 and meta", MoEConfig(router="topk")),
    "top-1": Variant("top-1 of 4 and meta", MoEConfig(router="topk", top_k=1)),
    "no-meta": Variant("top-2 of 4", MoEConfig(router="topk", meta=False)),
    "wide-3": Variant("dense, 3 wide: as many activated", width=3),
    "wide-5": Variant("dense, 5 wide: as many in all", width=5),
}


def dimensions(name: str) -> ModelConfig:
    return MID if name == "mid" else preset(name).model


def build(config: ModelConfig, variant: Variant, device: str = "cpu") -> MedMoE:
    """Random weights. On "meta" nothing is initialised or allocated."""
    with torch.device(device):
        model = MedMoE(config)
        d = config.decoder
        for block in model.decoder.blocks[::2]:
            if variant.width > 1:
                block.mlp = type(block.mlp)(d.d_model, variant.width * d.d_ff)
        if variant.moe:
            make_sparse(model, variant.moe)
    for name, param in model.named_parameters():
        if name.endswith("router.proj.weight"):
            nn.init.normal_(param)
    return model


def ffn_size(config: ModelConfig, width: int = 1) -> int:
    d = config.decoder
    hidden = width * d.d_ff
    if d.family == "phi":
        return 2 * d.d_model * hidden + hidden + d.d_model
    return 3 * d.d_model * hidden


def parameters(config: ModelConfig, variant: Variant) -> dict[str, int]:
    """By formula: all, those a token activates, those an answer touches at token level."""
    d, v = config.decoder, config.vision
    base = memory.rest(config, 0, 2, 0).stored
    base += (v.n_layers - 1) * memory.tower_block(v).dense.stored
    base += sum(memory.decoder_block(d, 0, 2, i, 0).dense.stored for i in range(d.n_layers))
    n_sparse, one = (d.n_layers + 1) // 2, ffn_size(config)
    if (moe := variant.moe) is None:
        total = base + n_sparse * (ffn_size(config, variant.width) - one)
        return {"total": total, "activated": total, "touched": total}
    router = moe.n_experts * (d.d_model + 1)
    rest = base + n_sparse * (router + (one if moe.meta else 0) - one)
    of = {"total": moe.n_experts, "activated": moe.top_k, "touched": moe.n_experts}
    return {name: rest + n_sparse * n * one for name, n in of.items()}


def flops(config: ModelConfig, variant: Variant, n_text: int, n_answer: int) -> dict[str, int]:
    """Of one image and its question, and of a token of the answer, the mean over its length."""
    model = build(config, variant, "meta").requires_grad_(False)
    cost, n_patches = model_flops(model), config.vision.n_patches
    routed = sum(cost.routed) * (variant.moe.top_k if variant.moe else 0)
    length = n_patches + n_text
    prefill = cost.image + n_patches * cost.patch + length * (cost.position + routed)
    prefill += length * length * cost.pair + cost.answer
    middle = length + (n_answer + 1) / 2
    return {"prefill": prefill,
            "token": round(cost.position + routed + middle * cost.pair + cost.answer)}  # fmt: skip


def count(name: str) -> dict:
    """Every variant's parameters and FLOPs, and three shares that "activated" can be of."""
    config, found = dimensions(name), {}
    dense = parameters(config, VARIANTS["dense"])["total"]
    for key, variant in VARIANTS.items():
        size = parameters(config, variant)
        found[key] = size | {"flops": flops(config, variant, PROMPT, ANSWER)}
        found[key]["share"] = {"own total": size["activated"] / size["total"],
                               "dense base": size["activated"] / dense,
                               "7 B": size["activated"] / SEVEN_B}  # fmt: skip
    return found


def show_counts(name: str, found: dict) -> str:
    lines = [
        f"{name}: parameters in millions, GFLOP (an image and {PROMPT} tokens; a token of the "
        "answer), activated share",
        f"{'':34}{'total':>9}{'activated':>11}{'touched':>9}{'prefill':>11}{'token':>9}"
        f"{'own total':>11}{'of dense':>10}{'of 7 B':>9}",
    ]
    for key, row in found.items():
        total, activated, touched = (row[k] / 1e6 for k in ("total", "activated", "touched"))
        sizes = f"{total:>9,.2f}{activated:>11,.2f}{touched:>9,.2f}"
        work = f"{row['flops']['prefill'] / 1e9:>11,.3f}{row['flops']['token'] / 1e9:>9,.4f}"
        own, base, seven = row["share"].values()
        shares = f"{own:>11.1%}{base:>10.1%}{seven:>9.2%}"
        lines.append(f"  {VARIANTS[key].title:<32}{sizes}{work}{shares}")
    return "\n".join(lines)
