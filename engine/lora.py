"""Low-rank additions to the FFNs, for --lora-rank r (LoRA, Hu et al. 2021; paper, Table 7).

    y = x W' + b + (alpha / r) (x A') B'        A (r, in), B (out, r); of experts (E, r, in), ...

A and B learn, W and b stay. B begins at 0, so that step 0 computes what was computed before.
Unfinished runs keep W, A and B; at the end of a phase W + (alpha / r) B A takes W's place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PHASES, DecoderConfig, UserError
from model import MedMoE

SCALE = 2.0  # alpha / r, as in LLaVA's scripts: r 128, alpha 256
ADDED = "decoder.*.lora_[ab]"
TRAINS = {1: PHASES[1].trains, 2: ("projector.*", ADDED), 3: (ADDED,)}  # instead of PHASES'


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank addition; its weight and bias keep their names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def recast(layer: nn.Linear, cls: type[nn.Linear]) -> nn.Linear:
    """The same parameters in a layer of another class."""
    other = cls(layer.in_features, layer.out_features, device="meta")
    other.weight, other.bias = layer.weight, layer.bias
    return other


def check_rank(rank: int, config: DecoderConfig) -> None:
    """Raises UserError for a rank that no FFN matrix can have."""
    largest = min(config.d_model, config.d_ff)
    if not 1 <= rank <= largest:
        raise UserError(f"--lora-rank {rank}: must be from 1 to {largest}, the FFNs' width")


def add_lora(model: MedMoE, rank: int, number: int) -> None:
    """Give A and B, in fp32, to what phase `number` trains of the FFNs: see TRAINS.

    That is every FFN in phase 2, the experts and the meta expert in phase 3, nothing in phase 1.
    """
    check_rank(rank, model.config.decoder)
    for block in model.decoder.blocks if number > 1 else ():
        if block.is_sparse:
            ffns = [part for part in (block.mlp.meta, block.mlp.experts) if part is not None]
        else:
            ffns = [block.mlp] if number == 2 else []
        for ffn in ffns:
            for name, layer in list(ffn.named_children()):
                if isinstance(layer, nn.Linear):  # else E of them, stacked: see ops.Layer
                    layer = recast(layer, LoRALinear)
                    setattr(ffn, name, layer)
                *experts, n_out, n_in = layer.weight.shape
                kind = {"dtype": torch.float32, "device": layer.weight.device}
                a = torch.empty(*experts, rank, n_in, **kind).uniform_(-1, 1) * n_in**-0.5
                layer.lora_a = nn.Parameter(a)
                layer.lora_b = nn.Parameter(torch.zeros(*experts, n_out, rank, **kind))
                layer.lora_scale = SCALE


@torch.no_grad()
def merge_lora(model: MedMoE) -> None:
    """Add (alpha / r) B A to the weights, rounding once; then A and B are gone."""
    for ffn in list(model.decoder.modules()):
        for name, layer in list(ffn.named_children()):
            if hasattr(layer, "lora_a"):
                added = SCALE * (layer.lora_b @ layer.lora_a)
                layer.weight.copy_(layer.weight.to(added.dtype) + added)
                del layer.lora_a, layer.lora_b, layer.lora_scale
                if isinstance(layer, LoRALinear):
                    setattr(ffn, name, recast(layer, nn.Linear))
