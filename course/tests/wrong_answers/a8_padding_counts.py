"""The mean is over padding too."""

from solutions.a8 import ReLU as Right


class ReLU(Right):
    def penalty(self, gates, logits, mask, x):
        return self.coefficient * gates.sum(dim=-1).mean()
