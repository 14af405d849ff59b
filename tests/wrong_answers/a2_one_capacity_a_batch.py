"""The samples of a batch share the places of an expert."""

from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        flat = logits.flatten(0, 1)[None], mask.flatten()[None], x.flatten(0, 1)[None]
        return super().gate(*flat).view_as(logits)
