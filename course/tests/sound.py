"""Correct routers of other kinds than those in routers.py: no check of the contract may fail.

tests/test_contract.py runs every check on them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from routers import Router, Routing, TopKRouter, load_balancing_loss, top_k_gates


class ReLU(Router):
    """Wang et al. 2024: positive logits are gates; an L1 penalty keeps their number near k."""

    at_most_k = False
    may_drop = True

    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.register_buffer("coefficient", torch.tensor(1e-3))

    def gate(self, logits, mask, x):
        return logits.relu()

    def penalty(self, gates, logits, mask, x):
        return self.coefficient * gates.sum() / mask.sum().clamp(min=1)

    def update(self, load):
        self.coefficient.mul_(1.2 if load.sum() > self.top_k else 1 / 1.2)


class Hash(Router):
    """The expert is a hash of the hidden state: no parameter is learned."""

    frozen = True
    sums_to_one = True

    def gate(self, logits, mask, x):
        key = (x * torch.arange(1, x.shape[-1] + 1)).sum(dim=-1)  # (B, T)
        return F.one_hot((1000 * key).long().abs() % logits.shape[-1], logits.shape[-1]).float()


class Sinkhorn(Router):
    """Chooses by logits balanced over the real tokens of the batch; the gates are sigmoids."""

    causal = False
    batch_invariant = False

    def gate(self, logits, mask, x):
        plan, padding = logits, ~mask[..., None]
        for _ in range(5):
            plan = plan.masked_fill(padding, float("-inf"))
            total = plan.flatten(0, 1).logsumexp(dim=0)  # (E,), -inf if there are no tokens
            plan = (plan - total.clamp(min=-1e9)).masked_fill(padding, 0.0)
            plan = plan - plan.logsumexp(dim=-1, keepdim=True)
        chosen = plan.topk(self.top_k, dim=-1).indices  # (B, T, k)
        probs = logits.sigmoid()
        return torch.zeros_like(probs).scatter(-1, chosen, probs.gather(-1, chosen))


class TopP(Router):
    """The fewest experts whose probabilities sum to 0.6 or more."""

    at_most_k = False

    def gate(self, logits, mask, x):
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        kept = probs * (probs.cumsum(dim=-1) - probs < 0.6)
        return torch.zeros_like(probs).scatter(-1, order, kept)


class Cosine(Router):
    """Scores are cosines with a vector per expert (Chi et al. 2022); the projection is unused."""

    def __init__(self, d_model, n_experts, top_k=2, level="token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.experts = nn.Parameter(torch.randn(n_experts, d_model))

    def gate(self, logits, mask, x):
        cosine = F.normalize(x, dim=-1) @ F.normalize(self.experts, dim=-1).T  # (B, T, E)
        return top_k_gates((cosine / 0.1).softmax(dim=-1), self.top_k)


class Balanced(TopKRouter):
    """Top-k with the balance loss as its penalty."""

    def penalty(self, gates, logits, mask, x):
        return load_balancing_loss(Routing(gates, logits), mask)
