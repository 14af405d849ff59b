"""What the benchmark compares computes the same; some of it needs transformers."""

import ctypes
import json
from dataclasses import replace

import pytest
import torch

import config
import ops
from config import IGNORE, IMAGE_ID, UserError
from lab import bench
from model import freeze_all_but
from moe import MLP, Experts
from tests import cuda_on_cpu
from tests.conftest import build, collate
from tests.mini import error_line

ROWS = [([1, 2, *[IMAGE_ID] * 4, 7, 8, 9, 10], [IGNORE] * 8 + [9, 10]), ([5, 6, 7], [IGNORE, 6, 7])]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
def test_loss_gradients_and_greedy_tokens_are_those_of_the_assembled_model(family):
    pytest.importorskip("transformers")
    ours = build(family)
    freeze_all_but(ours, ("projector.*", "decoder.*"))
    theirs = bench.Assembled(ours).eval()
    losses = [model.loss(collate(ROWS)) for model in (ours, theirs)]
    losses = [loss.total / loss.n_tokens for loss in losses]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    mlp, their_mlp = ours.decoder.blocks[0].mlp, theirs.decoder.model.layers[0].mlp
    for param, other in zip(mlp.parameters(), their_mlp.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-5)
    batch = collate(ROWS, side="left")
    tokens = bench.answer(ours, batch, torch.float32, 32)
    assert tokens.shape == (2, 32) and len(tokens.unique()) > 3
    assert torch.equal(tokens, theirs.answer(batch, torch.float32, 32))


@pytest.fixture(params=["phi2", "stablelm2"])
def name(request, monkeypatch):
    """A preset whose FFNs are made small."""
    chosen = config.PRESETS[request.param]
    decoder = replace(chosen.model.decoder, d_model=16, d_ff=24)
    small = replace(chosen, model=replace(chosen.model, decoder=decoder))
    monkeypatch.setitem(config.PRESETS, request.param, small)
    return request.param


def test_kernels_on_a_cpu_time_the_layer_unless_it_is_wrong(name, monkeypatch, capsys):
    gates = bench.gates_of(40, "skewed", CPU) != 0
    assert gates.sum(dim=1).eq(2).all() and gates.sum(dim=0)[0] == 40  # half of all, two a token
    flags = ["kernels", "--preset", name, "--tokens", "16", "--rounds", "1"]
    layer = bench.main(flags)["sizes"][0]["layer"]
    assert set(layer["seconds"]) == {"matmuls", "cast", "loop", "sorted", "cast once"}
    assert layer["flops"] == 3 * 2 * 2 * 16 * (2 if name == "phi2" else 3) * 16 * 24
    monkeypatch.setattr(ops, "permute", lambda x, plan, most: x[plan.token].roll(1, 0))
    assert "the layer is wrong" in error_line(capsys, bench.main, *flags)


@pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason="no simulated GPU here")
def test_every_kernel_is_compared_and_timed_where_the_extension_is_on(name, monkeypatch):
    cuda_on_cpu.Machine(cuda_on_cpu.compiled()).set(order=0, blocks=3, only=-1)
    monkeypatch.setattr(ops, "_enabled", {"cpu"})
    flags = bench.BenchConfig(what="kernels", preset=name, rounds=1, tokens=16)
    kernels = bench.bench_kernels(flags, CPU, torch.bfloat16)["sizes"][0]["kernels"]
    assert len(kernels) == (8 if name == "phi2" else 7)
    assert kernels["forward"]["work"] == 2 * 32 * 16 * 24
    monkeypatch.setattr(ops, "weight_grad", lambda dy, x, offs: torch.zeros(4, 24, 16))
    with pytest.raises(UserError, match="weight grad is wrong"):
        bench.bench_kernels(flags, CPU, torch.bfloat16)


def test_a_gpu_check_prints_each_case_and_a_table_and_stops_in_time(monkeypatch, capsys):
    def layer(*_):
        clock[:] = 1e6 * (len(clock) > 1), *clock  # so the second case takes too long
        return {"seconds": {"matmuls": 1, "cast once": len(clock)}}

    clock = [0]
    checks = {"tests": "passed: 9 passed", "memcheck": "passed: 3 passed", "racecheck": "not run"}
    times = {"ours": 2e-6, "torch": 3e-6, "loop": 1e-6, "mma.sync": 4e-6}
    row = {"work": 4e6, "seconds": times}
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench, "check_on_gpu", lambda: checks)
    monkeypatch.setattr(bench, "experts_of", lambda *_: Experts(MLP(8, 8), 4))
    monkeypatch.setattr(bench, "bench_layer", layer)
    monkeypatch.setattr(ops, "supports", lambda *_: True)
    monkeypatch.setattr(bench, "bench_each", lambda *_: dict.fromkeys(("forward", "gelu"), row))
    flags = bench.BenchConfig(what="kernels", gpu_check=True, tokens=4096)
    result = bench.bench_kernels(flags, CPU, torch.bfloat16)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines if line.startswith("{")] == result["sizes"]
    assert [case["routing"] for case in result["sizes"]] == ["balanced", "skewed"]
    assert lines.count(f"  not run: {bench.LIMIT} s are over") == 1
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("|")]
    assert {len(row) for row in cells[2:]} == {3} and lines[-11].endswith("| passed: 9 passed |")
    measured = "; ".join(row[2].strip() for row in cells[3:]).replace("\u00d7", "x")
    assert measured == (
        "memcheck passed: 3 passed; racecheck not run; 0.50 to 0.50 x; 1.50 to 1.50 x; "
        "2 to 2 TFLOP/s; 0.25 to 0.25 x; not run; not run; 1.50 to 1.50 x; not run; 2.00 to 3.00 x"
    )
    result["ladder"] = {"naive": 32.1, "cuBLAS": 716}
    assert "than the one before | naive 32, cuBLAS 716 TFLOP/s |" in bench.aims(result)


@pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason="no simulated GPU here")
def test_every_rung_of_the_ladder_is_compared_and_timed(monkeypatch):
    machine = cuda_on_cpu.Machine(cuda_on_cpu.compiled())
    machine.set(order=0, blocks=3, only=-1)
    calls = []

    def timer(ways):
        for name, run in ways.items():
            run()
            calls.append(name)
        return dict.fromkeys(ways, 2 * 64**3 / 1e12)

    rates = bench.bench_ladder(machine.library, 64, CPU, timer)
    names = ["naive", "tiles", "tensor_cores", "pipelined", "gmm", "cuBLAS"]
    assert rates == dict.fromkeys(names, 1.0) and calls == names
    major = ctypes.c_int.in_dll(machine.library, "medmoe_major")
    assert (bench.on_major(machine.library, 8, lambda: major.value)(), major.value) == (8, 0)
    forward = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *args: [-forward(*args)[0]])
    with pytest.raises(UserError, match="pipelined is wrong"):
        bench.bench_ladder(machine.library, 64, CPU, timer)
