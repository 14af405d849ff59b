# Fails with: sums_to_one does not match the gates
from course.tests.solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    sums_to_one = False
