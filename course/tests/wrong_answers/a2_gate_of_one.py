"""The only gate is rescaled to 1, as the gates of two experts would be."""

from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        return (super().gate(logits, mask, x) != 0).float()
