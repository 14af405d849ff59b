"""Expert weights cast once an optimizer step, where autocast would cast them in every forward.

The copy is made at the first use after a change, and shared by forward and backward, micro-batches,
recomputed activations and evaluation. What is computed is bit for bit what Experts.forward computes
under autocast. Only for a model that one process has whole: FSDP's weights come and go.

Shapes: N tokens, E experts, D d_model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from moe import Experts
from ops import SortedExperts

# Weight -> (its memory and version when it was copied, the copy). Gone with the weight; no part of
# the model, so neither saved nor copied with it.
COPIES = WeakTensorKeyDictionary()


def count_step(optimizer: torch.optim.Optimizer, *_: Sequence) -> None:
    """torch's fused optimizers change weights without counting it in their versions."""
    for group in optimizer.param_groups:
        increment_version([param for param in group["params"] if param in COPIES])


register_optimizer_step_post_hook(count_step)


class Substitute(torch.autograd.Function):
    """A weight's copy in its place; autograd casts the gradient back and gives it to the weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor) -> Tensor:
        return copy

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight.to(dtype), copied only if the weight has changed since the last time."""
    state = StorageWeakRef(weight.untyped_storage()), weight._version
    known, copy = COPIES.get(weight, (None, None))
    if known != state or copy.dtype != dtype:
        # An inference tensor could not be kept for backward. Memory that is used again saves
        # page faults, on a CPU five sixths of the time; a backward that comes too late is an
        # error, as it is without autocast.
        with torch.inference_mode(False), torch.no_grad():
            like = copy is not None and (copy.device, copy.dtype) == (weight.device, dtype)
            copy = copy.copy_(weight) if like else weight.to(dtype)
        COPIES[weight] = state, copy
    return Substitute.apply(weight, copy)


class CastOnce:
    """Mixed into a class of experts: under autocast it computes with such copies."""

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """x (N, D), gates (N, E) -> (N, D)"""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind)
        wide = {n: p for n, p in self.named_parameters() if p.dtype == torch.float32 != dtype}
        if not wide or not torch.is_autocast_enabled(kind):
            return super().forward(x, gates)
        return functional_call(self, {n: cast(p, dtype) for n, p in wide.items()}, (x, gates))


class CastOnceExperts(CastOnce, Experts):
    pass


class CastOnceSortedExperts(CastOnce, SortedExperts):
    pass


def cast_once(model: nn.Module) -> None:
    """From now on the experts' weights are cast once for each of their values."""
    for module in model.modules():
        if isinstance(module, Experts):
            is_sorted = isinstance(module, SortedExperts)
            module.__class__ = CastOnceSortedExperts if is_sorted else CastOnceExperts
