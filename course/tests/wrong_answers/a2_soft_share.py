# Fails with: f_e the share of top-1 choices
from course.tests.solutions.a2 import Switch as Right


class Switch(Right):
    def penalty(self, gates, logits, mask, x):
        mean = logits[mask].softmax(dim=-1).mean(dim=0)
        return self.weight * len(mean) * (mean * mean).sum()
