"""The update is proportional to the gap: no sign."""

from solutions.a5 import LossFree as Right


class LossFree(Right):
    def update(self, load):
        self.bias += self.rate * (load.mean() - load)
