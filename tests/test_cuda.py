"""The kernels in cuda/, run without a GPU, equal torch: python -m pytest tests/test_cuda.py

cuda_on_cpu.h stands in for the GPU. Every check runs in three orders of threads and blocks, and on
the GPU itself where there is a Hopper; with outputs that begin as NaN. tests/mutate_kernels.py
breaks the kernels and checks that these tests fail.
"""

import pytest
import torch
import torch.nn.functional as F

import ops
from tests import cuda_on_cpu

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.missing() is not None, reason=f"kernels on a CPU: {cuda_on_cpu.missing()}"
)
MACHINES = [f"order {order}" for order in cuda_on_cpu.ORDERS]
if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
    MACHINES.append("gpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])

# Rows of each expert, and the widths F and D of its matrix.
CASES = {
    "ragged, an empty one": ((130, 0, 1, 200), 320, 136),
    "one expert has all rows": ((0, 0, 70, 0), 264, 72),
    "one row each": ((1, 1, 1, 1), 8, 8),
    "as the slices": ((64, 128, 192, 5), 256, 128),
    "many rows": ((2000, 96, 0, 2000), 24, 64),
    "no rows": ((0, 0), 16, 8),
    "one expert": ((77,), 136, 200),
}


class Gpu:
    def set(self, **values: int) -> None:
        """The GPU orders its threads itself."""


@pytest.fixture(name="machine", params=MACHINES, autouse=True)
def _machine(request):
    """What computes. Memory that was not written yet is NaN, or the largest integer."""
    if request.param == "gpu":
        ops.build(torch.device("cuda"))
        machine, device = Gpu(), "cuda"
    else:
        machine, device = cuda_on_cpu.Machine(cuda_on_cpu.compiled()), "cpu"
        machine.set(order=int(request.param[-1]), blocks=3, only=-1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(device):
        yield machine
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed=0, dtype=torch.bfloat16):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return noise.to(torch.get_default_device(), dtype)


def error(ours, expected):
    """Relative, of the whole tensor; NaN is infinitely wrong."""
    difference = (ours.float() - expected).norm() / expected.norm().clamp_min(1e-30)
    return difference.nan_to_num(float("inf")).item()


def gates_of(pattern, n, n_experts):
    """Gates (N, E): `pattern` random experts for each token, or "any" number of them."""
    noise = randn(n, n_experts, seed=1, dtype=torch.float32)
    gates = noise.abs() + 0.1
    if pattern == "any":
        return gates * (noise > 0.3)
    if pattern == "last":
        return gates * (torch.arange(n_experts) == n_experts - 1)
    if pattern == "none":
        return torch.zeros_like(gates)
    order = noise.argsort(dim=1).argsort(dim=1)
    gates[:, 0] *= -1  # a negative gate is routed too
    return gates * (order < pattern)


GATES = [(1, 1, 1), (5, 4, 2), (300, 4, 2), (1001, 7, "any"), (64, 4, "last"), (9, 3, "none"),
         (40, 48, 8), (4096, 4, 2)]  # fmt: skip


@pytest.mark.parametrize(("n", "n_experts", "pattern"), [*GATES, (0, 4, 2)])
def test_routing_is_the_plan_of_torch(n, n_experts, pattern):
    gates = gates_of(pattern, n, n_experts)
    slot, offs = ops.CALL.route(gates)
    plan = ops.dispatch_plan(gates)
    assert torch.equal(offs, plan.offsets)
    expected = torch.full((n, n_experts), -1, dtype=torch.int32)
    expected[plan.token, plan.expert] = torch.arange(len(plan.token), dtype=torch.int32)
    assert torch.equal(slot, expected)


@BOTH
@pytest.mark.parametrize(
    ("n", "n_experts", "pattern", "d"), [(*gates, 8 * (8 - i)) for i, gates in enumerate(GATES)]
    + [(37, 4, 2, 2560)],
)  # fmt: skip
def test_permute_and_unpermute_and_their_gradients(dtype, n, n_experts, pattern, d):
    gates = gates_of(pattern, n, n_experts)
    plan, (slot, offs) = ops.dispatch_plan(gates), ops.CALL.route(gates)
    x, n_routed = randn(n, d, dtype=dtype), int(offs[-1])
    y = ops.CALL.permute(x, slot, n_routed)
    assert torch.equal(y, x[plan.token])
    y = randn(n_routed, d, seed=1, dtype=dtype)
    expected = torch.zeros(n, d).index_add(0, plan.token, y.float() * gates[gates != 0][
        torch.argsort(gates.nonzero()[:, 1], stable=True), None])  # fmt: skip
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 6e-3, "atol": 6e-3}
    ours = ops.CALL.unpermute(y, slot, gates)
    torch.testing.assert_close(ours.float(), expected, **close)
    back = ops.CALL.unpermute(y, slot, None)
    expected = torch.zeros(n, d).index_add(0, plan.token, y.float())
    torch.testing.assert_close(back.float(), expected, **close)
    grad = randn(n, d, seed=2, dtype=dtype)
    dy, dgates = ops.CALL.unpermute_grad(grad, y, slot, gates)
    weight = gates[plan.token, plan.expert, None]
    torch.testing.assert_close(dy, (grad[plan.token].float() * weight).to(dtype), rtol=0, atol=0)
    expected = torch.zeros(n, n_experts)
    expected[plan.token, plan.expert] = (grad[plan.token].float() * y.float()).sum(dim=1)
    torch.testing.assert_close(dgates, expected, rtol=1e-4, atol=1e-4)


def products(sizes, f, d):
    """The three products of random operands, by kernel and by definition in fp32."""
    offs, n = torch.tensor(sizes).cumsum(dim=0).int(), sum(sizes)
    x, dy, w = randn(n, d), randn(n, f, seed=1), randn(len(sizes), f, d, seed=2)
    bias = randn(len(sizes), f, seed=3)
    xs, dys, ws = x.float().split(sizes), dy.float().split(sizes), w.float()
    yield "forward", ops.forward(x, w, bias, offs)[0], torch.cat(
        [a @ b.T + c for a, b, c in zip(xs, ws, bias.float(), strict=True)])  # fmt: skip
    yield "input", ops.input_grad(dy, w, offs)[0], torch.cat(
        [a @ b for a, b in zip(dys, ws, strict=True)])  # fmt: skip
    yield "weight", ops.weight_grad(dy, x, offs), torch.stack(
        [a.T @ b for a, b in zip(dys, xs, strict=True)])  # fmt: skip
    yield "bias", ops.bias_grad(dy, offs), torch.stack([a.sum(dim=0) for a in dys])


@pytest.mark.parametrize("case", CASES)
def test_grouped_products_equal_one_matmul_an_expert(case):
    found = list(products(*CASES[case]))
    assert len(found) > 3
    for name, ours, expected in found:
        assert ours.shape == expected.shape and ours.dtype == torch.bfloat16
        assert ours.numel() == 0 or error(ours, expected) < 6e-3, name


def test_the_kernel_walks_more_than_16_rows_of_tiles():
    sizes, d = (17 * 128, 128 * 18 + 3), 8
    x, w = randn(sum(sizes), d), randn(2, 264, d, seed=1)
    offs = torch.tensor(sizes).cumsum(dim=0).int()
    expected = torch.cat([a @ b.T for a, b in zip(x.float().split(sizes), w.float(), strict=True)])
    assert error(ops.forward(x, w, None, offs)[0], expected) < 6e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_and_weights_of_other_experts_do_not_reach_an_expert(bad):
    """Tiles extend past an expert's rows, and past its matrix: what lies there must not count."""
    sizes, f, d = (70, 30, 64), 72, 40
    offs = torch.tensor(sizes).cumsum(dim=0).int()
    x, dy, w = randn(164, d), randn(164, f, seed=1), randn(3, f, d, seed=2)
    clean = [ops.forward(x, w, None, offs)[0], ops.input_grad(dy, w, offs)[0],
             ops.weight_grad(dy, x, offs)]  # fmt: skip
    x[70:100] = dy[70:100] = w[1] = bad
    dirty = [ops.forward(x, w, None, offs)[0], ops.input_grad(dy, w, offs)[0],
             ops.weight_grad(dy, x, offs)]  # fmt: skip
    for before, after in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(before[:70], after[:70]) and torch.equal(before[100:], after[100:])
    assert torch.equal(clean[2][[0, 2]], dirty[2][[0, 2]])
    assert not dirty[2][1].isfinite().any()


@pytest.mark.parametrize("case", ["ragged, an empty one", "one row each", "one expert"])
def test_fused_gelu_forward_and_in_the_gradient(case):
    sizes, f, d = CASES[case]
    offs, n = torch.tensor(sizes).cumsum(dim=0).int(), sum(sizes)
    x, w, bias = randn(n, d), randn(len(sizes), f, d, seed=1) / d**0.5, randn(len(sizes), f, seed=2)
    h, z = ops.forward(x, w, bias, offs, ops.GELU)
    assert torch.equal(z, ops.forward(x, w, bias, offs)[0])
    torch.testing.assert_close(h, F.gelu(z.float(), approximate="tanh").bfloat16(), rtol=8e-3,
                               atol=1e-4)  # fmt: skip
    wide, dy = randn(len(sizes), d, f, seed=3), randn(n, d, seed=4)
    dz, again = ops.input_grad(dy, wide, offs, ops.GELU, z)
    assert torch.equal(again, h)
    leaf = z.float().requires_grad_()
    dh = torch.cat([a @ b for a, b in zip(dy.float().split(sizes), wide.float(), strict=True)])
    F.gelu(leaf, approximate="tanh").backward(dh)
    assert error(dz, leaf.grad) < 6e-3


@pytest.mark.parametrize("case", ["ragged, an empty one", "one row each", "one expert"])
def test_fused_gate_forward_and_in_the_gradient(case):
    sizes, f, d = CASES[case]
    offs, n = torch.tensor(sizes).cumsum(dim=0).int(), sum(sizes)
    x, gate, up = (randn(*s, seed=i) for i, s in enumerate([(n, d), *[(len(sizes), f, d)] * 2]))
    h, z, u = ops.forward(x, gate / d**0.5, None, offs, ops.SILU, up)
    assert torch.equal(z, ops.forward(x, gate / d**0.5, None, offs)[0])
    assert torch.equal(u, ops.forward(x, up, None, offs)[0])
    torch.testing.assert_close(h.float(), F.silu(z.float()) * u, rtol=8e-3, atol=1e-4)
    down, dy = randn(len(sizes), d, f, seed=3), randn(n, d, seed=4)
    dz, du, again = ops.input_grad(dy, down, offs, ops.SILU, z, u)
    assert torch.equal(again, h)
    leaves = z.float().requires_grad_(), u.float().requires_grad_()
    dh = torch.cat([a @ b for a, b in zip(dy.float().split(sizes), down.float(), strict=True)])
    (F.silu(leaves[0]) * leaves[1]).backward(dh)
    assert error(dz, leaves[0].grad) < 6e-3 and error(du, leaves[1].grad) < 6e-3


# More than 2^31 entries, of which few are ever touched: memory is only taken where it is written.

D = 2560
LAST = 2**31 // D + 5  # a row that begins beyond


def sparse(*shape):
    torch.use_deterministic_algorithms(False)  # or it would all be filled with NaN
    return torch.empty(*shape, dtype=torch.bfloat16)


def test_rows_times_columns_may_pass_2_to_the_31():
    slot, gates = torch.tensor([[LAST]], dtype=torch.int32), torch.full((1, 1), 0.5)
    x, far = randn(1, D), sparse(LAST + 1, D)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(ops.CALL.permute(x, slot, LAST + 1)[LAST], x[0])
    far[LAST] = x[0]
    assert torch.equal(ops.CALL.unpermute(far, slot, gates), x / 2)
    dy, dgates = ops.CALL.unpermute_grad(2 * x, far, slot, gates)
    assert torch.equal(dy[LAST], x[0]) and dgates.item() == pytest.approx(
        2 * x.float().square().sum().item(), rel=1e-4)  # fmt: skip


def test_results_of_a_grouped_product_may_lie_beyond_2_to_the_31(machine):
    """Only the last tile is computed: one multiprocessor for each, and only the last one runs."""
    offs = torch.tensor([LAST + 1], dtype=torch.int32)
    x, w = sparse(LAST + 1, 8), randn(1, D, 8)
    x[-40:] = randn(40, 8, seed=1)
    n_tiles = -(-(LAST + 1) // 128) * (D // 256)
    machine.set(blocks=n_tiles, only=n_tiles - 1)
    y = ops.forward(x, w, None, offs)[0]
    assert error(y[-3:, -256:], (x[-3:].float() @ w[0].float().T)[:, -256:]) < 6e-3


def test_weights_of_all_experts_may_have_more_than_2_to_the_31_entries(machine):
    n_experts, f, d = 12, 8 * D, 10240
    assert (n_experts - 1) * f * d > 2**31
    offs = torch.zeros(n_experts, dtype=torch.int32)
    offs[-1] = 40
    x, dy = sparse(40, d).fill_(1), sparse(40, f).fill_(0.5)
    n_tiles = n_experts * (f // 128) * (d // 256)
    machine.set(blocks=n_tiles, only=n_tiles - 1)
    dw = ops.weight_grad(dy, x, offs)
    assert dw[-1, -1, -1] == 20


# What is refused


def test_operands_of_the_wrong_kind_are_refused():
    x, w, offs = randn(4, 16), randn(2, 8, 16), torch.tensor([2, 4], dtype=torch.int32)
    for bad in (
        (x.float(), w, offs),
        (x, w[:, :, :8], offs),
        (x, w, offs.long()),
        (x[:, 1:9], w[:, :, :8].contiguous(), offs),
        (randn(4, 12), randn(2, 8, 12), offs),
    ):
        with pytest.raises(RuntimeError):
            ops.forward(bad[0], bad[1], None, bad[2])
    with pytest.raises(RuntimeError, match="at most 48 experts"):
        ops.CALL.route(torch.ones(2, 49))
