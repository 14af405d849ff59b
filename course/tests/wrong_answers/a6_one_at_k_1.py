"""A single score is rescaled too."""

import torch
from solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    def gate(self, logits, mask, x):
        kept, experts = logits.sigmoid().topk(self.top_k, dim=-1)
        kept = kept / kept.sum(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, experts, kept)
