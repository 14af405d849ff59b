"""Assignment 5, balance without a loss (Wang et al. 2024, 2408.15664; DeepSeek-V3, 2412.19437).

The page is a5_loss_free.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

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
        """s = sigmoid(logits); the k largest of s + bias are chosen, each with gate s."""
        raise NotImplementedError("not implemented yet")

    def update(self, load: Tensor) -> None:
        """bias += rate * sign(mean load - load)."""
        raise NotImplementedError("not implemented yet")
