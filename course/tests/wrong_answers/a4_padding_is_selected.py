# Fails with: padding is selected
from course.tests.solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        return super().gate(logits, mask | True, x)
