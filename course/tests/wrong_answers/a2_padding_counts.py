# Fails with: The capacity counts real tokens only
from course.tests.solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        return super().gate(logits, mask | True, x)
