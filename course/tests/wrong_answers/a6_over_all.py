# Fails with: Divide by the sum over the k kept, not over all
from course.tests.solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    def gate(self, logits, mask, x):
        scores = logits.sigmoid()
        return scores * (super().gate(logits, mask, x) != 0) / scores.sum(dim=-1, keepdim=True)
