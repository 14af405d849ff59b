"""The bias of an expert with too high a load is raised."""

import torch
from solutions.a5 import LossFree as Right


class LossFree(Right):
    def update(self, load):
        self.bias -= self.rate * torch.sign(load.mean() - load)
