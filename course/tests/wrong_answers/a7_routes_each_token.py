# Fails with: Positions of a sample have different gates
from course.tests.solutions.a7 import OneRoute as Right
from routers import top_k_gates


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        gates = top_k_gates(logits.softmax(dim=-1), self.top_k)
        return gates if previous is None else previous.gates.expand_as(logits)
