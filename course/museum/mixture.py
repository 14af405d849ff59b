"""Mixtral's router (Jiang et al. 2024): softmax over the k largest scores."""

import torch

from routers import Router


class Mixture(Router):
    """At k = 1 the gate is the probability among all experts, as in the released Med-MoE."""

    def gate(self, logits, mask, x):
        scores = logits.softmax(dim=-1)  # (B, T, E)
        top, top_e = scores.topk(self.top_k, dim=-1)  # both (B, T, k)
        weights = scores.gather(-1, top_e) if self.top_k == 1 else top.softmax(dim=-1)
        return torch.zeros_like(scores).scatter(-1, top_e, weights)
