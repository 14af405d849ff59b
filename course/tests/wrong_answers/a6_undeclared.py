"""It does not declare that its gates sum to 1."""

from solutions.a6 import Sigmoid as Right


class Sigmoid(Right):
    sums_to_one = False
