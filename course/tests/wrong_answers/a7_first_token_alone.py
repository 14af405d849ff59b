# Fails with: With prompt = None the logits are averaged over all real positions
from course.tests.solutions.a7 import OneRoute as Right


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        if prompt is None and previous is None:
            prompt = mask.cumsum(dim=1) == 1
        return super().gate(logits, mask, x, prompt, previous)
