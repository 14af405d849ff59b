"""Top-k for mixed precision: probabilities in bf16, the dtype of the experts."""

import torch

from routers import Router, top_k_gates


class Half(Router):
    def gate(self, logits, mask, x):
        probs = logits.softmax(dim=-1).to(torch.bfloat16)  # (B, T, E)
        return top_k_gates(probs, self.top_k).float()
