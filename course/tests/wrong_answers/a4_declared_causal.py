# Fails with: has to declare causal = False
from course.tests.solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    causal = True
