# Fails with: has to declare at_most_k = False
from course.tests.solutions.a8 import ReLU as Right


class ReLU(Right):
    at_most_k = True
