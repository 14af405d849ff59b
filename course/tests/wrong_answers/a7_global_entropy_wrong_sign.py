"""The entropy of the mean is minimised, not maximised."""

from solutions.a7 import OneRoute as Right
from solutions.a7 import entropy


class OneRoute(Right):
    def penalty(self, gates, logits, mask, x):
        probs = logits[mask].softmax(dim=-1)
        return self.weight * (entropy(probs).mean() + entropy(probs.mean(dim=0)))
