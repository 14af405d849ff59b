"""Where no prompt is named the first position decides."""

from solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, held):
        if prompt is None and held is None:
            prompt = mask.cumsum(dim=1) == 1
        return super().gate(logits, mask, x, prompt, held)
