"""Assignment 6, sigmoid gates (DeepSeek-V3, arXiv 2412.19437; Nguyen et al. 2024, 2405.13997).

The page is a6_sigmoid.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from torch import Tensor

from routers import Router


class Sigmoid(Router):
    """Sigmoid scores, the k largest of them rescaled to sum to 1."""

    # Declare `sums_to_one` here: for which k is it True? See routers.TopKRouter.

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """The k largest of sigmoid(logits) over their sum; at k = 1 think of the gradient."""
        raise NotImplementedError("not implemented yet")
