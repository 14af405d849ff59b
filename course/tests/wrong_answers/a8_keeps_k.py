# Fails with: there is no top-k and no rescaling
from course.tests.solutions.a8 import ReLU as Right


class ReLU(Right):
    def gate(self, logits, mask, x):
        gates = logits.relu()
        return gates * (gates >= gates.topk(self.top_k, dim=-1).values[..., -1:])
