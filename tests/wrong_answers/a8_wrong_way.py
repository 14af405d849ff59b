"""More visits make the penalty weaker."""

import torch
from solutions.a8 import ReLU as Right


class ReLU(Right):
    def update(self, visits):
        self.coefficient *= self.factor ** torch.sign(self.top_k - visits.sum())
