# Fails with: The bias is in the gates
from course.tests.solutions.a5 import LossFree as Right


class LossFree(Right):
    def gate(self, *args):
        gates = super().gate(*args)
        return gates + self.bias * (gates != 0)
