# Fails with: The capacity is per sample
from course.tests.solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        flat = (t.flatten(0, 1)[None] for t in (logits, mask, x))
        return super().gate(*flat).view_as(logits)
