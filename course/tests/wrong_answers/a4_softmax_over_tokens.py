# Fails with: not over the tokens
from course.tests.solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        probs = logits.masked_fill(~mask[..., None], -1e9).softmax(dim=1)
        return probs * (super().gate(logits, mask, x) != 0)
