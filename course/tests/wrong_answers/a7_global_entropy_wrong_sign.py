# Fails with: + log E - entropy of the mean
from course.tests.solutions.a7 import OneRoute as Right
from course.tests.solutions.a7 import entropy


class OneRoute(Right):
    def penalty(self, gates, logits, mask, x):
        probs = logits[mask].softmax(dim=-1)
        return self.weight * (entropy(probs).mean() + entropy(probs.mean(dim=0)))
