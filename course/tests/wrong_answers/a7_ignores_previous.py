# Fails with: A generated token gets gates of its own
from course.tests.solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        return super().gate(logits, mask, x, prompt, None)
