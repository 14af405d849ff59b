"""The coefficient is a plain attribute, which no checkpoint saves."""

from solutions.a8 import ReLU as Right


class ReLU(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        coefficient = self.coefficient
        del self.coefficient
        self.coefficient = coefficient
