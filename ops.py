"""Attention, and rows to experts and back: permute, grouped_linear, grouped_ffn, unpermute.

A router gives a gate for every (row, expert) pair; a pair whose gate is not zero is a visit.
`permute` lays the visits out expert by expert, `grouped_linear` multiplies each expert's stretch
with that expert's matrix, `unpermute` weighs the results by their gates and adds them up per row.
No row is ever dropped or padded, whatever the router decides. What stands here in torch is the
definition; on a Hopper GPU the kernels of cuda/ compute the same where `--kernels` allows it.

Shapes: N rows, E experts, R visits, D, F widths; B batch, H heads, T queries, C keys, K head width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(K) + visible) v; q (B, H, T, K), k and v (B, H, C, K) -> (B, H, T, K).

    visible (B, 1, T, C): 0 where a query may look, else -inf; None: everywhere. On a CPU, where
    gradients are needed, by definition: torch's fused kernel takes 4 times as long backward in
    bf16.
    """
    if q.device.type != "cpu" or not q.requires_grad:
        mask = None if visible is None else visible.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, C)
    if visible is not None:
        scores = scores + visible  # in fp32
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


class Plan(NamedTuple):
    """Who visits whom, visits sorted by expert, and by row within an expert."""

    row: Tensor | None  # (R,) int64, the row of each visit; None: see slot
    expert: Tensor | None  # (R,) int64, ascending
    offs: Tensor  # (E,) int32, where each expert's stretch ends
    slot: Tensor | None = None  # for the kernels: (N, E) int32, where in R a visit lies, -1: none


def plan_visits(gates: Tensor) -> Plan:
    """gates (N, E), 0 = no visit -> the visits. One host sync on a GPU: R must be known.

    For the kernels the visits are listed in `slot` alone, and the sync is left to `permute`.
    """
    if kernels.serve_routing(gates):
        slot, offs = kernels.CALL.route(gates.detach().contiguous())
        return Plan(None, None, offs, slot)
    return _listed(gates.t() != 0)


def _listed(visits: Tensor) -> Plan:  # (E, N) bool
    expert, row = visits.nonzero(as_tuple=True)  # both (R,)
    return Plan(row, expert, visits.sum(dim=1).cumsum(dim=0).int())


def _as_list(plan: Plan) -> Plan:
    """A plan made for the kernels, where torch has to do after all."""
    return plan if plan.row is not None else _listed(plan.slot.t() >= 0)


def permute(x: Tensor, plan: Plan) -> Tensor:
    """x (N, D) -> (R, D): a copy of its row for every visit."""
    if plan.slot is not None and kernels.serve_rows(x):
        return kernels.CALL.permute(x.contiguous(), plan.slot, int(plan.offs[-1]))
    return x.index_select(0, _as_list(plan).row)


def unpermute(y: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    """y (R, D) results of the visits, gates (N, E) -> (N, D): per row, the gated sum."""
    if plan.slot is not None and kernels.serve_rows(y):
        return kernels.CALL.unpermute(y.contiguous(), plan.slot, gates.contiguous())
    plan = _as_list(plan)
    weight = gates[plan.row, plan.expert].to(y.dtype)  # (R,)
    out = y.new_zeros(gates.shape[0], y.shape[1])
    return out.index_add(0, plan.row, y * weight[:, None])


class Layer(NamedTuple):
    """One linear layer of E experts."""

    weight: Tensor  # (E, F, D)
    bias: Tensor | None = None  # (E, F)
    low: tuple[Tensor, Tensor, float] | None = None  # engine/lora.py: A, B and what they count


def grouped_ffn(x: Tensor, layers: Sequence[Layer], plan: Plan) -> Tensor:
    """x (R, D) in the plan's order -> (R, D): each row through its expert's FFN.

    Two layers: fc2(gelu(fc1 x)), three: down(silu(gate x) * up x); see moe.MLP and GatedMLP.
    """
    if kernels.active(x) and all(layer.low is None for layer in layers):
        ffn, params = kernels.GatedFFN, [layer.weight for layer in layers]
        if len(layers) == 2:
            ffn, params = kernels.GeluFFN, [p for layer in layers for p in layer[:2]]
        rows, *params = _cast(x, *params)
        if kernels.serve(rows, *params):
            return kernels.apply(ffn, rows, *params, plan.offs)
    *first, last = layers
    if len(first) == 1:
        hidden = F.gelu(_linear(x, first[0], plan), approximate="tanh")  # (R, F)
    else:
        hidden = F.silu(_linear(x, first[0], plan)) * _linear(x, first[1], plan)
    return _linear(hidden, last, plan)


def _linear(x: Tensor, layer: Layer, plan: Plan) -> Tensor:
    y = grouped_linear(x, layer.weight, layer.bias, plan)
    if layer.low is not None:
        a, b, scale = layer.low
        y = y + scale * grouped_linear(grouped_linear(x, a, None, plan), b, None, plan)
    return y


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (R, D) in the plan's order, weight (E, F, D), bias (E, F) -> (R, F): x_r w[e]' + bias[e].

    The kernels where they serve; torch.nn.functional.grouped_mm where `_has_grouped_mm`; else one
    matmul per expert that is visited, which is the definition. Computed in the weight's dtype, or
    in that of autocast.
    """
    x, weight, bias = _cast(x, weight, bias)
    if kernels.serve(x, weight):
        return kernels.apply(kernels.Linear, x, weight, bias, plan.offs)
    if _has_grouped_mm(x, weight):
        y = _DenseGrad.apply(F.grouped_mm(x, weight.transpose(1, 2), offs=plan.offs))
        return y if bias is None else y + bias.index_select(0, _as_list(plan).expert)
    sizes = [end - start for start, end in pairwise([0, *plan.offs.tolist()])]
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    groups = zip(x.split(sizes), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(*group) for group in groups if len(group[0]) or not len(x)])


def _cast(x: Tensor, *params: Tensor | None) -> list[Tensor | None]:
    """This process's share of parameters, and x, in the dtype that a matmul of them runs in."""
    params = [None if p is None else local(p) for p in params]
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)  # it does not know grouped_mm
    dtype = torch.get_autocast_dtype(kind) if autocast else params[0].dtype
    return [None if t is None else t.to(dtype) for t in (x, *params)]


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that lies in this process: all of it, unless it is spread over some."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """For 2 or 4 byte floats in rows that are multiples of 16 bytes, at least one of them.

    Below sm_90, and on CPUs, torch loops over the experts itself, empty ones too: a loop here is
    as good, and for the few rows of an answer's next token twice as fast.
    """
    if x.device.type == "cpu":
        able = torch.is_grad_enabled()
    else:
        able = torch.cuda.get_device_capability(x.device) >= (9, 0)
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    return able and aligned and x.dtype != torch.float64 and len(x) > 0


class _DenseGrad(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm's backward refuses an expanded one."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()
