# Fails with: a gate of 1, or a detached one, has none
from course.tests.solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    def gate(self, *args):
        return (super().gate(*args) != 0).float()
