"""It says that nobody visits more than k experts."""

from solutions.a8 import ReLU as Right


class ReLU(Right):
    at_most_k = True
