"""The gate is the score plus the bias."""

import torch
from solutions.a5 import LossFree as Right


class LossFree(Right):
    def gate(self, logits, mask, x):
        kept, experts = (logits.sigmoid() + self.bias).topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, experts, kept)
