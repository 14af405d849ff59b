# Fails with: The penalty overflows
from course.tests.solutions.a3 import ZLoss as Right


class ZLoss(Right):
    def penalty(self, gates, logits, mask, x):
        return self.weight * logits[mask].exp().sum(dim=-1).log().square().mean()
