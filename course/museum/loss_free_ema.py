"""Balance without a loss, by a running mean of the load instead of the last step's."""

import torch

from routers import Router


class LossFreeEMA(Router):
    rate, decay = 0.01, 0.9

    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.register_buffer("mean_load", torch.full((n_experts,), top_k / n_experts))
        self.bias = torch.zeros(n_experts)

    def gate(self, logits, mask, x):
        scores = logits.sigmoid()  # (B, T, E)
        chosen = (scores + self.bias).topk(self.top_k, dim=-1).indices  # (B, T, k)
        return torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))

    def update(self, load):
        self.mean_load.lerp_(load, 1 - self.decay)
        self.bias += self.rate * (self.mean_load.mean() - self.mean_load).sign()
