"""Assignment 6, sigmoid gates (DeepSeek-V3, arXiv 2412.19437; Nguyen et al. 2024, 2405.13997)."""

import torch
from torch import Tensor

from routers import Router


class Sigmoid(Router):
    """Sigmoid scores, the k largest of them rescaled to sum to 1."""

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        kept, experts = logits.sigmoid().topk(self.top_k, dim=-1)  # both (B, T, k)
        if self.top_k > 1:  # at k = 1 every gate would be 1, whatever the logits
            kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return torch.zeros_like(logits).scatter(-1, experts, kept)
