# Fails with: Select among the positions of one sample
from course.tests.solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, logits, mask, x):
        flat = (t.flatten(0, 1)[None] for t in (logits, mask, x))
        return super().gate(*flat).view_as(logits)
