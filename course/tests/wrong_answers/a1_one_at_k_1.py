# Fails with: At k = 1 every gate is 1
from course.tests.solutions.a1 import NoisyTopK as Right


class NoisyTopK(Right):
    def gate(self, *args):
        gates = super().gate(*args)
        return gates / gates.sum(dim=-1, keepdim=True)
