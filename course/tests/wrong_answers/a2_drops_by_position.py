# Fails with: The least probable tokens are dropped first
from course.tests.solutions.a2 import Switch as Right
from routers import top_k_gates


class Switch(Right):
    def gate(self, logits, mask, x):
        gates = top_k_gates(logits.softmax(dim=-1), 1) * mask[..., None]
        capacity = (self.capacity_factor * mask.sum(dim=1) / gates.shape[-1]).ceil()  # (B,)
        is_late = (gates != 0).cumsum(dim=1) > capacity[:, None, None]
        return gates.masked_fill(is_late & self.training, 0.0)
