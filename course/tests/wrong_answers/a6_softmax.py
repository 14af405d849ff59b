# Fails with: a softmax gives other values
from course.tests.solutions.a6 import Sigmoid as Right
from routers import top_k_gates


class Sigmoid(Right):
    def gate(self, logits, mask, x):
        return top_k_gates(logits.softmax(dim=-1), self.top_k)
