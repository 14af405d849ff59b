"""The Med-MoE feed-forward layer: a router, E domain experts, and an always-on meta expert.

    y = meta(x) + sum over e of gates[e] * expert_e(x)          (paper, equation 4)

Shapes: B batch, T positions, N = B*T tokens, D d_model, F FFN hidden, E experts.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from routers import Hints, Router, Routing


class MLP(nn.Module):
    """Phi-2's FFN: Linear, tanh-approximated GELU, Linear, with biases."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GatedMLP(nn.Module):
    """StableLM-2's FFN: SwiGLU, down(silu(gate x) * up x), without biases."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """E FFNs that start as copies of one, with each parameter stacked along a first axis.

    A parameter `fc1.weight` (F, D) of the FFN becomes `fc1.weight` (E, F, D) here, so that ops.py
    can multiply all experts at once.
    """

    def __init__(self, mlp: nn.Module, n_experts: int):
        super().__init__()
        for name, layer in mlp.named_children():
            stacked = nn.Module()
            for key, param in layer.named_parameters():
                copies = param.detach().expand(n_experts, *param.shape).clone()
                stacked.register_parameter(key, nn.Parameter(copies))
            self.add_module(name, stacked)
        # One FFN without weights of its own: `functional_call` lends it those of an expert. In a
        # list, so that it is no submodule.
        self.ffn = [copy.deepcopy(mlp).to("meta")]

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (N, D), gates (N, E) -> (N, D): sum over e of gates[:, e] * expert_e(x).

        The definition. ops.py computes the same with the tokens sorted by expert.
        """
        by_expert = {name: param.unbind() for name, param in self.named_parameters()}
        y = torch.zeros_like(x)
        for e in range(gates.shape[1]):
            token = gates[:, e].nonzero().squeeze(1)  # (n,) the tokens routed to expert e
            weights = {name: params[e] for name, params in by_expert.items()}  # (F, D) and the like
            out = functional_call(self.ffn[0], weights, x[token])  # expert_e(x), (n, D)
            y.index_add_(0, token, (gates[token, e, None] * out).to(y.dtype))
        return y

    def reset_parameters(self) -> None:
        """Each expert with weights of its own, as nn.Linear initialises them; output layers 0."""
        *first, last = self.children()
        for layer in first:
            bound = layer.weight.shape[-1] ** -0.5
            for param in layer.parameters():
                nn.init.uniform_(param, -bound, bound)
        for param in last.parameters():
            nn.init.zeros_(param)


class MoE(nn.Module):
    """The sparse FFN of one block. meta=False is MoE-LLaVA's layer, without the first term.

    A token whose gates are all 0, such as padding, gets meta(x) alone, or 0 without a meta expert.
    """

    def __init__(self, mlp: nn.Module, router: Router, n_experts: int, meta: bool = True):
        super().__init__()
        self.router = router
        self.meta = mlp if meta else None  # computed for every token
        self.experts = Experts(mlp, n_experts)

    def forward(self, x: Tensor, mask: Tensor, hints: Hints) -> tuple[Tensor, Routing]:
        """x (B, T, D) normalised hidden states, mask (B, T) -> (B, T, D) and the routing."""
        routing = self.router(x, mask, hints)
        y = self.experts(x.flatten(0, 1), routing.gates.flatten(0, 1)).view_as(x)
        if self.meta is not None:
            y = y + self.meta(x)
        return y, routing


@torch.no_grad()
def upcycle(mlp: nn.Module, router: Router, n_experts: int, start: str, meta: bool = True) -> MoE:
    """A trained dense FFN -> a sparse layer: the FFN becomes the meta expert, E copies the experts.

    What the layer computes before its first step of training, by `start`:

    preserving  still FFN(x). Where the gates of a token sum to 1, the output layers of meta and
                experts are halved; else meta stays whole and those of the experts start at 0.
    released    (1 + sum of gates) * FFN(x): plain copies
    fresh       FFN(x), by meta alone: experts are re-initialised, their output layers are 0

    Without a meta expert ("fresh" needs one): (sum of gates) * FFN(x), or FFN(x) if they sum to 1.
    """
    moe = MoE(mlp, router, n_experts, meta)
    if start == "fresh":
        moe.experts.reset_parameters()
    if start == "preserving" and meta:
        share = 0.5 if router.sums_to_one else 0.0
        for ffn, factor in ((moe.experts, share), (moe.meta, 1 - share)):
            *_, output_layer = ffn.children()  # fc2, or down
            for param in output_layer.parameters():
                param.mul_(factor)
    return moe
