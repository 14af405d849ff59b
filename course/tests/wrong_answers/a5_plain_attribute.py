"""The bias is a plain attribute, which no checkpoint saves."""

from solutions.a5 import LossFree as Right


class LossFree(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        bias = self.bias
        del self.bias
        self.bias = bias
