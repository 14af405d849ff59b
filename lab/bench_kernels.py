"""How fast the sparse layer is, and on a GPU each of its kernels, compared with their limits.

    python -m lab.bench kernels                          on a CPU: the layer by a loop and sorted
    python -m lab.bench kernels --device cuda            on a GPU: every op and size as well
    python -m lab.bench kernels --gpu-check              first the tests of cuda/ on the GPU itself

Everything that is timed is first compared with its definition. Competitors run alternately, once a
round; a time is the median over the rounds, of which the first does not count. On a GPU, L2 is
emptied before each call and times are the GPU's own. lab/bench_layer.py lists the implementations
of the layer. Matmul kernels are compared with a dense matmul of equal FLOPs, a matmul for each
expert and torch.nn.functional.grouped_mm; those that move rows with the bandwidth of a large copy.
The last line is JSON.

Shapes: N tokens, k = 2 experts each, E = 4 experts, R = k N, D d_model, F d_ff.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from config import UserError, flag
from engine.cli import at_least, parse, user_errors
from lab.bench_layer import Timer, bench_layer, experts_of, gates_of, off
from model import choose_device

ROOT = Path(__file__).parent.parent
SIZES = (1024, 4096, 16384, 65536)
SMALL = "gpu and not many and not than_16 and not 2_to_the_31 and not 4096 and not 2560"


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


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timer.of({"copy": lambda: target.copy_(source)})["copy"]


def bench_rows(x: Tensor, gates: Tensor, timer: Timer, peak: float) -> dict:
    """Routing, permute, unpermute and its gradient; peak: bytes a second of a copy."""
    call, (n, d), n_experts = ops.CALL, x.shape, gates.shape[1]
    slot, offs = call.route(gates)
    n_routed = int(offs[-1])
    plan = ops.DispatchPlan(*ops._as_list(ops.DispatchPlan(None, None, offs, slot))[:3])
    y = call.permute(x, slot, n_routed)
    assert torch.equal(y, ops.permute(x, plan))
    assert off(call.unpermute(y, slot, gates), ops.unpermute(y, gates, plan)) < 0.01
    moved = {  # rows of d read and written
        "permute": n + n_routed, "unpermute": n + n_routed, "unpermute_grad": n + 2 * n_routed,
    }  # fmt: skip
    times = timer.of({
        "route": lambda: call.route(gates),
        "permute": lambda: call.permute(x, slot, n_routed),
        "unpermute": lambda: call.unpermute(y, slot, gates),
        "unpermute_grad": lambda: call.unpermute_grad(x, y, slot, gates),
        "torch: permute": lambda: ops.permute(x, plan),
        "torch: unpermute": lambda: ops.unpermute(y, gates, plan),
    })  # fmt: skip
    print(f"  {'route':<18}{times['route'] * 1e6:9.1f} us, {n} tokens, {n_experts} experts")
    for name, seconds in list(times.items())[1:]:
        rate = moved[name.removeprefix("torch: ")] * d * x.element_size() / seconds
        print(f"  {name:<18}{seconds * 1e6:9.1f} us {rate / 1e9:8.0f} GB/s "
              f"{rate / peak:6.2f} of a copy")  # fmt: skip
    return times


def bench_product(name: str, sizes: list[int], ours: Callable[[], Tensor], torchs: Callable,
                  each: list[tuple[Tensor, Tensor]], timer: Timer) -> dict:  # fmt: skip
    """One grouped product and its competitors. each: the factors for every expert."""
    outs = [a.new_empty(a.shape[0], b.shape[1]) for a, b in each]
    a, b = next((a, b) for (a, b), n in zip(each, sizes, strict=True) if n == max(sizes))
    flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in each)
    n_times = flops / (2 * a.shape[0] * a.shape[1] * b.shape[1])

    def loop() -> None:
        for (a, b), out in zip(each, outs, strict=True):
            torch.mm(a, b, out=out)

    loop()
    result = ours()
    parts = result if result.dim() == 3 else result.split(sizes)
    worst = max(off(x, y) for x, y, n in zip(parts, outs, sizes, strict=True) if n)
    if not worst < 6e-3:
        raise UserError(f"{name} is wrong: relative error {worst:.1e}")
    ways = {"ours": ours, "grouped_mm": torchs, "loop": loop, "dense": lambda: a @ b}
    times = timer.of(ways)
    times["dense"] *= n_times  # the largest expert's product, as if all FLOPs were such
    rates = ", ".join(f"{k} {flops / t / 1e12:.0f}" for k, t in times.items())
    print(f"  {name:<18}TFLOP/s: {rates}; {times['loop'] / times['ours']:.2f} x the loop, "
          f"{times['grouped_mm'] / times['ours']:.2f} x grouped_mm, error {worst:.0e}")  # fmt: skip
    return times


def bench_products(x: Tensor, weight: Tensor, bias: Tensor | None, offs: Tensor,
                   timer: Timer) -> dict:  # fmt: skip
    """x (R, D), weight (E, F, D): the three products, and the first with bias and GELU."""
    sizes = torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
    dy = torch.randn(len(x), weight.shape[1], device=x.device).to(x)
    xs, dys, ws = x.split(sizes), dy.split(sizes), weight.unbind()
    found = {
        "forward": bench_product(
            "forward", sizes, lambda: ops.forward(x, weight, None, offs)[0],
            lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=offs),
            [(a, w.T) for a, w in zip(xs, ws, strict=True)], timer),
        "input grad": bench_product(
            "input grad", sizes, lambda: ops.input_grad(dy, weight, offs)[0],
            lambda: F.grouped_mm(dy, weight, offs=offs),
            list(zip(dys, ws, strict=True)), timer),
        "weight grad": bench_product(
            "weight grad", sizes, lambda: ops.weight_grad(dy, x, offs),
            lambda: F.grouped_mm(dy.T, x, offs=offs),
            [(g.T, a) for g, a in zip(dys, xs, strict=True)], timer),
    }  # fmt: skip
    if bias is not None:
        fused = timer.of({
            "fused": lambda: ops.forward(x, weight, bias, offs, ops.GELU),
            "apart": lambda: F.gelu(ops.forward(x, weight, bias, offs)[0], approximate="tanh"),
        })  # fmt: skip
        print(f"  with bias and GELU: {fused['fused'] * 1e3:.3f} ms, "
              f"{fused['apart'] / fused['fused']:.2f} x as fast as apart")  # fmt: skip
        found["gelu"] = fused
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
    commands = {"tests": [*tests, "-k", "gpu"]}
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        commands[tool] = [*sanitizer, *tests, "-k", SMALL]
    found = {}
    for name, command in commands.items():
        if not shutil.which(command[0]):
            found[name] = f"not run: no {command[0]} here"
            continue
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
            ends = "passed" if done.returncode == 0 else "FAILED"
            found[name] = f"{ends}: {' '.join((done.stdout.split(chr(10)) or [''])[-2:])}"
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
    timer = Timer(device, flags.rounds)
    peak = copy_bandwidth(timer) if is_gpu else None
    if peak:
        print(f"copy: {peak / 1e9:.0f} GB/s, read and written")
    sizes = (flags.tokens,) if flags.tokens else SIZES if is_gpu else (2048,)
    cases = [(flags.preset, flags.routing)]
    if flags.gpu_check:
        cases = [("phi2", "balanced"), ("phi2", "skewed"), ("stablelm2", "balanced")]
    result["copy_bytes_per_s"], result["sizes"] = peak, []
    for preset, routing in cases:
        for n in sizes:
            case = KernelsConfig(**asdict(flags) | {"preset": preset, "routing": routing})
            result["sizes"].append(bench_size(case, n, timer, peak))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
