# Fails with: The deviation of the noise is softplus(x W_noise)
import torch

from course.tests.solutions.a1 import NoisyTopK as Right
from routers import top_k_gates


class NoisyTopK(Right):
    def gate(self, logits, mask, x):
        noise = torch.randn_like(logits) * self.noise(x) * self.training
        return top_k_gates((logits + noise).softmax(dim=-1), self.top_k)
