"""LoRA in the FFNs, for --lora-rank r (Hu et al. 2021; paper, Table 7).

    y = x W' + b + (alpha / r) (x A') B'        A (r, in), B (out, r); of experts (E, r, in), ...

A and B are trained, W and b are frozen. B starts at 0, so that step 0 computes what was computed
before. Unfinished runs save W, A and B; at the end of a phase W becomes W + (alpha / r) B A.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PHASES
from model import MedMoE
from moe import Experts

SCALE = 2.0  # alpha / r, as in LLaVA's scripts: r 128, alpha 256
ADDED = "decoder.*.lora_[ab]"
TRAINS = {1: PHASES[1].trains, 2: ("projector.*", ADDED), 3: (ADDED,)}  # instead of PHASES'


class LoRALinear(nn.Linear):
    """A linear layer with LoRA: a layer's class is changed to this one and back, in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: MedMoE, rank: int, number: int) -> None:
    """Give A and B, in fp32, to what phase `number` trains of the FFNs: see TRAINS.

    That is every FFN in phase 2, the experts and the meta expert in phase 3, nothing in phase 1.
    """
    for block in model.decoder.blocks if number > 1 else ():
        dense = [block.mlp] if number == 2 else []
        ffns = [block.mlp.meta, block.mlp.experts] if block.is_sparse else dense
        for ffn in filter(None, ffns):
            add_to_ffn(ffn, rank)


def add_to_ffn(ffn: nn.Module, rank: int) -> None:
    """A dense FFN's layers, or the stacked ones of experts and the one FFN they are computed by."""
    for name, layer in ffn.named_children():
        *experts, n_out, n_in = layer.weight.shape
        kind = {"dtype": torch.float32, "device": layer.weight.device}
        a = torch.empty(*experts, rank, n_in, **kind).uniform_(-1, 1) * n_in**-0.5
        b = torch.zeros(*experts, n_out, rank, **kind)
        layer.lora_a, layer.lora_b = nn.Parameter(a), nn.Parameter(b)
        if isinstance(ffn, Experts):
            layer.lora_scale = SCALE
            layer = getattr(ffn.ffn[0], name)
            layer.lora_a, layer.lora_b = (nn.Parameter(t[0].to("meta")) for t in (a, b))
        layer.__class__ = LoRALinear


@torch.no_grad()
def merge_lora(model: MedMoE) -> None:
    """Add (alpha / r) B A to the weights, rounding once; then A and B are gone."""
    for ffn in model.decoder.modules():
        for name, layer in ffn.named_children():
            if hasattr(layer, "lora_a"):
                added = SCALE * (layer.lora_b @ layer.lora_a)
                layer.weight.copy_(layer.weight.to(added.dtype) + added)
                linear = getattr(ffn.ffn[0], name) if isinstance(ffn, Experts) else layer
                linear.__class__ = nn.Linear
                for part in {layer, linear}:
                    del part.lora_a, part.lora_b
