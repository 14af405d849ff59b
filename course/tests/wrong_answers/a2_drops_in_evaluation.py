"""The capacity applies in evaluation too, so tokens of an answer may be dropped."""

from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        is_training, self.training = self.training, True
        gates = super().gate(logits, mask, x)
        self.training = is_training
        return gates
