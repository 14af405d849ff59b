"""The update grows with the gap: no sign."""

from solutions.a5 import LossFree as Right


class LossFree(Right):
    def update(self, visits):
        self.bias += self.rate * (visits.mean() - visits)
