# Fails with: coefficient *= factor^sign(sum of load - k)
from course.tests.solutions.a8 import ReLU as Right


class ReLU(Right):
    def update(self, load):
        self.coefficient *= self.factor ** (self.top_k - load.sum()).sign()
