"""Expert choice (Zhou et al. 2022): each expert selects the tokens with its highest probabilities.

The load is balanced by construction: in a sample of n tokens each expert takes k * n / E.
"""

import math

from routers import Router


class ExpertChoice(Router):
    causal = False  # whether a token is selected depends on those after it
    at_most_k = False
    may_drop = True

    def gate(self, logits, mask, x):
        n_tokens, n_experts = logits.shape[1:]
        probs = logits.softmax(dim=-1)  # (B, T, E)
        capacity = math.ceil(self.top_k * n_tokens / n_experts)
        rank = probs.argsort(dim=1, descending=True).argsort(dim=1)  # (B, T, E), 0 for the best
        return probs.masked_fill(rank >= capacity, 0.0)
