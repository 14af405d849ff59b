# Fails with: keeps at most ceil(capacity_factor * real / E) tokens
from course.tests.solutions.a2 import Switch as Right
from routers import top_k_gates


class Switch(Right):
    def gate(self, logits, mask, x):
        return top_k_gates(logits.softmax(dim=-1), 1)
