"""An expert selects among the tokens of all samples at once."""

from solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        flat = logits.flatten(0, 1)[None], mask.flatten()[None], x.flatten(0, 1)[None]
        return super().gate(*flat).view_as(logits)
