# Fails with: Add rate * sign(mean load - load) to the bias
from course.tests.solutions.a5 import LossFree as Right


class LossFree(Right):
    def update(self, load):
        self.bias += self.rate * (load.mean() - load)
