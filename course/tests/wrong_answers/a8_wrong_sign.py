"""A higher load makes the penalty weaker."""

import torch
from solutions.a8 import ReLU as Right


class ReLU(Right):
    def update(self, load):
        self.coefficient *= self.factor ** torch.sign(self.top_k - load.sum())
