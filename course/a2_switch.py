"""Assignment 2, Switch with a capacity (Fedus et al. 2021, arXiv 2101.03961).

The page is a2_switch.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from torch import Tensor

from routers import Router


class Switch(Router):
    """Top-1 with the raw probability as the gate; in training an expert takes at most C tokens."""

    capacity_factor = 1.25
    weight = 0.01  # of the penalty; the paper's alpha, from memory

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """Top-1; in training at most C = ceil(capacity_factor * real / E) per expert and sample."""
        raise NotImplementedError("not implemented yet")

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """weight * E * sum over e of f_e P_e (equation 4), f_e counted before dropping."""
        raise NotImplementedError("not implemented yet")
