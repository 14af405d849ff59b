"""Balance without a loss (Wang et al. 2024): a bias raises the scores of idle experts."""

import torch

from routers import Router


class LossFree(Router):
    rate = 0.01

    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.register_buffer("bias", torch.zeros(n_experts))

    def gate(self, logits, mask, x):
        scores = logits.sigmoid() + self.bias  # (B, T, E)
        chosen = scores.topk(self.top_k, dim=-1).indices  # (B, T, k)
        return torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))

    def update(self, load):
        self.bias += self.rate * (load.mean() - load).sign()
