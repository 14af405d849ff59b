# Fails with: rescaled to sum to 1 if k > 1
from course.tests.solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def gate(self, logits, mask, x):
        return logits.softmax(dim=-1) * (super().gate(logits, mask, x) != 0)
