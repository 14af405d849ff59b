# Fails with: `bias` is not a buffer
from course.tests.solutions.a5 import LossFree as Right


class LossFree(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        vars(self)["bias"] = self._buffers.pop("bias")
