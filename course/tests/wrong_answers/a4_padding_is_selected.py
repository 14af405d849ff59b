"""Padding counts as real tokens and may be selected."""

import torch
from solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        return super().gate(logits, torch.ones_like(mask), x)
