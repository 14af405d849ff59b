"""lab.bench kernels times implementations that are equal, at a small size here.

The GPU's part runs on the simulated GPU of tests/cuda_on_cpu.h.
"""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import ops
from config import UserError
from lab import bench, bench_kernels
from tests import cuda_on_cpu

CPU = torch.device("cpu")
SMALL = {"phi2": SimpleNamespace(family="phi", d_model=16, d_ff=24),
         "stablelm2": SimpleNamespace(family="stablelm", d_model=16, d_ff=24)}  # fmt: skip
BOTH = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, decoder in SMALL.items():
        small = SimpleNamespace(model=SimpleNamespace(decoder=decoder))
        monkeypatch.setitem(config.PRESETS, name, small)


@BOTH
@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_the_implementations_of_the_layer_compute_the_same(name, routing):
    experts = bench_kernels.experts_of(name, CPU, torch.float32)
    gates, x = bench_kernels.gates_of(40, routing, CPU), torch.randn(40, 16)
    assert (gates != 0).sum(dim=1).eq(2).all()
    assert ((gates != 0).sum(dim=0)[0] == 40) == (routing == "skewed")
    ours, looped = experts(x, gates), bench_kernels.Experts.forward(experts, x, gates)
    assert type(experts) is ops.SortedExperts
    torch.testing.assert_close(ours, looped, rtol=1e-4, atol=1e-4)
    kept = bench_kernels.einsum(experts, x, gates)
    near = (kept - ours).abs().amax(dim=1) < 1e-4
    assert near.all() == ((gates != 0).sum(dim=0).max() <= 25)  # 1.25 times the mean of 20
    assert near[:25].all()  # the first tokens are never dropped


def test_the_matmuls_alone_are_those_of_forward_and_backward():
    experts = bench_kernels.experts_of("phi2", CPU, torch.float32)
    gates, x = bench_kernels.gates_of(40, "balanced", CPU), torch.randn(40, 16)
    with FlopCounterMode(display=False) as alone:
        bench_kernels.matmuls(experts, x, gates)()
    with FlopCounterMode(display=False) as looped:
        bench_kernels.both_ways(bench_kernels.Experts.forward, experts, x, gates, x)
    assert alone.get_total_flops() == looped.get_total_flops() == 3 * 2 * 2 * 80 * 16 * 24


def test_a_wrong_layer_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(ops, "permute", lambda x, plan: x[plan.token].roll(1, 0))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["kernels", "--tokens", "8", "--rounds", "1"])
    assert "the layer is wrong" in capsys.readouterr().err


def test_on_a_cpu_it_compares_the_loop_the_sorted_layer_and_their_matmuls(capsys):
    found = bench.main(["kernels", "--preset", "stablelm2", "--tokens", "16", "--rounds", "1"])
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == found
    layer = found["sizes"][0]["layer"]
    assert set(layer["seconds"]) == {"matmuls", "loop", "sorted", "einsum"}
    assert layer["flops"] == 3 * 2 * 2 * 16 * 3 * 16 * 24
    for what, times in (("train", layer["seconds"]), ("answer", layer["answer_seconds"])):
        (line,) = (line for line in table if line.split()[:2] == [what, "sorted"])
        assert line.endswith(f" {times['sorted'] / times['loop']:.2f} x the loop")


@pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason="no simulated GPU here")
@BOTH
def test_every_kernel_is_compared_and_timed_where_the_extension_is_on(name, monkeypatch, capsys):
    cuda_on_cpu.Machine(cuda_on_cpu.compiled()).set(order=0, blocks=3, only=-1)
    monkeypatch.setattr(ops, "_enabled", {"cpu"})
    flags = bench_kernels.KernelsConfig(preset=name, rounds=1)
    timer = partial(bench_kernels.medians, rounds=1, device=CPU)
    found = bench_kernels.bench_size(flags, 16, timer, peak=1e9)
    printed = capsys.readouterr().out
    for what in ("route", "permute", "unpermute_grad", "forward", "input grad", "weight grad"):
        assert f"  {what}" in printed
    assert ("gelu" in found["products"]) == (name == "phi2")
    monkeypatch.setattr(ops, "weight_grad", lambda dy, x, offs: torch.zeros(4, 24, 16))
    with pytest.raises(UserError, match="weight grad is wrong"):
        bench_kernels.bench_size(flags, 16, timer, peak=1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_check_is_a_user_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["kernels", "--gpu-check"])
    assert "--device cuda" in capsys.readouterr().err
