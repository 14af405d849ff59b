# Fails with: The penalty counts padding
from course.tests.solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def penalty(self, gates, logits, mask, x):
        return super().penalty(gates, logits, mask | True, x)
