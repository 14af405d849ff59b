# Fails with: before any is dropped
from course.tests.solutions.a2 import Switch as Right


class Switch(Right):
    def penalty(self, gates, logits, mask, x):
        share = (gates != 0).float().sum(dim=(0, 1)) / mask.sum()
        mean = logits[mask].softmax(dim=-1).mean(dim=0)
        return self.weight * len(mean) * (share * mean).sum()
