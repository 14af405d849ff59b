"""The routing of the position before is ignored."""

from solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        return super().gate(logits, mask, x, prompt, None)
