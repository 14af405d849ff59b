# Fails with: the softmax after the mean
from course.tests.solutions.a7 import OneRoute as Right
from routers import pool, top_k_gates


class OneRoute(Right):
    def gate(self, logits, mask, x, prompt, previous):
        if previous is not None:
            return previous.gates.expand_as(logits)
        pooled = pool(logits.softmax(dim=-1), mask if prompt is None else mask & prompt)
        return top_k_gates(pooled, self.top_k).expand_as(logits)
