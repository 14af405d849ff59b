# Fails with: Padding changes the route
from course.tests.solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        return super().gate(logits, mask if prompt is None else prompt, x, prompt, previous)
