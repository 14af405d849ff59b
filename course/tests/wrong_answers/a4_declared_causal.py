"""It declares causal = True, although it looks ahead."""

from solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    causal = True
