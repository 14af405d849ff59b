"""Routers for control experiments: --router lab/controls.py:Everyone

Shapes: B batch, T positions, E experts, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from config import IMAGE_ID
from routers import OracleRouter, Router


class Everyone(Router):
    """All experts with gate 1, always: E + 1 FFNs side by side are one dense FFN of their widths.

    Needs --start fresh: experts that start equal would get equal gradients.
    """

    frozen = True

    @property
    def at_most_k(self) -> bool:
        return self.top_k == self.proj.out_features

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return torch.ones_like(logits)


class Hash(Router):
    """Experts by token id (Roller et al. 2021); of a patch, by its position in the image.

    A token is routed to k neighbouring experts, each with gate 1/k. Token level only.
    """

    frozen = True
    sums_to_one = True
    needs = ("ids",)

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        n_experts = logits.shape[-1]
        is_patch = ids == IMAGE_ID  # (B, T)
        key = torch.where(is_patch, is_patch.cumsum(dim=1) + 2**20, ids)
        first = key * 2654435761 % 2**32 * n_experts // 2**32  # Knuth's multiplicative hash
        return sum(
            F.one_hot((first + i) % n_experts, n_experts) / self.top_k for i in range(self.top_k)
        )


class Wrong(OracleRouter):
    """The next modality's expert with gate 1, in place of the true one's."""

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor, modality: Tensor | None) -> Tensor:
        if modality is not None:
            modality = torch.where(modality >= 0, modality + 1, modality)
        return super().gate(logits, mask, x, modality)
