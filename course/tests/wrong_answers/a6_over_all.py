"""The scores are divided by the sum over all experts."""

import torch
from solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    def gate(self, logits, mask, x):
        scores = logits.sigmoid()
        gates = super().gate(logits, mask, x)
        return torch.where(gates != 0, scores / scores.sum(dim=-1, keepdim=True), 0.0)
