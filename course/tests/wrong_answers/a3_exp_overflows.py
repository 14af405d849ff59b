"""exp, sum and log one after the other, which overflows."""

from solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def penalty(self, gates, logits, mask, x):
        return self.weight * logits[mask].exp().sum(dim=-1).log().square().mean()
