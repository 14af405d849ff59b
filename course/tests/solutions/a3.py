"""Assignment 3, the router z-loss (Zoph et al. 2022, arXiv 2202.08906)."""

from torch import Tensor

from routers import Router, top_k_gates


class ZLoss(Router):
    """Top-k with a penalty that keeps the logits small."""

    weight = 0.001  # of the penalty; the paper's c_z

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return top_k_gates(logits.softmax(dim=-1), self.top_k)

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        z = logits.logsumexp(dim=-1).square()  # (B, T)
        return self.weight * (z * mask).sum() / mask.sum().clamp(min=1)
