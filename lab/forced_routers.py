"""Forced routing: routers that wrap a loaded model's own and change the gates that these compute.

They work with any kind and level of router. Changing gates twice is the same as once: at sequence
level the routing that is reused for the answer has been changed before.

Shapes: B batch, T positions, D d_model, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.routes import replaced_routers
from model import MedMoE
from routers import Hints, Router, Routing


class Forced(Router):
    """Wraps a router and changes its gates: subclass and override `change`."""

    frozen = True

    def __init__(self, inner: Router):
        n_experts, d_model = inner.proj.weight.shape
        super().__init__(d_model, n_experts, inner.top_k, inner.level)
        self.inner, self.proj = inner, inner.proj
        self.causal, self.batch_invariant = inner.causal, inner.batch_invariant

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        """gates, logits (B, T, E), modality (B,) or None -> gates (B, T, E)."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor, hints: Hints = Hints()) -> Routing:
        routing = self.inner(x, mask, hints)
        gates = self.change(routing.gates, routing.logits, hints.modality)
        return routing._replace(gates=gates.masked_fill(~mask[..., None], 0.0))


class ByModality(Forced):
    """The largest gate goes to expert (modality + shift) % E: the true one, or shifted a wrong one.

    The gate values stay the router's own; only which experts get them changes: the others follow in
    the router's order, but the true modality's expert comes last where another one is forced. Where
    the modality is unknown nothing changes.
    """

    needs = ("modality",)

    def __init__(self, inner: Router, shift: int = 0):
        super().__init__(inner)
        self.shift = shift

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        if modality is None:
            return gates
        n_experts = gates.shape[-1]
        true = F.one_hot(modality.clamp(min=0) % n_experts, n_experts)[:, None]  # (B, 1, E)
        forced = true.roll(self.shift, dims=-1)
        # By gate, then by logit: the gates of experts that are not chosen are all 0.
        by_logit = logits.argsort(dim=-1, descending=True, stable=True)  # (B, T, E)
        ordered = gates.gather(-1, by_logit).argsort(dim=-1, descending=True, stable=True)
        order = by_logit.gather(-1, ordered)  # experts, the router's first choice first
        rank = order.argsort(dim=-1)  # of each expert, from 0
        rank = torch.where(true.bool(), n_experts, rank).masked_fill(forced.bool(), -1)
        values = gates.sort(dim=-1, descending=True).values
        moved = torch.zeros_like(gates).scatter(-1, rank.argsort(dim=-1), values)
        return torch.where((modality >= 0)[:, None, None], moved, gates)


class Alone(Forced):
    """Every token is routed to this one expert, with gate 1."""

    def __init__(self, inner: Router, expert: int):
        super().__init__(inner)
        self.expert = expert

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        only = torch.arange(gates.shape[-1], device=gates.device) == self.expert  # (E,)
        return only.to(gates.dtype).expand_as(gates)


class Without(Forced):
    """No token is routed to this expert; gates that added up to 1 are rescaled to do so again.

    A token that was routed to no other expert is left with the meta expert.
    """

    def __init__(self, inner: Router, expert: int):
        super().__init__(inner)
        self.expert = expert

    def change(self, gates: Tensor, logits: Tensor, modality: Tensor | None) -> Tensor:
        gone = torch.arange(gates.shape[-1], device=gates.device) == self.expert  # (E,)
        left = gates.masked_fill(gone, 0.0)
        if not self.inner.sums_to_one:
            return left
        total = left.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, left / total.clamp(min=1e-12), left)


@contextmanager
def forced(model: MedMoE, make: Callable[[Router], Router]) -> Iterator[None]:
    """make(router) in place of each sparse block's router; undone at the end."""
    routers = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
    with replaced_routers(model, [make(router) for router in routers]):
        yield
