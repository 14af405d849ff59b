"""No token is ever dropped."""

import torch
from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        probs = logits.softmax(dim=-1)
        best, expert = probs.max(dim=-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, expert, best)
