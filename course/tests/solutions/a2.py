"""Assignment 2, Switch with a capacity (Fedus et al. 2021, arXiv 2101.03961)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from routers import Router


class Switch(Router):
    """Top-1 with the raw probability as the gate; in training an expert takes at most C tokens."""

    capacity_factor = 1.25
    weight = 0.01  # of the penalty; the paper's alpha

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        probs = logits.softmax(dim=-1).masked_fill(~mask[..., None], 0.0)
        best, expert = probs.max(dim=-1, keepdim=True)  # both (B, T, 1)
        gates = torch.zeros_like(probs).scatter(-1, expert, best)
        if not self.training:
            return gates
        capacity = (self.capacity_factor * mask.sum(dim=1) / probs.shape[-1]).ceil()  # (B,)
        order = gates.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)  # (B, T, E), of a token among its expert's tokens
        return gates.masked_fill(rank >= capacity[:, None, None], 0.0)

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        probs = logits[mask].softmax(dim=-1)  # (N, E)
        n = max(len(probs), 1)
        share = F.one_hot(probs.argmax(dim=-1), probs.shape[-1]).float().sum(dim=0) / n  # (E,)
        return self.weight * probs.shape[-1] * (share * probs.sum(dim=0) / n).sum()
