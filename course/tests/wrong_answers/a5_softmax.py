# Fails with: neither a softmax nor rescaled
from course.tests.solutions.a5 import LossFree as Right


class LossFree(Right):
    def gate(self, logits, mask, x):
        return super().gate(logits.softmax(dim=-1).logit(), mask, x)
