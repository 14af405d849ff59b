"""Routers: which tokens go to which experts. To write your own, subclass Router, override `gate`.

Shapes: B batch, T positions, D d_model, E experts, k experts per token, n real tokens.
"""

import importlib.util
import sys
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decided. A value that is returned, never stored on a module or in a global."""

    gates: Tensor  # (B, T, E) fp32 >= 0; an exact 0 means "this token is not routed to e"
    logits: Tensor  # (B, T, E) fp32 scores before any choice: for the losses and the plots
    penalty: Tensor | float = 0.0  # () what the router adds to the loss; 0 outside training


class Hints(NamedTuple):
    """What a router may use besides the hidden states. None: not known here."""

    prompt: Tensor | None = None  # (B, T) bool, True before the first answer token
    modality: Tensor | None = None  # (B,) int64 index into config.MODALITIES, -1 unknown
    ids: Tensor | None = None  # (B, T) int64 tokens, config.IMAGE_ID for a patch
    previous: Routing | None = None  # (B, 1, E) of the position before, while an answer is made
    first: Routing | None = None  # (B, T, E) of the first sparse block, in the later ones


class Router(nn.Module):
    """Scores every expert for every token.

    `penalty` and `update` are there to balance the load, by a loss or without one. `gate` and
    `penalty` must not change the router: activation checkpointing computes them twice.

    level "token" decides for each position; "sequence" once per sample and block, on the mean of
    its prompt, and keeps that decision while the answer is generated: its tokens all go to the same
    k experts. "once" keeps the first sparse block's decision in the later ones too.
    """

    frozen = False  # True: phase 3 does not train it
    needs: ClassVar[tuple[str, ...]] = ()  # fields of Hints that `gate` takes as well, by name
    sums_to_one = False  # True if the gates of every real token add up to 1: see moe.upcycle
    causal = True  # False if gates at t may depend on answer tokens after t; generate() refuses
    # What engine/first_gate.py, tests and the course check:
    at_most_k = True  # False if a token may be routed to more than top_k experts
    may_drop = False  # True if a real token may be routed to no expert, also in evaluation
    batch_invariant = True  # False if gates of one sample may depend on the others in the batch

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, level: str = "token"):
        super().__init__()
        self.top_k = top_k
        self.level = level
        self.proj = nn.Linear(d_model, n_experts)  # with a bias, as in Med-MoE

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """logits (B, T, E), mask (B, T) True on real tokens, x (B, T, D) -> gates (B, T, E)."""
        raise NotImplementedError

    def penalty(self, gates: Tensor, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor | float:
        """What training adds to the loss, a mean over the real tokens; gates are 0 on padding."""
        return 0.0

    def update(self, load: Tensor) -> None:
        """After every training step: load (E,) fp32, tokens routed to each expert / real tokens.

        For what no gradient teaches; no gradient is recorded. What changes here has to be a
        buffer, or a resumed run would differ from an uninterrupted one.
        """

    def forward(self, x: Tensor, mask: Tensor, hints: Hints = Hints()) -> Routing:
        """x (B, T, D), mask (B, T) True on real tokens -> the routing; gates are 0 on padding."""
        if self.level != "token" and hints.previous is not None:  # decided on the prompt
            gates, logits, _ = hints.previous
            return Routing(*(t.expand(-1, x.shape[1], -1) for t in (gates, logits)))
        if self.level == "once" and hints.first is not None:
            return hints.first
        with torch.autocast(x.device.type, enabled=False):  # fp32: bf16 rounding flips close calls
            h, real = x.float(), mask  # (B, T, D), for a decision at each position
            if self.level != "token":  # (B, 1, D), for one on the mean of the prompt
                h = pool(h, mask if hints.prompt is None else mask & hints.prompt)
                real = torch.ones_like(mask[:, :1])
            logits = F.linear(h, self.proj.weight.float(), self.proj.bias.float())  # (B, T or 1, E)
            extra = {name: getattr(hints, name) for name in self.needs}
            # Not a product: gates on padding may be anything, even NaN, and must become 0.
            gates = self.gate(logits, real, h, **extra).masked_fill(~real[..., None], 0.0)
            penalty = self.penalty(gates, logits, real, h) if self.training else 0.0
        if self.level != "token":  # the same decision at all positions
            logits = logits.expand(-1, x.shape[1], -1)
            gates = gates.expand_as(logits).masked_fill(~mask[..., None], 0.0)
        return Routing(gates, logits, penalty)


def pool(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T, D) over the positions of mask (B, T) -> (B, 1, D); zeros where none."""
    weight = mask[..., None].to(x.dtype)  # (B, T, 1)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def top_k_gates(probs: Tensor, k: int) -> Tensor:
    """Keep the k largest of probs (B, T, E) and rescale them to sum to 1; k = 1 keeps p itself.

    With k = 1 rescaling would make every gate 1 and leave the router no gradient; the released
    Med-MoE keeps the raw probability there, and so do we.
    """
    top_p, top_e = probs.topk(k, dim=-1)  # both (B, T, k)
    if k > 1:
        top_p = top_p / top_p.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, top_e, top_p)


class TopKRouter(Router):
    """Each token to its k likeliest experts; learned with the experts (MoE-LLaVA's way)."""

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return top_k_gates(logits.softmax(dim=-1), self.top_k)


class ModalityRouter(TopKRouter):
    """Med-MoE: one linear layer trained in phase 2 to classify the modality, then frozen."""

    frozen = True


class RandomRouter(TopKRouter):
    """Control: a top-k router that is never trained. Its weights stay as initialised."""

    frozen = True


class OracleRouter(Router):
    """Control: the true modality's expert with gate 1; all experts equally where it is unknown."""

    frozen = True
    sums_to_one = True
    at_most_k = False  # an unknown modality goes to all experts
    needs = ("modality",)

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor, modality: Tensor | None) -> Tensor:
        n_experts = logits.shape[-1]
        uniform = torch.full_like(logits, 1 / n_experts)
        if modality is None:
            return uniform
        one_hot = F.one_hot(modality.clamp(min=0) % n_experts, n_experts)[:, None]  # (B, 1, E)
        known = (modality >= 0)[:, None, None]  # (B, 1, 1)
        return torch.where(known, one_hot.to(logits.dtype), uniform)


ROUTERS = {
    "modality": ModalityRouter,
    "topk": TopKRouter,
    "random": RandomRouter,
    "oracle": OracleRouter,
}
OWN = "own_router_"  # begins the name of a module that get_router makes of a file


def get_router(spec: str) -> type[Router]:
    """A name from ROUTERS, or FILE.py:Class for a class of your own. Raises ValueError."""
    if spec in ROUTERS:
        return ROUTERS[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"{spec!r} is neither one of {', '.join(ROUTERS)} nor FILE.py:Class")
    module_spec = importlib.util.spec_from_file_location(OWN + Path(path).stem, path)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    router = getattr(module, name, None)
    if not (isinstance(router, type) and issubclass(router, Router) and router is not Router):
        raise ValueError(f"{spec!r}: the file has no subclass of routers.Router named {name!r}")
    return router


def load_balancing_loss(routing: Routing, mask: Tensor) -> Tensor:
    """E * sum over e of (share of routed tokens) * (mean probability): 1 if balanced, E if not.

    Fedus et al. 2021, equation 4, over the real tokens of mask (B, T); with k experts per token,
    each of them counts 1/k.
    """
    gates, logits = routing.gates[mask], routing.logits[mask]  # both (n, E)
    routed = (gates != 0).float().sum(dim=0)  # (E,) tokens of each expert
    share = routed / routed.sum().clamp(min=1)
    return gates.shape[-1] * (share * logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(routing: Routing, mask: Tensor) -> Tensor:
    """Mean of logsumexp(logits) squared over real tokens (Zoph et al. 2022, equation 5)."""
    return routing.logits[mask].logsumexp(dim=-1).square().mean()
