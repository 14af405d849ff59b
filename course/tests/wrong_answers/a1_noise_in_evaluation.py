# Fails with: There is noise in evaluation
from course.tests.solutions.a1 import NoisyTopK as Right


class NoisyTopK(Right):
    def gate(self, *args):
        return super(NoisyTopK, self.train()).gate(*args)
