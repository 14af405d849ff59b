# Fails with: added to the scores, not to the logits
from course.tests.solutions.a5 import LossFree as Right
from routers import top_k_gates


class LossFree(Right):
    def gate(self, logits, mask, x):
        chosen = top_k_gates((logits + self.bias).softmax(dim=-1), self.top_k) != 0
        return logits.sigmoid() * chosen
