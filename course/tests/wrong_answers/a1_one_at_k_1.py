"""A softmax over the k kept logits, also at k = 1, where it is 1."""

import torch
import torch.nn.functional as F
from solutions.a1 import NoisyTopK as Right


class NoisyTopK(Right):
    def gate(self, logits, mask, x):
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        kept, experts = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, experts, kept.softmax(dim=-1))
