"""The two probabilities that are kept are not rescaled."""

import torch
from solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def gate(self, logits, mask, x):
        kept, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, experts, kept)
