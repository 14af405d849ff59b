# Fails with: the gate is the raw probability, not 1
from course.tests.solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, *args):
        return (super().gate(*args) != 0).float()
