"""The capacity is computed from all T positions, padding included."""

import torch
from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        return super().gate(logits, torch.ones_like(mask), x)
