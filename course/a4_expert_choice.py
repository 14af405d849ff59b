"""Assignment 4, expert choice (Zhou et al. 2022, arXiv 2202.09368).

The page is a4_expert_choice.md. Shapes: B batch, T positions, D d_model, E experts, k top_k.
"""

from torch import Tensor

from routers import Router


class ExpertChoice(Router):
    """Each expert selects the C tokens of a sample with the highest probability."""

    causal = False  # whether a token is selected depends on the tokens that come later
    at_most_k = False  # a token may be selected by any number of experts
    may_drop = True  # or by none

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """Softmax over the experts; each expert keeps its ceil(k * real / E) largest per sample."""
        raise NotImplementedError("not implemented yet")
