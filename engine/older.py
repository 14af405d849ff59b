"""Checkpoints of older versions: fields of config.json, and the sparse layer of early TinyMed.

    y = c0 * sum over e of gates[e] * expert_e(x) + c1 * dense(x),    c = softmax(coefficient(x))

That layer mixes the experts with a dense FFN (Rajbhandari et al. 2022). No other checkpoint has
it; these have a tensor *.mlp.coefficient.*.
"""

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from model import MedMoE
from moe import MoE
from routers import Hints, Routing


def upgrade(info: dict) -> None:
    """Make config.json what it would be today, in place."""
    if moe := info["model"]["moe"]:
        moe.pop("every", None)  # always 2
        moe.pop("residual", None)  # has_residual tells


class ResidualMoE(MoE):
    """MoE with a dense FFN beside the experts, weighted for each token."""

    def forward(self, x: Tensor, mask: Tensor, hints: Hints) -> tuple[Tensor, Routing]:
        y, routing = super().forward(x, mask, hints)
        share = self.coefficient(x).softmax(dim=-1).to(y.dtype)  # (B, T, 2)
        return share[..., :1] * y + share[..., 1:] * self.dense(x), routing


def add_residual(model: MedMoE) -> None:
    """Give every sparse layer a dense FFN and a coefficient, to be filled from a checkpoint."""
    for block in model.decoder.blocks:
        if block.is_sparse:
            moe, router = block.mlp, block.mlp.router.proj
            like = next(moe.experts.parameters())
            moe.__class__ = ResidualMoE
            dense = copy.deepcopy(moe.experts.ffn[0]).to(like.dtype)
            moe.dense = dense.to_empty(device=like.device)
            moe.coefficient = nn.Linear(router.in_features, 2).to(router.weight)


def has_residual(names: Iterable[str]) -> bool:
    """Are these the names of tensors of such a checkpoint?"""
    return any(".mlp.coefficient." in name for name in names)
