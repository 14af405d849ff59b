"""How fast the sparse layer is, and on a GPU each of its kernels, compared with their limits.

    python -m lab.bench kernels                          on a CPU: the layer by a loop and sorted
    python -m lab.bench kernels --device cuda            on a GPU: every op and size as well
    python -m lab.bench kernels --gpu-check              first the tests of cuda/ on the GPU itself

A layer is the E experts with their dispatch, without router and meta expert. "train" is forward
and backward, with the gradients of tokens, gates and weights; "answer" is forward alone.

matmuls   the matrix products alone, one for each expert, into allocated memory: the limit
loop      moe.Experts                    sorted    ops.SortedExperts
einsum    a capacity of 1.25 times the mean for each expert, dispatch and combination as one-hot
          products (Lepikhin et al. 2020, DeepSpeed); it drops tokens beyond the capacity
dense     one FFN as wide as a token's k experts together: equal FLOPs

Everything is first compared with its definition. A time is the median over interleaved rounds.
Matmul kernels are compared with a dense matmul of equal FLOPs, a matmul for each expert and
torch.nn.functional.grouped_mm; those that move rows with the bandwidth of a large copy. The last
line is JSON. Letters are those of config.py; R = k N rows.
"""

import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import ops
from config import UserError, flag, preset
from engine.cli import at_least, parse, user_errors
from lab.bench import interleave, machine
from model import choose_device
from moe import MLP, Experts, GatedMLP

SIZES = (1024, 4096, 16384, 65536)
SMALL = "gpu and not many and not than_16 and not 2_to_the_31 and not 4096 and not 2560"
N_EXPERTS, K = 4, 2
Timer = Callable[[dict[str, Callable]], dict[str, float]]  # functions -> median seconds of each


@dataclass(frozen=True)
class KernelsConfig:
    """Measure the sparse layer and its kernels."""

    preset: Literal["phi2", "stablelm2", "smollm2", "tiny"] = flag("phi2", "whose FFN")
    tokens: int | None = flag(None, f"number of tokens (default: 2048, on a GPU {SIZES})")
    routing: Literal["balanced", "skewed"] = flag("balanced", "skewed: one expert gets half")
    rounds: int = flag(3, "repetitions, interleaved; on a GPU ten times as many")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("bfloat16", "matmul precision")
    kernels: Literal["auto", "torch", "cuda"] = flag("auto", "cuda/ on a Hopper GPU, or torch's")
    gpu_check: bool = flag(False, "tests, sanitizers, both presets and routings, on a GPU")


def medians(ways: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    rounds *= 10 if device.type == "cuda" else 1
    return {k: statistics.median(row) for k, row in interleave(ways, rounds, device).items()}


def check(name: str, ours: Tensor, expected: Tensor, most: float) -> float:
    """-> the relative error of a whole tensor. Raises UserError where it is not below `most`."""
    error = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < most:
        raise UserError(f"{name} is wrong: relative error {error:.1e}")
    return error


# The layer


def gates_of(n: int, routing: str, device: torch.device) -> Tensor:
    """Two experts for each of n tokens -> gates (N, E), fp32."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(n, N_EXPERTS, generator=generator)
    if routing == "skewed":
        scores[:, 0] += 1  # the first choice of all tokens: half of all that are routed
    top = scores.topk(K).indices
    gates = torch.zeros(n, N_EXPERTS).scatter(1, top, torch.rand(n, K, generator=generator) + 0.1)
    return gates.to(device)


def experts_of(name: str, device: torch.device, dtype: torch.dtype) -> Experts:
    """Experts of a preset's size, randomly initialised."""
    decoder = preset(name).model.decoder
    mlp = MLP if decoder.family == "phi" else GatedMLP
    with torch.device("meta"):
        experts = Experts(mlp(decoder.d_model, decoder.d_ff), N_EXPERTS)
    experts = experts.to_empty(device=device).to(dtype)
    for param in experts.parameters():
        torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
    ops.use_sorted_experts(experts)
    return experts


def ffn(experts: Experts, e: int, x: Tensor) -> Tensor:
    """One expert's FFN, x (n, D) -> (n, D)."""
    weights = {name: param[e] for name, param in experts.named_parameters()}
    return functional_call(experts.ffn[0], weights, x)


def einsum(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    n = len(x)
    capacity = math.ceil(1.25 * K * n / N_EXPERTS)
    routed = gates != 0
    place = routed.cumsum(dim=0) - 1  # (N, E)
    kept = routed & (place < capacity)
    one_hot = F.one_hot(place.clamp(0, capacity - 1), capacity).to(x.dtype)
    dispatch = one_hot * kept[..., None]  # (N, E, capacity)
    combine = dispatch * gates[..., None].to(x.dtype)
    sorted_ = torch.einsum("nec,nd->ecd", dispatch, x)  # (E, capacity, D)
    out = torch.stack([ffn(experts, e, rows) for e, rows in enumerate(sorted_)])
    return torch.einsum("nec,ecd->nd", combine, out)


def dense(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    """The first K experts as one FFN for every token."""
    return sum(ffn(experts, e, x) for e in range(K))


LAYERS = {"loop": Experts.forward, "sorted": ops.SortedExperts.forward,
          "einsum": einsum, "dense": dense}  # fmt: skip


def multiply(pairs: list[tuple[Tensor, Tensor]], outs: list[Tensor]) -> None:
    for (a, b), out in zip(pairs, outs, strict=True):
        torch.mm(a, b, out=out)


def products(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """-> a function that multiplies each pair into memory allocated now."""
    return partial(multiply, pairs, [a.new_empty(len(a), b.shape[1]) for a, b in pairs])


def matmuls(experts: Experts, x: Tensor, gates: Tensor) -> Callable[[], None]:
    """-> a function that multiplies what the layer multiplies, forward and backward."""
    pairs = []
    for part in experts.children():
        n_out, n_in = part.weight.shape[1:]
        for weight, n in zip(part.weight.detach(), (gates != 0).sum(dim=0).tolist(), strict=True):
            rows, grad = torch.randn(n, n_in).to(x), torch.randn(n, n_out).to(x)
            pairs += [(rows, weight.T), (grad, weight), (grad.T, rows)]
    return products(pairs)


def both_ways(layer: Callable, experts: Experts, x: Tensor, gates: Tensor, dy: Tensor) -> list:
    """Forward and backward of a layer -> its output and all gradients."""
    inputs = [x.detach().requires_grad_(), gates.detach().requires_grad_()]
    y = layer(experts, *inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], dy, allow_unused=True)]


def check_layer(experts: Experts, routing: str) -> float:
    """Loop and sorted compared with the loop in fp32 on 64 tokens -> the largest error."""
    weight = next(experts.parameters())
    x, dy = torch.randn(2, 64, weight.shape[-1]).to(weight)
    gates, wide = gates_of(64, routing, weight.device), copy.deepcopy(experts).float()
    exact = both_ways(LAYERS["loop"], wide, x.float(), gates, dy.float())
    found = [both_ways(LAYERS[name], experts, x, gates, dy) for name in ("loop", "sorted")]
    return max(check("the layer", *pair, 0.03) for ours in found
               for pair in zip(ours, exact, strict=True))  # fmt: skip


def bench_layer(experts: Experts, routing: str, n: int, timer: Timer) -> dict:
    """Times of each implementation, and their ratios to the matmuls alone and to the loop."""
    error, weight = check_layer(experts, routing), next(experts.parameters())
    gates, (x, dy) = gates_of(n, routing, weight.device), torch.randn(2, n, weight.shape[-1])
    x, dy, layers = x.to(weight), dy.to(weight), dict(LAYERS)
    if 1.25 * K * n * n * x.element_size() > 8e9:  # its one-hot matrices
        del layers["einsum"]
    if not x.is_cuda:
        del layers["dense"]
    train = timer({"matmuls": matmuls(experts, x, gates)} | {
        name: partial(both_ways, layer, experts, x, gates, dy) for name, layer in layers.items()
    })  # fmt: skip
    with torch.no_grad():
        answer = timer({k: partial(layers[k], experts, x, gates) for k in ("loop", "sorted")})
    flops = 2 * K * n * sum(part.weight[0].numel() for part in experts.children())
    print(f"layer, {n} tokens, {routing}: {3 * flops / 1e12:.2f} TFLOP, relative error {error:.1e}")
    for what, times, work in (("train", train, 3 * flops), ("answer", answer, flops)):
        for name, seconds in times.items():
            limit = f"{seconds / times['matmuls']:6.2f} x the matmuls" if what == "train" else ""
            print(f"  {what:<8}{name:<8}{seconds * 1e3:10.1f} ms {work / seconds / 1e12:9.3f} "
                  f"TFLOP/s {limit:<20}{seconds / times['loop']:6.2f} x the loop")  # fmt: skip
    return {"tokens": n, "flops": 3 * flops, "seconds": train, "answer_seconds": answer,
            "error": error}  # fmt: skip


# The kernels, on a GPU


def bench_rows(x: Tensor, gates: Tensor, timer: Timer, peak: float) -> dict:
    """Routing, permute, unpermute and its gradient; peak: bytes a second of a copy."""
    call, n, plan = ops.CALL, len(x), ops._listed(gates.t() != 0)
    slot, offs = call.route(gates)
    n_routed = int(offs[-1])
    y = call.permute(x, slot, n_routed)
    check("permute", y, ops.permute(x, plan), 1e-6)
    check("unpermute", call.unpermute(y, slot, gates), ops.unpermute(y, gates, plan), 0.01)
    ways = {  # rows read and written
        "route": (0, lambda: call.route(gates)),
        "permute": (n + n_routed, lambda: call.permute(x, slot, n_routed)),
        "unpermute": (n + n_routed, lambda: call.unpermute(y, slot, gates)),
        "unpermute_grad": (n + 2 * n_routed, lambda: call.unpermute_grad(x, y, slot, gates)),
        "torch: permute": (n + n_routed, lambda: ops.permute(x, plan)),
        "torch: unpermute": (n + n_routed, lambda: ops.unpermute(y, gates, plan)),
    }
    times = timer({name: run for name, (_, run) in ways.items()})
    for name, seconds in times.items():
        rate = ways[name][0] * x.shape[1] * x.element_size() / seconds
        print(f"  {name:<18}{seconds * 1e6:9.1f} us {rate / 1e9:8.0f} GB/s "
              f"{rate / peak:6.2f} of a copy")  # fmt: skip
    return times


def bench_products(x: Tensor, part: torch.nn.Module, offs: Tensor, timer: Timer) -> dict:
    """x (R, D), weight (E, F, D): the three products, and the first with bias and GELU."""
    weight, sizes = part.weight.detach(), torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
    dy = torch.randn(len(x), weight.shape[1], device=x.device).to(x)
    xs, dys, ws = x.split(sizes), dy.split(sizes), weight.unbind()
    cases = (  # ours, torch's, each expert's factors
        ("forward", lambda: ops.forward(x, weight, None, offs)[0],
         lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=offs), (xs, [w.T for w in ws])),
        ("input grad", lambda: ops.input_grad(dy, weight, offs)[0],
         lambda: F.grouped_mm(dy, weight, offs=offs), (dys, ws)),
        ("weight grad", lambda: ops.weight_grad(dy, x, offs),
         lambda: F.grouped_mm(dy.T, x, offs=offs), ([g.T for g in dys], xs)),
    )  # fmt: skip
    found, largest = {}, sizes.index(max(sizes))
    for name, ours, torchs, factors in cases:
        pairs = list(zip(*factors, strict=True))
        work = [2 * a.numel() * b.shape[1] for a, b in pairs]
        error = check(name, ours().flatten(0, -2), torch.cat([a @ b for a, b in pairs]), 6e-3)
        found[name] = times = timer({"ours": ours, "grouped_mm": torchs, "loop": products(pairs),
                                     "dense": partial(torch.mm, *pairs[largest])})  # fmt: skip
        times["dense"] *= sum(work) / work[largest]  # as if all FLOPs were the largest expert's
        rates = ", ".join(f"{k} {sum(work) / t / 1e12:.0f}" for k, t in times.items())
        print(
            f"  {name:<18}TFLOP/s: {rates}; {times['loop'] / times['ours']:.2f} x the loop, "
            f"{times['grouped_mm'] / times['ours']:.2f} x grouped_mm, error {error:.0e}"
        )
    if hasattr(part, "bias"):
        bias = part.bias.detach()
        found["gelu"] = fused = timer({
            "fused": lambda: ops.forward(x, weight, bias, offs, ops.GELU),
            "apart": lambda: F.gelu(ops.forward(x, weight, bias, offs)[0], approximate="tanh"),
        })  # fmt: skip
        print(f"  with bias and GELU: {fused['fused'] * 1e3:.3f} ms, "
              f"{fused['apart'] / fused['fused']:.2f} x as fast as apart")  # fmt: skip
    return found


def bench_size(flags: KernelsConfig, n: int, timer: Timer, peak: float | None) -> dict:
    """One number of tokens: each kernel, where cuda/ is in use, then the layer.

    peak: bytes a second of a copy, None on a CPU.
    """
    device, dtype = choose_device(flags.device, flags.dtype)
    torch.manual_seed(0)
    experts = experts_of(flags.preset, device, dtype)
    print(f"{flags.preset}, {flags.routing}, {n} tokens")
    found: dict = {"preset": flags.preset, "routing": flags.routing, "tokens": n}
    part, gates = next(experts.children()), gates_of(n, flags.routing, device)
    if ops.supports(part.weight):
        x = torch.randn(n, part.weight.shape[-1], device=device).to(dtype)
        found["row_ops"] = bench_rows(x, gates, timer, peak)
        slot, offs = ops.CALL.route(gates)
        rows = ops.CALL.permute(x, slot, int(offs[-1]))
        found["products"] = bench_products(rows, part, offs, timer)
    return found | {"layer": bench_layer(experts, flags.routing, n, timer)}


def check_on_gpu() -> dict[str, str]:
    """Run the tests of cuda/ on the GPU, and a part of them under compute-sanitizer."""
    found, tests = {}, [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k"]
    for name in ("tests", "memcheck", "racecheck"):
        command = [*tests, "gpu"]
        if name != "tests":
            command = ["compute-sanitizer", "--error-exitcode", "1", "--tool", name, *tests, SMALL]
        if not shutil.which(command[0]):
            found[name] = f"not run: no {command[0]} here"
            continue
        done = subprocess.run(["timeout", "120", *command], cwd=Path(__file__).parent.parent,
                              capture_output=True, text=True)  # fmt: skip
        ends = {0: "passed", 124: "not finished in 120 s"}.get(done.returncode, "FAILED")
        found[name] = f"{ends}: {' '.join(done.stdout.splitlines()[-1:])}"
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-1000:])
        print(f"{name}: {found[name]}", flush=True)
    return found


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(KernelsConfig, argv, "lab.bench kernels")
    at_least(flags, rounds=1, tokens=1)
    device, dtype = choose_device("cuda" if flags.gpu_check else flags.device, flags.dtype)
    ops.choose("cuda" if flags.gpu_check else flags.kernels, device)
    result, is_gpu = {"flags": asdict(flags)} | machine(device, dtype), device.type == "cuda"
    timer, peak = partial(medians, rounds=flags.rounds, device=device), None
    cases, sizes = [flags], SIZES if is_gpu else (2048,)
    if flags.gpu_check:
        result["checks"] = check_on_gpu()
        cases = [replace(flags, preset=name, routing=routing) for name, routing in
                 (("phi2", "balanced"), ("phi2", "skewed"), ("stablelm2", "balanced"))]  # fmt: skip
    if is_gpu:
        a, b = torch.empty(2, 1 << 31, dtype=torch.uint8, device=device)
        peak = 2 * a.numel() / timer({"copy": lambda: b.copy_(a)})["copy"]
        print(f"copy: {peak / 1e9:.0f} GB/s, read and written")
        result["gpu"] = torch.cuda.get_device_name()
    sizes = (flags.tokens,) if flags.tokens else sizes
    result["copy_bytes_per_s"] = peak
    result["sizes"] = [bench_size(case, n, timer, peak) for case in cases for n in sizes]
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
