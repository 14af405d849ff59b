"""A softmax over the k kept logits."""

import torch
from solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    def gate(self, logits, mask, x):
        if self.top_k == 1:
            return super().gate(logits, mask, x)
        kept, experts = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, experts, kept.softmax(dim=-1))
