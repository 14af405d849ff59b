"""Noisy top-k gating (Shazeer et al. 2017): noise of learned scale, so all experts get tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from routers import Router, top_k_gates


class NoisyTopK(Router):
    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.scale = nn.Linear(d_model, n_experts)

    def gate(self, logits, mask, x):
        scale = F.softplus(self.scale(x))  # (B, T, E)
        noisy = logits + scale * torch.randn_like(logits)
        return top_k_gates(noisy.softmax(dim=-1), self.top_k)
