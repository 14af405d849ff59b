"""Assignment 7, one route per question (Med-MoE, arXiv 2404.10237; LIMoE, 2206.02770)."""

import math
from typing import ClassVar

from torch import Tensor

from routers import Router, Routing, pool, top_k_gates


class OneRoute(Router):
    """One decision per sample, from the mean logits of its prompt; the answer keeps it."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "previous")
    weight = 0.01  # of the penalty

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(
        self, logits: Tensor, mask: Tensor, x: Tensor,
        prompt: Tensor | None, previous: Routing | None,
    ) -> Tensor:  # fmt: skip
        if previous is not None:
            return previous.gates.expand(-1, logits.shape[1], -1)
        pooled = pool(logits, mask if prompt is None else mask & prompt)  # (B, 1, E)
        gates = top_k_gates(pooled.softmax(dim=-1), self.top_k)
        return gates.expand(-1, logits.shape[1], -1)

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        probs = logits[mask].softmax(dim=-1)  # (N, E)
        n = max(len(probs), 1)
        local = entropy(probs).sum() / n
        return self.weight * (local + math.log(probs.shape[-1]) - entropy(probs.sum(dim=0) / n))


def entropy(probs: Tensor) -> Tensor:  # (..., E) -> (...)
    return -(probs * probs.clamp(min=1e-9).log()).sum(dim=-1)
