"""It says that it does not look ahead."""

from solutions.a4 import ExpertChoice as Right


class ExpertChoice(Right):
    causal = True
