# Fails with: The bias changed in `gate`
from course.tests.solutions.a5 import LossFree as Right


class LossFree(Right):
    def gate(self, logits, mask, x):
        gates = super().gate(logits, mask, x)
        self.update((gates[mask] != 0).float().mean(dim=0))
        return gates
