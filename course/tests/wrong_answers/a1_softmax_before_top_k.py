# Fails with: It is not over the k = 2 kept logits
from course.tests.solutions.a1 import NoisyTopK as Right


class NoisyTopK(Right):
    def gate(self, logits, mask, x):
        return logits.softmax(dim=-1) * (super().gate(logits, mask, x) != 0)
