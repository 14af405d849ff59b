"""The Switch router (Fedus et al. 2021): each token is routed to its likeliest experts.

The gates of a token sum to 1, so that the size of the layer's output does not depend on k.
"""

import torch

from routers import Router


class Switch(Router):
    sums_to_one = True

    def gate(self, logits, mask, x):
        probs = logits.softmax(dim=-1)  # (B, T, E)
        top_p, top_e = probs.topk(self.top_k, dim=-1)  # both (B, T, k)
        top_p = top_p / top_p.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, top_e, top_p)
