# Fails with: of the logits themselves
from course.tests.solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def penalty(self, gates, logits, mask, x):
        return super().penalty(gates, logits.softmax(dim=-1), mask, x)
