"""Who has too many visits gets more."""

import torch
from solutions.a5 import LossFree as Right


class LossFree(Right):
    def update(self, visits):
        self.bias -= self.rate * torch.sign(visits.mean() - visits)
