"""Routers that break one promise each, for the checks of which course/museum has no exhibit.

tests/test_contract.py says which check has to fail on which of them.
"""

import torch
import torch.nn.functional as F

from routers import Router, Routing, TopKRouter, load_balancing_loss, top_k_gates


class Double(TopKRouter):
    def gate(self, logits, mask, x):
        return super().gate(logits.double(), mask, x)


class Raw(Router):
    def gate(self, logits, mask, x):
        return logits


class Dense(Router):
    def gate(self, logits, mask, x):
        return logits.softmax(dim=-1)


class Ties(Router):
    """All right but for equal logits, where every expert is among the k largest."""

    def gate(self, logits, mask, x):
        probs = logits.softmax(dim=-1)
        return probs.where(probs >= probs.topk(self.top_k, dim=-1).values[..., -1:], 0.0)


class Threshold(TopKRouter):
    def gate(self, logits, mask, x):
        gates = super().gate(logits, mask, x)
        return gates.where(gates > 0.7, 0.0)


class Claims(TopKRouter):
    """At k = 1 the gate is a probability, and those are below 1."""

    sums_to_one = True


class Spread(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        seen = logits[mask]  # (N, E)
        return ((seen - seen.mean(dim=0)) ** 2).sum() / (len(seen) - 1)  # one token: 0 / 0


class NextBest(Router):
    """Subtracts the best of the experts that were not chosen; with k = E there is none."""

    def gate(self, logits, mask, x):
        probs = logits.softmax(dim=-1)
        return F.relu(probs - probs.topk(self.top_k + 1, dim=-1).values[..., -1:])


class Overflow(Router):
    def gate(self, logits, mask, x):
        return top_k_gates(logits.exp() / logits.exp().sum(dim=-1, keepdim=True), self.top_k)


class OwnForward(TopKRouter):
    def forward(self, x, mask, hints=None):
        logits = self.proj(x).float()
        gates = self.gate(logits, mask, x).masked_fill(~mask[..., None], 0.0)
        return Routing(gates, logits)


class Positional(TopKRouter):
    def gate(self, logits, mask, x):
        at = torch.arange(logits.shape[1])[:, None] % logits.shape[-1]  # (T, 1)
        return super().gate(logits + 3.0 * (at == torch.arange(logits.shape[-1])), mask, x)


class Past(TopKRouter):
    """Causal, but what it saw before is not in the KV cache."""

    def gate(self, logits, mask, x):
        seen = (logits * mask[..., None]).cumsum(dim=1)
        return super().gate(seen, mask, x)


class Favourite(TopKRouter):
    def gate(self, logits, mask, x):
        bonus = (torch.arange(logits.shape[-1]) == 0) * 2.0
        return super().gate(logits + bonus, mask, x)


class PerToken(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        return logits.logsumexp(dim=-1).square() * mask


class Lopsided(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        return -load_balancing_loss(Routing(gates, logits), mask)


class Upside(TopKRouter):
    def gate(self, logits, mask, x):
        return super().gate(-logits, mask, x)


class Trainer(TopKRouter):
    @torch.no_grad()
    def update(self, visits):
        self.proj.bias -= 0.01 * visits
