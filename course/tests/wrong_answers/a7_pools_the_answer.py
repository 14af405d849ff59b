# Fails with: Answer tokens change the route
from course.tests.solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        return super().gate(logits, mask, x, mask, previous)
