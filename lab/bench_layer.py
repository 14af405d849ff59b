"""The sparse layer beside its matmuls alone and beside other ways to write it.

A layer is the E experts with their dispatch, forward and backward, gradients of rows, gates and
weights; no router, no meta expert. Its ways:

matmuls   the matrix products alone, one for each expert, into memory that is there: the limit
ours      ops.py, as the model runs it
loop      a mask, a gather and an FFN for each expert, added up (as tutorials write it)
einsum    a capacity of 1.25 times the mean for each expert, dispatch and combination as one-hot
          products (Lepikhin et al. 2020, DeepSpeed); it drops visits beyond the capacity
dense     one FFN as wide as the experts that a row visits together: equal FLOPs

Shapes: N rows, k = 2 visits each, E = 4 experts, R = k N, D d_model, F d_ff.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError, preset
from moe import MLP, Experts, GatedMLP

N_EXPERTS, K = 4, 2
Ways = dict[str, Callable[[], object]]


class Timer:
    """Median seconds of ways that take turns, a round each; the first round warms up."""

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

    def of(self, ways: Ways) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(self.rounds + 1):
            for name, run in ways.items():
                seconds = self.once(run)
                if round_:
                    times[name].append(seconds)
        return {name: statistics.median(values) for name, values in times.items()}


def gates_of(n: int, routing: str, device: torch.device) -> Tensor:
    """Two experts for each of n rows -> gates (N, E), fp32."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(n, N_EXPERTS, generator=generator)
    if routing == "skewed":
        scores[:, 0] += 1  # everyone's first choice: half of all visits
    top = scores.topk(K).indices
    gates = torch.zeros(n, N_EXPERTS).scatter(1, top, torch.rand(n, K, generator=generator) + 0.1)
    return gates.to(device)


def experts_of(name: str, device: torch.device, dtype: torch.dtype) -> Experts:
    """Experts of a preset's size, of random weights."""
    decoder = preset(name).model.decoder
    mlp = GatedMLP if decoder.family == "stablelm" else MLP
    with torch.device("meta"):
        experts = Experts(mlp(decoder.d_model, decoder.d_ff), N_EXPERTS)
    experts = experts.to_empty(device=device).to(dtype)
    for param in experts.parameters():
        torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
    return experts


# Other ways


def ffn(experts: Experts, e: int, x: Tensor) -> Tensor:
    """One expert's FFN, x (n, D) -> (n, D)."""
    *first, last = experts.children()
    hidden = [F.linear(x, part.weight[e], *bias(part, e)) for part in first]
    h = F.silu(hidden[0]) * hidden[1] if experts.is_gated else F.gelu(hidden[0], approximate="tanh")
    return F.linear(h, last.weight[e], *bias(last, e))


def bias(part: torch.nn.Module, e: int) -> list[Tensor]:
    return [part.bias[e]] if hasattr(part, "bias") else []


def loop(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(N_EXPERTS):
        rows = gates[:, e].nonzero().squeeze(1)
        out = ffn(experts, e, x[rows]) * gates[rows, e, None].to(x.dtype)
        y = y.index_add(0, rows, out)
    return y


def einsum(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    n = len(x)
    capacity = math.ceil(1.25 * K * n / N_EXPERTS)
    visits = gates != 0
    place = visits.cumsum(dim=0) - 1  # (N, E)
    kept = visits & (place < capacity)
    one_hot = F.one_hot(place.clamp(0, capacity - 1), capacity).to(x.dtype)
    dispatch = one_hot * kept[..., None]  # (N, E, C)
    combine = dispatch * gates[..., None].to(x.dtype)
    sorted_ = torch.einsum("nec,nd->ecd", dispatch, x)  # (E, C, D)
    out = torch.stack([ffn(experts, e, rows) for e, rows in enumerate(sorted_)])
    return torch.einsum("nec,ecd->nd", combine, out)


def dense(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    """The first K experts as one FFN for every row."""
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


# The layer


def both_ways(layer: Callable, experts: Experts, x: Tensor, gates: Tensor, dy: Tensor) -> list:
    """Forward and backward of a layer -> its result and all gradients."""
    inputs = [x.detach().requires_grad_(), gates.detach().requires_grad_()]
    y = layer(*inputs) if layer is experts else layer(experts, *inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], dy, allow_unused=True)]


def off(ours: Tensor, expected: Tensor) -> float:
    """The relative error of a whole tensor."""
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def check_layer(experts: Experts, routing: str, device: torch.device) -> float:
    """The largest error of our result and gradients, against the loop in fp32, on 64 rows."""
    gates = gates_of(64, routing, device)
    x, dy = (torch.randn(64, next(experts.parameters()).shape[-1]) for _ in range(2))
    dtype = next(experts.parameters()).dtype
    ours = both_ways(experts, experts, x.to(device, dtype), gates, dy.to(device, dtype))
    exact = Experts(MLP(1, 1), 1) if not experts.is_gated else Experts(GatedMLP(1, 1), 1)
    for name, part in exact.named_children():
        for key, param in getattr(experts, name).named_parameters():
            part.register_parameter(key, torch.nn.Parameter(param.detach().float()))
    theirs = both_ways(
        loop, exact, x.to(device, dtype).float(), gates, dy.to(device, dtype).float()
    )
    theirs[2] = theirs[2] * (gates != 0)
    worst = max(off(a, b) for a, b in zip(ours, theirs, strict=True))
    if not worst < 0.03:
        raise UserError(f"the layer is wrong: relative error {worst:.1e}")
    return worst


def bench_layer(experts: Experts, routing: str, n: int, timer: Timer) -> dict:
    """Times of a layer's ways, and how they compare with the matmuls alone."""
    weight = next(experts.parameters())
    device, dtype = weight.device, weight.dtype
    worst = check_layer(experts, routing, device)
    gates = gates_of(n, routing, device)
    x, dy = (torch.randn(n, weight.shape[-1]).to(device, dtype) for _ in range(2))
    layers: dict[str, Callable] = {"ours": experts, "loop": loop, "einsum": einsum}
    if 1.25 * K * n * n * x.element_size() > 8e9:  # its one-hot matrices
        del layers["einsum"]
    if device.type == "cuda":
        layers["dense"] = dense
    ways: Ways = {"matmuls": matmuls(experts, x, gates)}
    for name, layer in layers.items():
        ways[name] = lambda layer=layer: both_ways(layer, experts, x, gates, dy)
    times = timer.of(ways)
    sizes = [part.weight.shape[1] * part.weight.shape[2] for part in experts.children()]
    flops = 3 * 2 * K * n * sum(sizes)
    print(f"layer, {n} rows, {routing}: {flops / 1e12:.2f} TFLOP, relative error {worst:.1e}")
    for name, seconds in times.items():
        print(f"  {name:<10}{seconds * 1e3:10.1f} ms {flops / seconds / 1e12:9.3f} TFLOP/s "
              f"{seconds / times['matmuls']:6.2f} x the matmuls")  # fmt: skip
    return {"rows": n, "flops": flops, "seconds": times, "error": worst}
