"""The Med-MoE feed-forward layer: a router, E domain experts, and an always-on meta expert.

    y = meta(x) + sum over e of gates[e] * expert_e(x)          (paper, equation 4)

Shapes: B batch, T positions, N = B*T, D d_model, F FFN hidden, E experts, k experts per token,
R visits, that is pairs of a token and an expert.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
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
    """E copies of one FFN, each parameter stacked along a first axis, so one matmul serves all.

    A parameter `fc1.weight` (F, D) of the FFN becomes `fc1.weight` (E, F, D) here.
    """

    def __init__(self, mlp: nn.Module, n_experts: int):
        super().__init__()
        self.is_gated = isinstance(mlp, GatedMLP)
        self.exchange = None  # where several processes share the experts: engine/parallel.py
        for name, layer in mlp.named_children():
            stacked = nn.Module()
            for key, param in layer.named_parameters():
                copies = param.detach().expand(n_experts, *param.shape).clone()
                stacked.register_parameter(key, nn.Parameter(copies))
            self.add_module(name, stacked)

    def draw(self) -> None:
        """Weights of their own for all experts, as nn.Linear draws them; 0 in the output layer."""
        *first, last = self.children()
        for layer in first:
            bound = layer.weight.shape[-1] ** -0.5
            for param in layer.parameters():
                nn.init.uniform_(param, -bound, bound)
        for param in last.parameters():
            nn.init.zeros_(param)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (N, D), gates (N, E) -> (N, D): the gated sum over the experts each row visits."""
        plan = ops.plan_visits(gates)
        rows = ops.permute(x, plan)  # (R, D)
        out = self.exchange(rows, plan, self.ffn) if self.exchange else self.ffn(rows, plan)
        return ops.unpermute(out, gates, plan)

    def ffn(self, rows: Tensor, plan: ops.Plan) -> Tensor:  # (R, D) -> (R, D)
        return ops.grouped_ffn(rows, [_layer(part) for part in self.children()], plan)


def _layer(part: nn.Module) -> ops.Layer:
    low = (part.lora_a, part.lora_b, part.lora_scale) if hasattr(part, "lora_a") else None
    return ops.Layer(part.weight, getattr(part, "bias", None), low)


class MoE(nn.Module):
    """The sparse FFN of one block: y = meta(x) + sum over e of gates[e] * expert_e(x).

    meta=False is MoE-LLaVA's layer, without the first term. residual=True is early TinyMed's
    (Rajbhandari et al. 2022): the sum is mixed with a dense FFN, c0 * sum + c1 * dense(x), where
    c = softmax(coefficient(x)).
    """

    def __init__(
        self, mlp: nn.Module, router: Router, n_experts: int, meta: bool = True,
        residual: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.router = router
        self.meta = mlp if meta else None  # visited by every token
        self.experts = Experts(mlp, n_experts)
        self.dense = copy.deepcopy(mlp) if residual else None
        width = router.proj.in_features
        self.coefficient = nn.Linear(width, 2).to(router.proj.weight) if residual else None

    def forward(self, x: Tensor, mask: Tensor, hints: Hints) -> tuple[Tensor, Routing]:
        """x (B, T, D) normalised hidden states, mask (B, T) -> (B, T, D) and the routing."""
        routing = self.router(x, mask, hints)
        rows = x.flatten(0, 1)  # (N, D)
        y = self.experts(rows, routing.gates.flatten(0, 1))
        if self.dense is not None:
            share = self.coefficient(rows).softmax(dim=-1).to(y.dtype)  # (N, 2)
            y = share[:, :1] * y + share[:, 1:] * self.dense(rows)
        if self.meta is not None:
            y = y + self.meta(rows)
        return y.view_as(x), routing


@torch.no_grad()
def upcycle(
    mlp: nn.Module, router: Router, n_experts: int, start: str, meta: bool = True,
    residual: bool = False,
) -> MoE:  # fmt: skip
    """A trained dense FFN -> a sparse one whose meta expert and experts begin as its copies.

    start "released": plain copies, so the layer first computes (1 + sum of gates) * FFN(x).
    start "preserving": the layer first computes FFN(x), as before. Where the gates add up to 1,
    every output layer is halved (FFN/2 + FFN/2); else the experts' output layers begin at 0.
    Without a meta expert and with gates that add up to 1, plain copies preserve by themselves.
    start "fresh": FFN(x) as well; experts drawn anew, no copies, and their output layers are 0.
    """
    moe = MoE(mlp, router, n_experts, meta, residual)
    if start == "fresh":
        moe.experts.draw()
    if start == "preserving" and meta:
        share = 0.5 if router.sums_to_one else 0.0
        name = "down" if moe.experts.is_gated else "fc2"
        for part in (moe.experts, moe.dense) if residual else (moe.experts,):
            for param in getattr(part, name).parameters():
                param.mul_(share)
        for param in getattr(moe.meta, name).parameters():
            param.mul_(1 - share)
    return moe
