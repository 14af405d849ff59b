# Fails with: not of token counts
from course.tests.solutions.a1 import NoisyTopK as Right


class NoisyTopK(Right):
    def penalty(self, gates, logits, mask, x):
        return super().penalty((gates != 0).float(), logits, mask, x)
