# Fails with: The penalty counts padding
from course.tests.solutions.a8 import ReLU as Right


class ReLU(Right):
    def penalty(self, gates, logits, mask, x):
        return super().penalty(gates, logits, mask | True, x)
