"""Top-k with the z-loss (Zoph et al. 2022, equation 5), summed over the calls of a step.

A step may have several calls, since gradient accumulation splits the batch.
"""

import torch

from routers import TopKRouter


class Tracked(TopKRouter):
    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.calls = []

    def penalty(self, gates, logits, mask, x):
        self.calls.append(logits[mask].logsumexp(dim=-1).square().sum() / mask.sum().clamp(min=1))
        return torch.stack(self.calls).sum()

    def update(self, load):
        self.calls.clear()
