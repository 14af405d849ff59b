"""How fast the sparse layer is, and on a GPU each of its kernels, compared with their limits.

    python -m lab.bench kernels                          on a CPU: the layer by a loop and sorted
    python -m lab.bench kernels --device cuda            on a GPU: every op and size as well
    python -m lab.bench kernels --gpu-check              first the tests of cuda/ on the GPU itself

A layer is the E experts with their dispatch, without router and meta expert. "train" is forward
and backward, with the gradients of tokens, gates and weights; "answer" is forward alone.

matmuls   the matrix products alone, one for each expert, into allocated memory: the limit
loop      ours, moe.Experts: for each expert, its tokens through its FFN
sorted    ours, ops.SortedExperts: permute, grouped matmul, unpermute
einsum    a capacity of 1.25 times the mean for each expert, dispatch and combination as one-hot
          products (Lepikhin et al. 2020, DeepSpeed); it drops tokens beyond the capacity
dense     one FFN as wide as a token's k experts together: equal FLOPs

Everything that is timed is first compared with its definition. Competitors run alternately, once a
round; a time is the median over the rounds, of which the first does not count. On a GPU, L2 is
emptied before each call and times are the GPU's own. Matmul kernels are compared with a dense
matmul of equal FLOPs, a matmul for each expert and torch.nn.functional.grouped_mm; those that move
rows with the bandwidth of a large copy. The last line is JSON.

Shapes: N tokens, k = 2 experts each, E = 4 experts, R = k N, D d_model, F d_ff.
"""

import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import ops
from config import UserError, flag, preset
from engine.cli import at_least, parse, user_errors
from model import choose_device
from moe import MLP, Experts, GatedMLP
from ops import SortedExperts, use_sorted_experts

ROOT = Path(__file__).parent.parent
SIZES = (1024, 4096, 16384, 65536)
SMALL = "gpu and not many and not than_16 and not 2_to_the_31 and not 4096 and not 2560"
N_EXPERTS, K = 4, 2


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


class Timer:
    """Median seconds of functions that run alternately; the first round only warms up."""

    def __init__(self, device: torch.device, rounds: int):
        self.device = device
        self.rounds = rounds * 10 if device.type == "cuda" else rounds
        if device.type == "cuda":
            self.other = torch.empty(1 << 29, dtype=torch.uint8, device=device)

    def once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()  # nothing of the operands stays in L2; and the host gets ahead
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def __call__(self, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
        rounds = [{name: self.once(run) for name, run in ways.items()}
                  for _ in range(self.rounds + 1)]  # fmt: skip
        return {name: statistics.median(row[name] for row in rounds[1:]) for name in ways}


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
    use_sorted_experts(experts)
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
    dispatch = one_hot * kept[..., None]  # (N, E, C)
    combine = dispatch * gates[..., None].to(x.dtype)
    sorted_ = torch.einsum("nec,nd->ecd", dispatch, x)  # (E, C, D)
    out = torch.stack([ffn(experts, e, rows) for e, rows in enumerate(sorted_)])
    return torch.einsum("nec,ecd->nd", combine, out)


def dense(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    """The first K experts as one FFN for every token."""
    return sum(ffn(experts, e, x) for e in range(K))


def matmuls(experts: Experts, x: Tensor, gates: Tensor) -> Callable[[], None]:
    """-> a function that multiplies what the layer multiplies, forward and backward."""
    sizes = (gates != 0).sum(dim=0).tolist()
    pairs = []  # every product: two factors, and where it goes
    for part in experts.children():
        n_out, n_in = part.weight.shape[1:]
        for weight, n in zip(part.weight.detach(), sizes, strict=True):
            rows, grad = torch.randn(n, n_in).to(x), torch.randn(n, n_out).to(x)
            for a, b in ((rows, weight.T), (grad, weight), (grad.T, rows)):
                pairs.append((a, b, a.new_empty(a.shape[0], b.shape[1])))

    def run() -> None:
        for a, b, out in pairs:
            torch.mm(a, b, out=out)

    return run


def both_ways(layer: Callable, experts: Experts, x: Tensor, gates: Tensor, dy: Tensor) -> list:
    """Forward and backward of a layer -> its output and all gradients."""
    inputs = [x.detach().requires_grad_(), gates.detach().requires_grad_()]
    y = layer(experts, *inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], dy, allow_unused=True)]


def bench_layer(experts: Experts, routing: str, n: int, timer: Timer) -> dict:
    """Times of each implementation, and their ratios to the matmuls alone and to the loop.

    Loop and sorted are first compared with the loop in fp32 on 64 tokens.
    """
    weight, layers = next(experts.parameters()), {"loop": Experts.forward, "sorted":
                                                  SortedExperts.forward, "einsum": einsum}  # fmt: skip
    few, gates = gates_of(64, routing, weight.device), gates_of(n, routing, weight.device)
    x, dy = (torch.randn(n, weight.shape[-1]).to(weight) for _ in range(2))
    x64, dy64 = (torch.randn(64, weight.shape[-1]).to(weight) for _ in range(2))
    wide = copy.deepcopy(experts).float()
    exact = both_ways(Experts.forward, wide, x64.float(), few, dy64.float())
    error = max(
        check("the layer", a, b, 0.03)
        for name in ("loop", "sorted")
        for a, b in zip(both_ways(layers[name], experts, x64, few, dy64), exact, strict=True)
    )
    if 1.25 * K * n * n * x.element_size() > 8e9:  # its one-hot matrices
        del layers["einsum"]
    if x.is_cuda:
        layers["dense"] = dense
    ways = {name: lambda layer=layer: both_ways(layer, experts, x, gates, dy)
            for name, layer in layers.items()}  # fmt: skip
    train = timer({"matmuls": matmuls(experts, x, gates)} | ways)
    with torch.no_grad():
        answer = timer({name: lambda layer=layers[name]: layer(experts, x, gates)
                        for name in ("loop", "sorted")})  # fmt: skip
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
    call, (n, d) = ops.CALL, x.shape
    slot, offs = call.route(gates)
    n_routed = int(offs[-1])
    plan = ops.DispatchPlan(*ops._as_list(ops.DispatchPlan(None, None, offs, slot))[:3])
    y = call.permute(x, slot, n_routed)
    assert torch.equal(y, ops.permute(x, plan))
    check("unpermute", call.unpermute(y, slot, gates), ops.unpermute(y, gates, plan), 0.01)
    moved = {"permute": n + n_routed, "unpermute": n + n_routed, "unpermute_grad": n + 2 * n_routed}
    times = timer({
        "route": lambda: call.route(gates),
        "permute": lambda: call.permute(x, slot, n_routed),
        "unpermute": lambda: call.unpermute(y, slot, gates),
        "unpermute_grad": lambda: call.unpermute_grad(x, y, slot, gates),
        "torch: permute": lambda: ops.permute(x, plan),
        "torch: unpermute": lambda: ops.unpermute(y, gates, plan),
    })  # fmt: skip
    for name, seconds in times.items():
        rate = moved.get(name.removeprefix("torch: "), 0) * d * x.element_size() / seconds
        print(f"  {name:<18}{seconds * 1e6:9.1f} us {rate / 1e9:8.0f} GB/s "
              f"{rate / peak:6.2f} of a copy")  # fmt: skip
    return times


def bench_product(name: str, sizes: list[int], ours: Callable[[], Tensor], torchs: Callable,
                  each: list[tuple[Tensor, Tensor]], timer: Timer) -> dict:  # fmt: skip
    """One grouped product and its competitors. each: the factors for every expert."""
    outs = [a.new_empty(a.shape[0], b.shape[1]) for a, b in each]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    work = [2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in each]

    def loop() -> None:
        for (a, b), out in zip(each, outs, strict=True):
            torch.mm(a, b, out=out)

    loop()
    result = ours()
    parts = result if result.dim() == 3 else result.split(sizes)
    error = max(check(name, x, y, 6e-3) for x, y, n in zip(parts, outs, sizes, strict=True) if n)
    times = timer({"ours": ours, "grouped_mm": torchs, "loop": loop,
                   "dense": lambda: torch.mm(*each[largest])})  # fmt: skip
    times["dense"] *= sum(work) / work[largest]  # as if all FLOPs were the largest expert's
    rates = ", ".join(f"{k} {sum(work) / t / 1e12:.0f}" for k, t in times.items())
    print(f"  {name:<18}TFLOP/s: {rates}; {times['loop'] / times['ours']:.2f} x the loop, "
          f"{times['grouped_mm'] / times['ours']:.2f} x grouped_mm, error {error:.0e}")  # fmt: skip
    return times


def bench_products(x: Tensor, weight: Tensor, bias: Tensor | None, offs: Tensor,
                   timer: Timer) -> dict:  # fmt: skip
    """x (R, D), weight (E, F, D): the three products, and the first with bias and GELU."""
    sizes = torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
    dy = torch.randn(len(x), weight.shape[1], device=x.device).to(x)
    xs, dys, ws = x.split(sizes), dy.split(sizes), weight.unbind()
    wt = weight.transpose(1, 2)
    cases = {  # ours, torch's, each expert's factors
        "forward": (lambda: ops.forward(x, weight, None, offs)[0],
                    lambda: F.grouped_mm(x, wt, offs=offs),
                    [(a, w.T) for a, w in zip(xs, ws, strict=True)]),
        "input grad": (lambda: ops.input_grad(dy, weight, offs)[0],
                       lambda: F.grouped_mm(dy, weight, offs=offs),
                       list(zip(dys, ws, strict=True))),
        "weight grad": (lambda: ops.weight_grad(dy, x, offs),
                        lambda: F.grouped_mm(dy.T, x, offs=offs),
                        [(g.T, a) for g, a in zip(dys, xs, strict=True)]),
    }  # fmt: skip
    found = {name: bench_product(name, sizes, *case, timer) for name, case in cases.items()}
    if bias is not None:
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
    part = next(experts.children())
    weight, gates = part.weight.detach(), gates_of(n, flags.routing, device)
    if ops.supports(weight):
        x = torch.randn(n, weight.shape[-1], device=device).to(dtype)
        found["row_ops"] = bench_rows(x, gates, timer, peak)
        slot, offs = ops.CALL.route(gates)
        rows = ops.CALL.permute(x, slot, int(offs[-1]))
        bias = getattr(part, "bias", None)
        bias = None if bias is None else bias.detach()
        found["products"] = bench_products(rows, weight, bias, offs, timer)
    return found | {"layer": bench_layer(experts, flags.routing, n, timer)}


def check_on_gpu() -> dict[str, str]:
    """Run the tests of cuda/ on the GPU, and a part of them under compute-sanitizer."""
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    found, sanitizer = {}, ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    for name, command in {
        "tests": [*tests, "-k", "gpu"],
        "memcheck": [*sanitizer, "memcheck", *tests, "-k", SMALL],
        "racecheck": [*sanitizer, "racecheck", *tests, "-k", SMALL],
    }.items():
        if not shutil.which(command[0]):
            found[name] = f"not run: no {command[0]} here"
            continue
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
            ends = "passed" if done.returncode == 0 else "FAILED"
            found[name] = f"{ends}: {' '.join(done.stdout.splitlines()[-1:])}"
            if done.returncode:
                print(done.stdout[-3000:], done.stderr[-1000:])
        except subprocess.TimeoutExpired:
            found[name] = "not finished in 120 s"
        print(f"{name}: {found[name]}", flush=True)
    return found


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(KernelsConfig, argv, "lab.bench kernels")
    at_least(flags, rounds=1, tokens=1)
    device, dtype = choose_device("cuda" if flags.gpu_check else flags.device, flags.dtype)
    ops.choose("cuda" if flags.gpu_check else flags.kernels, device)
    is_gpu = device.type == "cuda"
    result: dict = {"flags": asdict(flags), "device": device.type, "torch": torch.__version__,
                    "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name() if is_gpu else None}  # fmt: skip
    if flags.gpu_check:
        result["checks"] = check_on_gpu()
    timer, peak = Timer(device, flags.rounds), None
    if is_gpu:
        a, b = torch.empty(2, 1 << 31, dtype=torch.uint8, device=device)
        peak = 2 * a.numel() / timer({"copy": lambda: b.copy_(a)})["copy"]
        print(f"copy: {peak / 1e9:.0f} GB/s, read and written")
    cases = [flags]
    if flags.gpu_check:
        cases = [replace(flags, preset=name, routing=routing) for name, routing in
                 (("phi2", "balanced"), ("phi2", "skewed"), ("stablelm2", "balanced"))]  # fmt: skip
    sizes = (flags.tokens,) if flags.tokens else SIZES if is_gpu else (2048,)
    result["copy_bytes_per_s"] = peak
    result["sizes"] = [bench_size(case, n, timer, peak) for case in cases for n in sizes]
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
