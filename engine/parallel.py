"""A model over several processes: each keeps a share of every parameter, or some of the experts.

FSDP2 (torch's fully_shard) gathers a block's weights just before they are needed and spreads their
gradients afterwards, so that all processes train one model. With expert parallelism, a process
keeps whole experts instead, and the rows travel: permute, all-to-all, grouped matmul, all-to-all
back, unpermute (Lepikhin et al. 2020). Weights that are spread are DTensors: torch's tensors that
know which part of them lies where.

Shapes: E experts, n processes that share them, R visits of a process's own rows, D d_model.
"""

import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpoint import write_whole
from config import UserError
from engine.processes import Processes
from model import MedMoE
from ops import Plan, local

warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class AllToAll(torch.autograd.Function):
    """Send sent[i] rows to process i, receive received[i] from it; gradients go the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.way = received, sent, group
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, *ctx.way), None, None, None


class Exchange:
    """Rows visit experts that other processes keep: process i has experts i * E / n and on."""

    def __init__(self, mesh: DeviceMesh):
        self.group, self.n = mesh.get_group(), mesh.size()

    def __call__(self, rows: Tensor, plan: Plan, ffn: Callable[[Tensor, Plan], Tensor]) -> Tensor:
        """rows (R, D) sorted by expert -> what their experts make of them, (R, D)."""
        ends = plan.offs.long()
        mine = torch.diff(ends, prepend=ends.new_zeros(1)).view(self.n, -1)  # (n, E / n) to go
        theirs = torch.empty_like(mine)  # (n, E / n) rows to come from each, for my experts
        dist.all_to_all_single(theirs, mine, group=self.group)
        sent, received = mine.sum(dim=1).tolist(), theirs.sum(dim=1).tolist()
        arrived = AllToAll.apply(rows, sent, received, self.group)  # by process, then by expert
        expert = torch.arange(theirs.shape[1], device=rows.device).repeat(self.n)
        expert = expert.repeat_interleave(theirs.flatten())
        order = expert.argsort(stable=True)
        here = Plan(order, expert[order], theirs.sum(dim=0).cumsum(dim=0).int())
        out = ffn(arrived[order], here)
        return AllToAll.apply(out[order.argsort()], received, sent, self.group)


def shard(model: MedMoE, processes: Processes, device: torch.device, expert_parallel: int) -> None:
    """Spread a model that every process holds whole, in place, on the device. Raises UserError.

    expert_parallel: so many processes share the experts between them; 1: none
    """
    n = expert_parallel
    n_experts = model.config.moe.n_experts if model.config.moe else n
    if processes.world % n or n_experts % n:
        raise UserError(f"--expert-parallel {n}: must divide the {processes.world} processes and "
                        f"the {n_experts} experts")  # fmt: skip
    if processes.world == 1:
        model.to(device)
        return
    mesh = init_device_mesh(device.type, (processes.world // n, n), mesh_dim_names=("copy", "part"))
    every = mesh["copy", "part"]._flatten("every")
    for block in model.decoder.blocks:
        if block.is_sparse and n > 1:
            spread_experts(block.mlp.experts, mesh)
        fully_shard(block, mesh=every, shard_placement_fn=placement(every.size()))
    tower = set()
    if any(p.requires_grad for p in model.vision.parameters()):
        for block in model.vision.blocks:
            fully_shard(block, mesh=every)
    else:  # small beside the decoder; whole, it can be asked by one process alone
        tower = set(model.vision.to(device).parameters())
    fully_shard(model, mesh=every, ignored_params=tower)
    model.together = True
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is a share of the whole: sum, not mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def spread_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process of the mesh's "part" its own experts, and the copies a share of those."""
    for module in experts.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(param.data, mesh["part"], [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, param.requires_grad))
    fully_shard(experts, mesh=mesh["copy"], shard_placement_fn=lambda _: Shard(1))
    experts.exchange = Exchange(mesh["part"])


def placement(n: int) -> Callable[[nn.Parameter], Shard]:
    """Along which axis to share a parameter: stacked experts by their rows, as E may be below n."""
    return lambda param: Shard(1 if param.dim() == 3 and param.shape[1] % n == 0 else 0)


def clip_gradients(params: Iterable[nn.Parameter], largest: float, processes: Processes) -> float:
    """Scale all gradients to a joint norm of at most `largest` (0: as they are) -> their norm.

    Of parameters that are spread, every process adds the shares it keeps.
    """
    grads = [local(p.grad) for p in params if p.grad is not None]
    norm = processes.sum(nn.utils.get_total_norm(grads).item() ** 2)[0] ** 0.5
    if largest:
        scale = min(1.0, largest / (norm + 1e-6))
        for grad in grads:
            grad.mul_(scale)
    return norm


def put(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, as files hold it, into a place that may hold only a share of it."""
    local(place).copy_(local(like(place, tensor)))


def like(place: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, spread as `place` is, on its device."""
    tensor = tensor.to(place.device)
    if not isinstance(place, DTensor):
        return tensor
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def write_tensors(values: dict[str, Tensor], file: Path) -> None:
    """One safetensors file of whole tensors; those that are spread are written by all processes.

    torch's distributed checkpoint writes every process's shares beside it and joins them; 2.13
    makes a 0 of any tensor without a dimension, so there may be none among these.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not any(isinstance(t, DTensor) for t in values.values()):
        if is_first:
            write_whole(values, file)
        return
    parts = file.with_suffix(".parts")
    writer = dcp.HuggingFaceStorageWriter(
        str(parts), save_distributed=True, enable_consolidation=True
    )
    dcp.save(values, storage_writer=writer)
    if is_first:
        (whole,) = parts.glob("*.safetensors")
        whole.rename(file)
        shutil.rmtree(parts)
