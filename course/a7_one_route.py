"""Assignment 7, one route per question (Med-MoE, arXiv 2404.10237; LIMoE, 2206.02770).

The page is a7_one_route.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from typing import ClassVar

from torch import Tensor

from routers import Router, Routing


class OneRoute(Router):
    """One decision per sample, from the mean logits of its prompt; the answer keeps it."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "previous")
    weight = 0.01  # of the penalty, if you write one

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(
        self, logits: Tensor, mask: Tensor, x: Tensor,
        prompt: Tensor | None, previous: Routing | None,
    ) -> Tensor:  # fmt: skip
        """top-k of softmax(mean logits of the prompt), at all T positions; or previous.gates.

        prompt    (B, T) bool, True before the first answer token; None: pool all real positions
        previous  gates (B, 1, E) of the position before, in generation; None: decide here
        """
        raise NotImplementedError("not implemented yet")

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor | float:
        """Optional: weight * (mean entropy of a token's p + log E - entropy of the mean p)."""
        return 0.0
