"""Routers with one bug each, for the checks that no router of course/museum fails.

tests/test_contract.py names the check that has to fail on each of them.
"""

import torch
import torch.nn.functional as F

from routers import Router, Routing, TopKRouter, load_balancing_loss, top_k_gates


class Double(TopKRouter):
    def gate(self, logits, mask, x):
        return super().gate(logits.double(), mask, x)


class RawLogits(Router):
    def gate(self, logits, mask, x):
        return logits


class Dense(Router):
    def gate(self, logits, mask, x):
        return logits.softmax(dim=-1)


class Ties(Router):
    """Correct except with equal logits, where every expert reaches the threshold."""

    def gate(self, logits, mask, x):
        probs = logits.softmax(dim=-1)
        return probs.where(probs >= probs.topk(self.top_k, dim=-1).values[..., -1:], 0.0)


class Threshold(TopKRouter):
    def gate(self, logits, mask, x):
        gates = super().gate(logits, mask, x)
        return gates.where(gates > 0.7, 0.0)


class SumsToOne(TopKRouter):
    """At k = 1 the gate is a probability, and those are below 1."""

    sums_to_one = True


class Spread(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        real = logits[mask]  # (N, E)
        return ((real - real.mean(dim=0)) ** 2).sum() / (len(real) - 1)  # one token: 0 / 0


class NextBest(Router):
    """Subtracts the largest probability that was not chosen; with k = E there is none."""

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
    """Causal, but its sum over earlier tokens is not in the KV cache."""

    def gate(self, logits, mask, x):
        total = (logits * mask[..., None]).cumsum(dim=1)
        return super().gate(total, mask, x)


class Bonus(TopKRouter):
    def gate(self, logits, mask, x):
        bonus = (torch.arange(logits.shape[-1]) == 0) * 2.0
        return super().gate(logits + bonus, mask, x)


class PerToken(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        return logits.logsumexp(dim=-1).square() * mask


class WrongSign(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        return -load_balancing_loss(Routing(gates, logits), mask)


class Smallest(TopKRouter):
    def gate(self, logits, mask, x):
        return super().gate(-logits, mask, x)


class UpdatesParameter(TopKRouter):
    @torch.no_grad()
    def update(self, load):
        self.proj.bias -= 0.01 * load
