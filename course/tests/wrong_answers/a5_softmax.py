"""The scores are a softmax."""

import torch
from solutions.a5 import LossFree as Right


class LossFree(Right):
    def gate(self, logits, mask, x):
        scores = logits.softmax(dim=-1)
        experts = (scores + self.bias).topk(self.top_k, dim=-1).indices
        return torch.zeros_like(scores).scatter(-1, experts, scores.gather(-1, experts))
