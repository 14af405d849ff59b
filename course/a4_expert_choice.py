"""Assignment 4, expert choice (Zhou et al. 2022, arXiv 2202.09368).

The page is a4_expert_choice.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from torch import Tensor

from routers import Router


class ExpertChoice(Router):
    """Each expert picks its C likeliest tokens of a sample."""

    causal = False  # who is picked depends on the tokens that come later
    at_most_k = False  # a token may be picked by any number of experts
    may_drop = True  # or by none

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """Probabilities over experts; an expert keeps its ceil(k * real / E) largest a sample."""
        raise NotImplementedError("not implemented yet")
