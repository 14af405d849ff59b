"""Padding is pooled along with the prompt."""

from solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        return super().gate(logits, prompt if prompt is not None else mask, x, prompt, previous)
