"""Attention, and rows to experts and back: permute, grouped_linear, unpermute, in plain torch.

A router gives a gate for every (row, expert) pair; a pair whose gate is not zero is a visit.
`permute` lays the visits out expert by expert, `grouped_linear` multiplies each expert's stretch
with that expert's matrix, `unpermute` weighs the results by their gates and adds them up per row.
No row is ever dropped or padded, whatever the router decides.

Shapes: N rows, E experts, R visits, D, F widths; B batch, H heads, T queries, C keys, K head width.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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

    row: Tensor  # (R,) int64, the row of each visit
    expert: Tensor  # (R,) int64, ascending
    offs: Tensor  # (E,) int32, where each expert's stretch ends


def plan_visits(gates: Tensor) -> Plan:
    """gates (N, E), 0 = no visit -> the visits. One host sync on a GPU: R must be known."""
    visits = gates.t() != 0  # (E, N) bool
    expert, row = visits.nonzero(as_tuple=True)  # both (R,)
    return Plan(row, expert, visits.sum(dim=1).cumsum(dim=0).int())


def permute(x: Tensor, plan: Plan) -> Tensor:
    """x (N, D) -> (R, D): a copy of its row for every visit."""
    return x.index_select(0, plan.row)


def unpermute(y: Tensor, gates: Tensor, plan: Plan) -> Tensor:
    """y (R, D) results of the visits, gates (N, E) -> (N, D): per row, the gated sum."""
    weight = gates[plan.row, plan.expert].to(y.dtype)  # (R,)
    out = y.new_zeros(gates.shape[0], y.shape[1])
    return out.index_add(0, plan.row, y * weight[:, None])


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """x (R, D) in the plan's order, weight (E, F, D), bias (E, F) -> (R, F): x_r w[e]' + bias[e].

    torch.nn.functional.grouped_mm where `_has_grouped_mm`, else one matmul per expert that is
    visited, which is the definition. Computed in the weight's dtype, or in that of autocast.
    """
    kind, weight = x.device.type, local(weight)
    autocast = torch.is_autocast_enabled(kind)  # it does not know grouped_mm
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else local(bias).to(dtype)
    if _has_grouped_mm(x, weight):
        y = _DenseGrad.apply(F.grouped_mm(x, weight.transpose(1, 2), offs=plan.offs))
        return y if bias is None else y + bias.index_select(0, plan.expert)
    sizes = [end - start for start, end in pairwise([0, *plan.offs.tolist()])]
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    groups = zip(x.split(sizes), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(*group) for group in groups if len(group[0]) or not len(x)])


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
