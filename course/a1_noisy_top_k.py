"""Assignment 1, noisy top-k (Shazeer et al. 2017, arXiv 1701.06538).

The page is a1_noisy_top_k.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from torch import Tensor, nn

from routers import Router


class NoisyTopK(Router):
    """Noise on the logits in training; a softmax over the k largest."""

    weight = 0.1  # of the penalty; the paper's w_importance, from memory

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, level: str = "token"):
        super().__init__(d_model, n_experts, top_k, level)
        self.noise = nn.Linear(d_model, n_experts, bias=False)  # x W_noise
        nn.init.zeros_(self.noise.weight)  # as in the paper: softplus(0) for every token at first

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """H(x) = logits + normal * softplus(x W_noise) in training; softmax over its k largest."""
        raise NotImplementedError("not implemented yet")

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """weight * CV(importance)^2; importance (E,) is the sum of an expert's gates."""
        raise NotImplementedError("not implemented yet")
