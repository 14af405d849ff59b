"""The Med-MoE feed-forward layer: a router, E domain experts, and an always-on meta expert.

    y = meta(x) + sum over e of gates[e] * expert_e(x)          (paper, equation 4)

Shapes: B batch, T positions, N = B*T, D d_model, F FFN hidden, E experts, k experts per token,
R visits, that is pairs of a token and an expert.
"""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops


class Routing(NamedTuple):
    """What a router decided. A value that is returned, never stored on a module or in a global."""

    gates: Tensor  # (B, T, E) fp32 >= 0; an exact 0 means "this token does not visit this expert"
    logits: Tensor  # (B, T, E) fp32 scores before any choice: for the losses and the plots


class Hints(NamedTuple):
    """What a router may know besides the hidden states. None: not known here."""

    prompt: Tensor | None = None  # (B, T) bool, True before the first answer token
    modality: Tensor | None = None  # (B,) int64 index into config.MODALITIES, -1 unknown
    held: Routing | None = None  # (B, 1, E): what was decided at the position before (KV cache)


class Router(nn.Module):
    """Scores every expert for every token. To write your own, subclass and override `gate`.

    level "token" decides for each position; "sequence" once a sample, on the mean of its prompt,
    and keeps to it while the answer is generated, so that decoding touches k experts only.
    """

    causal = True  # False if gates at t may depend on answer tokens after t; generate() refuses
    batch_invariant = True  # False if gates of one sample may depend on the others in the batch
    frozen = False  # True: phase 3 does not train it
    sums_to_one = False  # True if the gates of every real token add up to 1: see `upcycle`
    needs: ClassVar[tuple[str, ...]] = ()  # fields of Hints that `gate` takes as well, by name

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, level: str = "token"):
        super().__init__()
        self.top_k = top_k
        self.level = level
        self.proj = nn.Linear(d_model, n_experts)  # with a bias, as in Med-MoE

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        """logits (B, T, E), mask (B, T) True on real tokens, x (B, T, D) -> gates (B, T, E)."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor, hints: Hints = Hints()) -> Routing:
        if self.level == "sequence" and hints.held is not None:
            return Routing(*(kept.expand(-1, x.shape[1], -1) for kept in hints.held))
        real = mask
        with torch.autocast(x.device.type, enabled=False):  # fp32: bf16 rounding flips close calls
            x = x.float()
            if self.level == "sequence":
                x = pool(x, mask if hints.prompt is None else mask & hints.prompt)  # (B, 1, D)
                mask = torch.ones_like(mask[:, :1])
            logits = F.linear(x, self.proj.weight.float(), self.proj.bias.float())  # (B, T or 1, E)
            extra = {name: getattr(hints, name) for name in self.needs}
            gates = self.gate(logits, mask, x, **extra)
        wide = (-1, real.shape[1], -1)  # one decision a sample serves all its positions
        # Not a product: whatever a gate is on padding, even NaN, padding visits nobody.
        gates = gates.expand(wide).masked_fill(~real[..., None], 0.0)
        return Routing(gates, logits.expand(wide))


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
    """Each token visits its k likeliest experts; learned with the experts (MoE-LLaVA's way)."""

    @property
    def sums_to_one(self) -> bool:
        return self.top_k > 1

    def gate(self, logits: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return top_k_gates(logits.softmax(dim=-1), self.top_k)


class ModalityRouter(TopKRouter):
    """Med-MoE: one linear layer trained in phase 2 to name the modality, then frozen."""

    frozen = True


class RandomRouter(TopKRouter):
    """Control: a top-k router that nobody trained. Its weights stay as they were drawn."""

    frozen = True


class OracleRouter(Router):
    """Control: the true modality's expert with gate 1; all experts alike where it is unknown."""

    frozen = True
    sums_to_one = True
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


def get_router(spec: str) -> type[Router]:
    """A name from ROUTERS, or FILE.py:Class for a class of your own. Raises ValueError."""
    if spec in ROUTERS:
        return ROUTERS[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"{spec!r} is neither one of {', '.join(ROUTERS)} nor FILE.py:Class")
    module_spec = importlib.util.spec_from_file_location(f"router_{Path(path).stem}", path)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    router = getattr(module, name, None)
    if not (isinstance(router, type) and issubclass(router, Router) and router is not Router):
        raise ValueError(f"{spec!r}: the file has no subclass of moe.Router named {name!r}")
    return router


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

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (N, D), gates (N, E) -> (N, D): the gated sum over the experts each row visits."""
        plan = ops.plan_visits(gates)
        rows = ops.permute(x, plan)  # (R, D)
        out = self.exchange(rows, plan, self.ffn) if self.exchange else self.ffn(rows, plan)
        return ops.unpermute(out, gates, plan)

    def ffn(self, rows: Tensor, plan: ops.Plan) -> Tensor:  # (R, D) -> (R, D)
        if self.is_gated:
            hidden = F.silu(self.linear("gate", rows, plan)) * self.linear("up", rows, plan)
            return self.linear("down", hidden, plan)
        hidden = F.gelu(self.linear("fc1", rows, plan), approximate="tanh")  # (R, F)
        return self.linear("fc2", hidden, plan)

    def linear(self, name: str, rows: Tensor, plan: ops.Plan) -> Tensor:
        layer = getattr(self, name)
        y = ops.grouped_linear(rows, layer.weight, getattr(layer, "bias", None), plan)
        if hasattr(layer, "lora_a"):  # engine/lora.py
            low = ops.grouped_linear(rows, layer.lora_a, None, plan)  # (R, rank)
            y = y + layer.lora_scale * ops.grouped_linear(low, layer.lora_b, None, plan)
        return y


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
    """
    moe = MoE(mlp, router, n_experts, meta, residual)
    if start == "preserving" and meta:
        share = 0.5 if router.sums_to_one else 0.0
        name = "down" if moe.experts.is_gated else "fc2"
        for part in (moe.experts, moe.dense) if residual else (moe.experts,):
            for param in getattr(part, name).parameters():
                param.mul_(share)
        for param in getattr(moe.meta, name).parameters():
            param.mul_(1 - share)
    return moe


def load_balancing_loss(routing: Routing, mask: Tensor) -> Tensor:
    """E * sum over e of (share of visits) * (mean probability): 1 when balanced, E at collapse.

    Fedus et al. 2021, equation 4, over the real tokens of mask (B, T); k visits count 1/k each.
    """
    gates, logits = routing.gates[mask], routing.logits[mask]  # both (N, E)
    visits = (gates != 0).float().sum(dim=0)  # (E,)
    share = visits / visits.sum().clamp(min=1)
    return gates.shape[-1] * (share * logits.softmax(dim=-1).mean(dim=0)).sum()


def router_z_loss(routing: Routing, mask: Tensor) -> Tensor:
    """Mean of logsumexp(logits) squared over real tokens (Zoph et al. 2022, equation 5)."""
    return routing.logits[mask].logsumexp(dim=-1).square().mean()
