"""A model over several processes: each keeps a share of every parameter, or some of the experts.

FSDP2 (torch's fully_shard) gathers a block's weights just before they are needed and scatters
their gradients afterwards, so that all processes train one model. With expert parallelism, a
process keeps whole experts instead, and the tokens move: permute, all-to-all, grouped matmul,
all-to-all back, unpermute (Lepikhin et al. 2020). Sharded weights are torch's DTensors.

Shapes: E experts, n processes that share them, R routed tokens of this process, D d_model.
"""

import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from config import IMAGE_ID, UserError
from engine.processes import Processes
from model import MedMoE
from ops import DispatchPlan, SortedExperts

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


class ParallelExperts(SortedExperts):
    """Experts kept by n processes: process i has experts i * E / n and on."""

    def grouped_ffn(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """rows (R, D) sorted by expert -> the outputs of their experts, (R, D)."""
        ends = plan.offsets.long()
        mine = torch.diff(ends, prepend=ends.new_zeros(1)).view(self.n, -1)  # (n, E / n) to send
        theirs = torch.empty_like(mine)  # (n, E / n) rows to receive from each, for my experts
        dist.all_to_all_single(theirs, mine, group=self.group)
        sent, received = mine.sum(dim=1).tolist(), theirs.sum(dim=1).tolist()
        arrived = AllToAll.apply(rows, sent, received, self.group)  # by process, then by expert
        expert = torch.arange(theirs.shape[1], device=rows.device).repeat(self.n)
        expert = expert.repeat_interleave(theirs.flatten())
        order = expert.argsort(stable=True)
        offsets = theirs.sum(dim=0).cumsum(dim=0).int()
        here = DispatchPlan(order, expert[order], offsets)
        out = super().grouped_ffn(arrived[order], here)
        return AllToAll.apply(out[order.argsort()], received, sent, self.group)


def shard(model: MedMoE, processes: Processes, device: torch.device, expert_parallel: int) -> None:
    """Shard a model that every process holds whole, in place, on the device. Raises UserError.

    expert_parallel: how many processes share the experts; 1: none
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
            shard_experts(block.mlp.experts, mesh)
        # Stacked experts are sharded along their rows, as E may be less than the processes.
        fully_shard(block, mesh=every, shard_placement_fn=lambda param: Shard(
            1 if param.dim() == 3 and param.shape[1] % every.size() == 0 else 0))  # fmt: skip
    tower = set()
    if any(p.requires_grad for p in model.vision.parameters()):
        for block in model.vision.blocks:
            fully_shard(block, mesh=every)
    else:  # small beside the decoder; replicated, one process alone can run it
        tower = set(model.vision.to(device).parameters())
    model.decoder.register_forward_pre_hook(partial(run_idle_modules, model))
    fully_shard(model, mesh=every, ignored_params=tower)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the loss is a share of the whole: sum, not mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def run_idle_modules(model: MedMoE, decoder: nn.Module, args: tuple) -> tuple | None:
    """Without an image in its batch a process still takes part in gathering tower and projector.

    It runs them on a blank image and adds 0 times the result to the decoder's input, so that all
    processes exchange in the same order, forward and backward, and these gradients are 0.
    """
    x, mask, hints, *cache = args
    if (hints.ids == IMAGE_ID).any():
        return None
    size = model.config.vision.image_size
    blank = torch.zeros(1, 3, size, size, device=x.device)
    return x + 0 * model.projector(model.vision(blank)).sum(), mask, hints, *cache


def shard_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Give each process of the mesh's "part" its own experts, and the copies a share of those."""
    for module in experts.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(param.data, mesh["part"], [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, param.requires_grad))
    experts.__class__ = ParallelExperts
    experts.layer = ()  # how many rows are sent has to be known
    experts.group, experts.n = mesh["part"].get_group(), mesh["part"].size()
    fully_shard(experts, mesh=mesh["copy"], shard_placement_fn=lambda _: Shard(1))
