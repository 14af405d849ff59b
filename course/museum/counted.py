"""Balance without a loss, with the load counted in `gate` instead of passed to `update`."""

import torch

from routers import Router


class Counted(Router):
    rate = 0.01

    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.register_buffer("bias", torch.zeros(n_experts))
        self.register_buffer("count", torch.zeros(n_experts))

    def gate(self, logits, mask, x):
        scores = logits.sigmoid()  # (B, T, E)
        chosen = (scores + self.bias).topk(self.top_k, dim=-1).indices  # (B, T, k)
        gates = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        if self.training:
            self.count += (gates != 0)[mask].sum(dim=0)
        return gates

    def update(self, load):
        self.bias += self.rate * (self.count.mean() - self.count).sign()
        self.count.zero_()
