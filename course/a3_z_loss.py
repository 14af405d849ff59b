"""Assignment 3, the router z-loss (Zoph et al. 2022, arXiv 2202.08906).

The page is a3_z_loss.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from torch import Tensor

from routers import Router


class ZLoss(Router):
    """Top-k with a penalty that keeps the logits small."""

    weight = 0.001  # of the penalty; the paper's c_z, from memory

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """The k largest probabilities, rescaled to sum to 1; at k = 1 the probability itself."""
        raise NotImplementedError("not implemented yet")

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """weight * mean over real tokens of logsumexp(logits)^2 (equation 5)."""
        raise NotImplementedError("not implemented yet")
