# Fails with: `coefficient` is not a buffer
from course.tests.solutions.a8 import ReLU as Right


class ReLU(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        vars(self)["coefficient"] = self._buffers.pop("coefficient")
