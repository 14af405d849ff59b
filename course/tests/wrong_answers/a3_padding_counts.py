"""The mean is over padding too."""

from solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def penalty(self, gates, logits, mask, x):
        return self.weight * logits.logsumexp(dim=-1).square().mean()
