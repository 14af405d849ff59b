"""The gate of a selected token is 1."""

from solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        return (super().gate(logits, mask, x) != 0).float()
