"""What the benchmark compares computes the same; some of it needs transformers."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import ops
from config import EXPERTS_AND_META, IGNORE, IMAGE_ID, UserError
from lab import bench
from model import freeze_all_but
from tests import cuda_on_cpu
from tests.conftest import build, collate

oracle = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
THEIR_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def pair(family, **moe):
    """Our sparse model and the assembled one."""
    ours = build(family, {"router": "random", **moe})
    freeze_all_but(ours, EXPERTS_AND_META)
    return ours, bench.Assembled(ours).eval()


def mean(model, batch):
    loss = model.loss(batch)
    return loss.total / loss.n_tokens


def a_batch(side):
    image = [IMAGE_ID] * 4
    first = [1, 2, *image, 7, 8, 9, 10, 11], [IGNORE] * 8 + [9, 10, 11]
    rows = [first, ([5, *image, 8, 9], [IGNORE] * 5 + [8, 9]), ([5, 6, 7], [IGNORE, 6, 7])]
    return collate(rows, side=side)


@oracle
@FAMILIES
@pytest.mark.parametrize("top_k", [1, 2])
def test_loss_and_gradients_are_those_of_the_assembled_model(family, top_k):
    models, batch = pair(family, top_k=top_k), a_batch("right")
    losses = [mean(model, batch) for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = models
    for layer in (0, 2):
        mlp, their_mlp = ours.decoder.blocks[layer].mlp, theirs.decoder.model.layers[layer].mlp
        params = dict(mlp.experts.named_parameters())
        assert len(params) >= 3 and all(p.grad.abs().sum() > 0 for p in params.values())
        for name, param in params.items():
            part, kind = name.split(".")
            name = f"{THEIR_NAMES.get(part, part)}.{kind}"
            theirs_ = [expert.get_parameter(name) for expert in their_mlp.experts]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in theirs_]
            torch.testing.assert_close(param.grad, torch.stack(grads), rtol=1e-4, atol=1e-5)
        for param, other in zip(mlp.meta.parameters(), their_mlp.meta.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-4, atol=1e-5)


@oracle
@FAMILIES
def test_greedy_tokens_are_those_of_the_assembled_model(family):
    (ours, theirs), batch = pair(family), a_batch("left")
    tokens = bench.answer(ours, batch, torch.float32, 32)
    assert tokens.shape == (3, 32) and len(tokens.unique()) > 3
    assert torch.equal(tokens, theirs.answer(batch, torch.float32, 32))


@oracle
def test_two_steps_in_bf16_move_both_models_alike():
    models, batch, gains = pair("stablelm"), a_batch("right"), []
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
    assert counts[0] == counts[1] > 0
    for model in models:
        step, before = bench.stepper(model, torch.bfloat16), mean(model, batch).item()
        step(batch)
        step(batch)
        gains.append(before - mean(model, batch).item())
    assert gains[0] > 0 and gains[0] == pytest.approx(gains[1], rel=0.1)


@oracle
def test_train_and_generate_report_what_they_measured(capsys):
    small = ["--rounds", "2", "--data", "phantoms:8"]
    result = bench.main(["train", *small, "--steps", "1", "--batch-size", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    speeds, ratio = result["tokens_per_s"], result["ratio"]
    assert speeds["ours"]["min"] / speeds["transformers"]["max"] <= ratio["max"]
    result = bench.main(["generate", *small, "--new-tokens", "2"])
    assert result["batch_8"]["ratio"]["median"] > 0


def test_without_transformers_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["generate"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install transformers" in line


def test_ways_alternate_the_first_round_does_not_count_and_ratios_are_within_a_round():
    calls = []
    ways = {n: lambda n=n: calls.append(n) for n in ("a", "b")}
    seconds = bench.interleave(ways, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert bench.ratios([10, 40, 90], [5, 10, 30]) == {"median": 3, "min": 2, "max": 4}


def test_images_are_read_beside_training_and_memory_has_its_own_file(capsys):
    flags = ["--data", "phantoms:4", "--rounds", "1", "--steps", "1", "--batch-size", "4"]
    result = bench.main(["loader", *flags])
    assert set(result["images_per_s"]) == {"1 thread", "2 threads", "training"}
    assert bench.main(["memory", "--gpus", "8"])["gpus"] == 8


CPU = torch.device("cpu")
SMALL = {"phi2": SimpleNamespace(family="phi", d_model=16, d_ff=24),
         "stablelm2": SimpleNamespace(family="stablelm", d_model=16, d_ff=24)}  # fmt: skip
BOTH = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def small_ffn(monkeypatch):
    for name, decoder in SMALL.items():
        small = SimpleNamespace(model=SimpleNamespace(decoder=decoder))
        monkeypatch.setitem(config.PRESETS, name, small)


@BOTH
@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_the_implementations_of_the_layer_compute_the_same(name, routing):
    experts = bench.experts_of(name, CPU, torch.float32)
    gates, x = bench.gates_of(40, routing, CPU), torch.randn(40, 16)
    assert (gates != 0).sum(dim=1).eq(2).all()
    assert ((gates != 0).sum(dim=0)[0] == 40) == (routing == "skewed")
    ours, looped = experts(x, gates), bench.Experts.forward(experts, x, gates)
    assert type(experts) is ops.SortedExperts
    torch.testing.assert_close(ours, looped, rtol=1e-4, atol=1e-4)
    kept = bench.einsum(experts, x, gates)
    near = (kept - ours).abs().amax(dim=1) < 1e-4
    assert near.all() == ((gates != 0).sum(dim=0).max() <= 25)  # 1.25 times the mean of 20
    assert near[:25].all()  # the first tokens are never dropped
    with FlopCounterMode(display=False) as alone:
        bench.matmuls(experts, x, gates)()
    assert alone.get_total_flops() == 3 * 2 * 80 * 16 * 24 * (2 if name == "phi2" else 3)


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
    flags = bench.BenchConfig(what="kernels", preset=name, rounds=1, tokens=16)
    (found,) = bench.bench_kernels(flags, CPU, torch.bfloat16)["sizes"]
    rows, matmuls = ["route", "permute", "unpermute", "unpermute_grad"], ["forward", "input grad"]
    gelu = ["gelu"] if name == "phi2" else []
    assert list(found["kernels"]) == [*rows, *matmuls, "weight grad", *gelu]
    assert f" {found['kernels']['permute']['ours'] * 1e6:.1f} us" in capsys.readouterr().out
    assert set(found["kernels"]["weight grad"]) == {"ours", "torch", "loop"}
    monkeypatch.setattr(ops, "weight_grad", lambda dy, x, offs: torch.zeros(4, 24, 16))
    with pytest.raises(UserError, match="weight grad is wrong"):
        bench.bench_kernels(flags, CPU, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_check_is_a_user_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["kernels", "--gpu-check"])
    assert "--device cuda" in capsys.readouterr().err
