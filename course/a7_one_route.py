"""Assignment 7, one route a question (Med-MoE, arXiv 2404.10237; LIMoE, 2206.02770).

The page is a7_one_route.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from typing import ClassVar

from torch import Tensor

from routers import Router, Routing


class OneRoute(Router):
    """A prompt's mean logits decide once, for all of its positions and for its answer."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "held")
    weight = 0.01  # of the penalty, if you write one

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(
        self, logits: Tensor, mask: Tensor, x: Tensor, prompt: Tensor | None, held: Routing | None
    ) -> Tensor:
        """Mean logits of real prompt positions -> softmax -> top-k, for all T; held.gates if held.

        prompt (B, T) bool or None: not known, all real positions; held.gates (B, 1, E).
        """
        raise NotImplementedError("not implemented yet")

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor | float:
        """Optional: weight * (mean entropy of a token's p + log E - entropy of the mean p)."""
        return 0.0
