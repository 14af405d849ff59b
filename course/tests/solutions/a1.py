"""Assignment 1, noisy top-k (Shazeer et al. 2017, arXiv 1701.06538)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routers import Router


class NoisyTopK(Router):
    """Noise on the logits in training; a softmax over the k largest."""

    weight = 0.1  # of the penalty; the paper's w_importance

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, level: str = "token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.noise = nn.Linear(d_model, n_experts, bias=False)  # x W_noise
        nn.init.zeros_(self.noise.weight)  # as in the paper: softplus(0) for every token at first

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        kept, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)  # both (B, T, k)
        if self.top_k > 1:  # a softmax over the k kept logits; over one it would always be 1
            kept = kept / kept.sum(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, experts, kept)

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        importance = gates.sum(dim=(0, 1))  # (E,)
        return self.weight * importance.var(correction=0) / (importance.mean() ** 2 + 1e-10)
