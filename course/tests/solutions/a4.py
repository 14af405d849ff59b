"""Assignment 4, expert choice (Zhou et al. 2022, arXiv 2202.09368)."""

import torch
from torch import Tensor

from routers import Router


class ExpertChoice(Router):
    """Each expert selects the C tokens of a sample with the highest probability."""

    causal = False  # whether a token is selected depends on the tokens that come later
    at_most_k = False  # a token may be selected by any number of experts
    may_drop = True  # or by none

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        probs = logits.softmax(dim=-1)
        capacity = (self.top_k * mask.sum(dim=1) / probs.shape[-1]).ceil()  # (B,)
        score = probs.masked_fill(~mask[..., None], -1.0)  # padding ranks last
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, T, E)
        return torch.where(rank < capacity[:, None, None], probs, 0.0)
