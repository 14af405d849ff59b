"""Two processes, forked here, compute what one computes; they exchange through gloo on the CPU."""

import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from config import UserError
from engine.parallel import shard
from engine.processes import Processes, like, put, write_tensors
from engine.run import Run
from ops import local
from tests.test_model import ROWS

CPU = torch.device("cpu")


def in_two(folder, work):
    """work(Processes) in each of two forked processes -> what it returns, by rank."""
    children = []
    for rank in (0, 1):
        if (child := os.fork()) == 0:
            code = 1
            try:
                dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank,
                                        world_size=2)  # fmt: skip
                torch.save(work(Processes(rank, 2)), folder / f"{rank}.pt")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def gradients(model, batches):
    """One step of two micro-batches -> losses, and the gradients wherever they are kept."""
    losses = []
    for batch in batches:
        loss = model.loss(batch).total
        loss.backward()
        losses.append(loss.item())
    return torch.tensor(losses), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("n", "trains_tower"), [(1, True), (1, False), (2, False)],
                         ids=["tower", "fsdp", "experts"])  # fmt: skip
def test_two_processes_have_loss_and_gradients_of_one(tmp_path, build, collate, n, trains_tower):
    """In the second micro-batch the second process has no image."""
    import torch._dynamo  # which FSDP imports: here once, not in each process

    model = build("stablelm", {"router": "topk", "top_k": 2})
    model.vision.requires_grad_(trains_tower)
    images = torch.randn(4, 3, 32, 32)
    mine = [[ROWS[:1], ROWS[1:2]], [ROWS[1:2], ROWS[2:3]]]  # of each process
    pixels = [[images[:1], images[1:2]], [images[2:3], images[:0]]]
    batches = [list(map(collate, *both)) for both in zip(mine, pixels, strict=True)]
    expected = [gradients(model, batches[rank])[0] for rank in (0, 1)]
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    model.zero_grad()

    def work(processes):
        shard(model, processes, CPU, n)
        params, run = dict(model.named_parameters()), object.__new__(Run)
        run.world, run.processes = 2, processes
        run.params = {n: p for n, p in params.items() if p.requires_grad}
        loss, grads = gradients(model, batches[processes.rank])
        found = run.clip_gradients(0.0)
        write_tensors(grads, tmp_path / f"{processes.rank}.safetensors")
        with torch.no_grad():
            for name, param in params.items():
                put(param, 2 * weights[name])
                assert local(like(param, weights[name])).equal(local(param) / 2)
        return loss, found, {n: local(p).shape for n, p in params.items()}

    found = in_two(tmp_path, work)
    assert not (tmp_path / "1.safetensors").exists()  # the first process alone writes
    for rank in (0, 1):
        torch.testing.assert_close(found[rank][0], expected[rank])
        assert found[rank][1] == pytest.approx(norm.item(), rel=1e-4)
    grads = load_file(tmp_path / "0.safetensors")
    assert grads.keys() == whole.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-4, rtol=1e-4, msg=name)
    stacked, tower = "decoder.blocks.0.mlp.experts.gate.weight", "vision.blocks.1.fc1.weight"
    (e, f, d), kept, shapes = weights[stacked].shape, weights[tower].shape, found[1][2]
    assert shapes[stacked] == ((e, f // 2, d) if n == 1 else (e // 2, f, d))
    assert shapes[tower] == ((kept[0] // 2, kept[1]) if trains_tower else kept)  # frozen: whole


def test_sums_shares_and_joins_over_two_processes(tmp_path):
    def work(processes):
        rank = processes.rank
        found = processes.share(range(5)), processes.sum(1.5, rank), processes.join({rank: rank})
        processes.end()
        return *found, processes.is_first, dist.is_initialized()

    joined = {0: 0, 1: 1}
    assert in_two(tmp_path, work) == [([0, 2, 4], [3.0, 1.0], joined, True, False),
                                      ([1, 3], [3.0, 1.0], joined, False, False)]  # fmt: skip


@pytest.mark.parametrize(("world", "n"), [(1, 2), (4, 3), (3, 3)])
def test_the_processes_that_share_the_experts_divide_both(build, world, n):
    with pytest.raises(UserError, match=f"--expert-parallel {n}: must divide the {world} proc"):
        shard(build(moe={}), Processes(0, world), CPU, n)
