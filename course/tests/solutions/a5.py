"""Assignment 5, balance without a loss (Wang et al. 2024, 2408.15664; DeepSeek-V3, 2412.19437)."""

import torch
from torch import Tensor

from routers import Router


class LossFree(Router):
    """Sigmoid scores; a bias that gets no gradient is added to them to choose the experts."""

    rate = 0.001  # the paper's u

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, level: str = "token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.register_buffer("bias", torch.zeros(n_experts))  # (E,)

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        scores = logits.sigmoid()
        experts = (scores + self.bias).topk(self.top_k, dim=-1).indices  # (B, T, k)
        return torch.zeros_like(scores).scatter(-1, experts, scores.gather(-1, experts))

    def update(self, load: Tensor) -> None:
        self.bias += self.rate * torch.sign(load.mean() - load)
