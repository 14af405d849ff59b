"""Assignment 8, ReLU routing (Wang et al. 2024, ReMoE, arXiv 2412.14711)."""

import torch
from torch import Tensor

from routers import Router


class ReLU(Router):
    """gates = relu(logits); an L1 penalty of adaptive strength aims at k experts per token."""

    at_most_k = False  # k is what the penalty aims at, not a bound
    may_drop = True  # a token may have no positive logit
    factor = 1.2  # the paper's alpha

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, level: str = "token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.register_buffer("coefficient", torch.tensor(1e-8))  # the paper's lambda_0

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return logits.relu()

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return self.coefficient * gates.sum() / mask.sum().clamp(min=1)

    def update(self, load: Tensor) -> None:
        self.coefficient *= self.factor ** torch.sign(load.sum() - self.top_k)
