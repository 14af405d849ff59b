"""Routers for control experiments: --router lab/controls.py:Everyone, and forced routes.

Shapes: B batch, T positions, E experts, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from config import IMAGE_ID
from engine.routes import Forced
from routers import OracleRouter, Router


class Everyone(Router):
    """All experts with gate 1: one wide dense FFN. Needs --start fresh or all learn the same."""

    frozen = True

    @property
    def at_most_k(self) -> bool:
        return self.top_k == self.proj.out_features

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return torch.ones_like(logits)


class Hash(Router):
    """k neighbouring experts by token id (Roller et al. 2021), of a patch by place; gates 1/k."""

    frozen = True
    sums_to_one = True
    needs = ("ids",)

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        n_experts = logits.shape[-1]
        is_patch = ids == IMAGE_ID  # (B, T)
        key = torch.where(is_patch, is_patch.cumsum(dim=1) + 2**20, ids)
        first = key * 2654435761 % 2**32 * n_experts // 2**32  # Knuth's multiplicative hash
        chosen = [F.one_hot((first + i) % n_experts, n_experts) for i in range(self.top_k)]
        return sum(chosen) / self.top_k


class Wrong1(OracleRouter):
    """Another modality's expert with gate 1, in place of the true one's."""

    shift = 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor, modality: Tensor | None) -> Tensor:
        if modality is not None:
            modality = torch.where(modality >= 0, modality + self.shift, modality)
        return super().gate(logits, mask, x, modality)


class Wrong2(Wrong1):
    shift = 2


class Wrong3(Wrong1):
    shift = 3


class ByModality(Forced):
    """The largest gate goes to expert (modality + shift) % E: the true one, or shifted a wrong one.

    The other gate values follow in the router's order, the true expert's last if it is not first.
    Of unknown modality nothing changes.
    """

    def __init__(self, inner: Router, shift: int = 0):
        super().__init__(inner)
        self.shift = shift

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        if modality is None:
            return gates
        n_experts = gates.shape[-1]
        true = F.one_hot(modality.clamp(min=0) % n_experts, n_experts)[:, None].bool()  # (B, 1, E)
        # By gate, then by logit: the gates of experts that are not chosen are all 0.
        order = logits.argsort(dim=-1, descending=True, stable=True)  # (B, T, E)
        by_gate = gates.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        rank = order.gather(-1, by_gate).argsort(dim=-1)  # of each expert, from 0
        rank = rank.masked_fill(true, n_experts).masked_fill(true.roll(self.shift, dims=-1), -1)
        values = gates.sort(dim=-1, descending=True).values
        moved = torch.zeros_like(gates).scatter(-1, rank.argsort(dim=-1), values)
        return torch.where((modality >= 0)[:, None, None], moved, gates)


class FirstOnly(Forced):
    """Every token is routed to the first of its experts alone, with gate 1."""

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        largest, first = gates.max(dim=-1, keepdim=True)
        return torch.zeros_like(gates).scatter(-1, first, (largest > 0).to(gates.dtype))
