# Fails with: At k = 1 every gate is 1
from course.tests.solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    def gate(self, *args):
        gates = super().gate(*args)
        return gates / gates.sum(dim=-1, keepdim=True)
