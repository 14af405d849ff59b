# Fails with: The sign is wrong
from course.tests.solutions.a5 import LossFree as Right


class LossFree(Right):
    def update(self, load):
        super().update(-load)
