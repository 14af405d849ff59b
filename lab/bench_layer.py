"""The sparse layer compared with its matmuls alone and with other implementations of it.

A layer is the E experts with their dispatch, without router and meta expert. "train" is forward
and backward, with the gradients of tokens, gates and weights; "answer" is forward alone, without
gradients. The implementations:

matmuls   the matrix products alone, one for each expert, into allocated memory: the limit
loop      ours, moe.Experts: for each expert, its tokens through its FFN
sorted    ours, ops.SortedExperts: permute, grouped matmul, unpermute
einsum    a capacity of 1.25 times the mean for each expert, dispatch and combination as one-hot
          products (Lepikhin et al. 2020, DeepSpeed); it drops tokens beyond the capacity
dense     one FFN as wide as a token's k experts together: equal FLOPs

Shapes: N tokens, k = 2 experts each, E = 4 experts, R = k N, D d_model, F d_ff.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from config import UserError, preset
from moe import MLP, Experts, GatedMLP
from ops import SortedExperts, use_sorted_experts

N_EXPERTS, K = 4, 2
Ways = dict[str, Callable[[], object]]


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

    def of(self, ways: Ways) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(self.rounds + 1):
            for name, run in ways.items():
                seconds = self.once(run)
                if round_:
                    times[name].append(seconds)
        return {name: statistics.median(values) for name, values in times.items()}


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


# Other implementations


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


# The layer


def both_ways(layer: Callable, experts: Experts, x: Tensor, gates: Tensor, dy: Tensor) -> list:
    """Forward and backward of a layer -> its output and all gradients."""
    inputs = [x.detach().requires_grad_(), gates.detach().requires_grad_()]
    y = layer(experts, *inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], dy, allow_unused=True)]


def off(ours: Tensor, expected: Tensor) -> float:
    """The relative error of a whole tensor."""
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def check_layer(experts: Experts, routing: str, device: torch.device) -> float:
    """The largest error of loop and sorted, gradients included, on 64 tokens.

    Compared with the loop in fp32, which tests/test_moe.py compares with its equation.
    """
    gates, weight = gates_of(64, routing, device), next(experts.parameters())
    x, dy = (torch.randn(64, weight.shape[-1]).to(device, weight.dtype) for _ in range(2))
    exact = both_ways(Experts.forward, copy.deepcopy(experts).float(), x.float(), gates, dy.float())
    worst = 0.0
    for cls in (Experts, SortedExperts):
        found = both_ways(cls.forward, experts, x, gates, dy)
        worst = max(worst, *(off(a, b) for a, b in zip(found, exact, strict=True)))
    if not worst < 0.03:
        raise UserError(f"the layer is wrong: relative error {worst:.1e}")
    return worst


def bench_layer(experts: Experts, routing: str, n: int, timer: Timer) -> dict:
    """Times of each implementation, and their ratios to the matmuls alone and to the loop."""
    weight = next(experts.parameters())
    device, dtype = weight.device, weight.dtype
    worst = check_layer(experts, routing, device)
    gates = gates_of(n, routing, device)
    x, dy = (torch.randn(n, weight.shape[-1]).to(device, dtype) for _ in range(2))
    layers: dict[str, Callable] = {
        "loop": Experts.forward, "sorted": SortedExperts.forward, "einsum": einsum,
    }  # fmt: skip
    if 1.25 * K * n * n * x.element_size() > 8e9:  # its one-hot matrices
        del layers["einsum"]
    if device.type == "cuda":
        layers["dense"] = dense
    sizes = [part.weight.shape[1] * part.weight.shape[2] for part in experts.children()]
    flops = 3 * 2 * K * n * sum(sizes)
    print(f"layer, {n} tokens, {routing}: {flops / 1e12:.2f} TFLOP, relative error {worst:.1e}")
    ways: Ways = {"matmuls": matmuls(experts, x, gates)}
    for name, layer in layers.items():
        ways[name] = lambda layer=layer: both_ways(layer, experts, x, gates, dy)
    train = timer.of(ways)
    for name, seconds in train.items():
        print(f"  train   {name:<8}{seconds * 1e3:10.1f} ms {flops / seconds / 1e12:9.3f} TFLOP/s "
              f"{seconds / train['matmuls']:6.2f} x the matmuls "
              f"{seconds / train['loop']:6.2f} x the loop")  # fmt: skip
    with torch.no_grad():
        answer = timer.of({
            "loop": lambda: Experts.forward(experts, x, gates),
            "sorted": lambda: SortedExperts.forward(experts, x, gates),
        })  # fmt: skip
    for name, seconds in answer.items():
        print(f"  answer  {name:<8}{seconds * 1e3:10.1f} ms {flops / 3 / seconds / 1e12:9.3f} "
              f"TFLOP/s {'':<20}{seconds / answer['loop']:6.2f} x the loop")  # fmt: skip
    return {"tokens": n, "flops": flops, "seconds": train, "answer_seconds": answer, "error": worst}
