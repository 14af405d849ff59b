"""The capacity is that of the whole batch, shared by its samples."""

from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        flat = logits.flatten(0, 1)[None], mask.flatten()[None], x.flatten(0, 1)[None]
        return super().gate(*flat).view_as(logits)
