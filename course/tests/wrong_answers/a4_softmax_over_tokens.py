"""The softmax is over the positions."""

import torch
from solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        chosen = super().gate(logits, mask, x) != 0
        probs = logits.masked_fill(~mask[..., None], -1e9).softmax(dim=1)
        return torch.where(chosen, probs, 0.0)
