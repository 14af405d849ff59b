"""Experts computed from weights that are cast once a step equal the plain loop's, bit for bit."""

import copy
import gc
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ops
from config import TrainConfig
from engine import casts, run
from engine.lora import add_to_ffn
from engine.published import fill
from moe import MLP, Experts
from tests.conftest import FFNS, build, randn, shake

HALF = torch.bfloat16
GATES = randn(20, 3, seed=5).abs() * (randn(20, 3, seed=5) > 0)
CLASSES = pytest.mark.parametrize("cls", [Experts, ops.SortedExperts])


def pair(ffn, cls, rank=0):
    """The same experts twice: the second cast their weights once."""
    plain = Experts(ffn(16, 24), 3)
    if rank:
        add_to_ffn(plain, rank)
    once = copy.deepcopy(shake(plain))
    ops.use_sorted_experts(plain, cls)
    ops.use_sorted_experts(once, cls)
    casts.cast_once(once)
    assert type(once) is not cls and isinstance(once, cls)
    return plain, once


def through(experts, x, grad=True):
    with torch.autocast("cpu", HALF), torch.set_grad_enabled(grad):
        return experts(x, GATES)


@CLASSES
@FFNS
@pytest.mark.parametrize("rank", [0, 2])
def test_three_steps_of_two_micro_batches_are_equal_and_share_one_copy(ffn, cls, rank):
    found = []
    for experts in pair(ffn, cls, rank):
        optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, fused=True)
        values, kept = [], set()

        def keep(t, kept=kept):
            kept |= {t.untyped_storage()._cdata} if t.dtype == HALF and t.dim() > 1 else set()
            return t

        for step in range(3):
            optimizer.zero_grad()
            for micro in range(2):
                x = randn(20, 16, seed=2 * step + micro).requires_grad_()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    y = through(experts, x)
                again = checkpoint(through, experts, x, use_reentrant=False)
                (y.float().sin().sum() + again.float().cos().sum()).backward()
                values += [y, again, x.grad]
            values += [p.grad for p in experts.parameters()]
            optimizer.step()
        found.append([*values, *experts.parameters(), through(experts, x, grad=False)])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
    for param in experts.parameters():
        _, shared = casts.COPIES[param]
        assert shared.dtype == HALF and shared._version == 3 and not shared.requires_grad
        assert param.dim() < 3 or shared.untyped_storage()._cdata in kept


def fused_step(experts):
    for param in experts.parameters():
        param.grad = torch.ones_like(param)
    torch.optim.AdamW(experts.parameters(), lr=0.1, fused=True).step()


@CLASSES
@pytest.mark.parametrize("change", [
    fused_step, lambda experts: shake(experts, 7), lambda experts: experts.half().float(),
    lambda experts: [setattr(p, "data", 2 * p.data) for p in experts.parameters()],
    lambda experts: fill(experts, "", [(n, 3 * p) for n, p in experts.named_parameters()], None),
    lambda experts: experts.load_state_dict({n: -p for n, p in experts.state_dict().items()}),
])  # fmt: skip
def test_a_change_of_the_weights_is_noticed(cls, change):
    plain, once = pair(MLP, cls)
    x = randn(20, 16)
    before = [through(experts, x, grad=False) for experts in (plain, once)]
    with torch.no_grad():
        for experts in (plain, once):
            change(experts)
    after = [through(experts, x) for experts in (plain, once, copy.deepcopy(once))]
    assert torch.equal(*before) and not torch.equal(before[0], after[0])
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


def test_copies_belong_to_no_module_are_freed_with_it_and_not_changed_before_backward():
    plain, once = pair(MLP, Experts)
    with torch.inference_mode():
        through(once, randn(20, 16), grad=False)
    through(once, randn(20, 16)).sum().backward()
    assert [*once.state_dict()] == [*plain.state_dict()] and not [*once.buffers()]
    assert torch.equal(once(randn(20, 16), GATES), plain(randn(20, 16), GATES))  # no autocast
    before = len(casts.COPIES)
    del once
    gc.collect()
    assert len(casts.COPIES) == before - 4
    _, once = pair(MLP, Experts)
    y = through(once, randn(20, 16))
    through(shake(once, 1), randn(20, 16))
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_a_run_casts_once_where_that_saves_more_than_it_keeps(monkeypatch):
    monkeypatch.setattr(run, "shard", Mock())  # there is no GPU to move it to
    for device, world, accumulate, recomputes, once in (
        ("cpu", 1, 1, True, True), ("cuda", 1, 1, False, False), ("cuda", 1, 2, False, True),
        ("cuda", 1, 2, True, False), ("cpu", 2, 2, False, False),
    ):  # fmt: skip
        model = build(moe={})
        flags = TrainConfig(accumulate=accumulate, activation_checkpointing=recomputes)
        values = {"flags": flags, "device": torch.device(device), "world": world, "rank": 0}
        run.Run.place(SimpleNamespace(**values, processes=None), model)
        assert isinstance(model.decoder.blocks[0].mlp.experts, casts.CastOnce) is once
