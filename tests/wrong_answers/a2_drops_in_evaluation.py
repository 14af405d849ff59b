"""The capacity holds in evaluation too, so an answer may lose its expert."""

from solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, logits, mask, x):
        is_training, self.training = self.training, True
        gates = super().gate(logits, mask, x)
        self.training = is_training
        return gates
