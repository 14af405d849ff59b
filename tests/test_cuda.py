"""The kernels in cuda/ equal torch, on cuda_on_cpu.h in three orders of threads and blocks, and on
the GPU itself where there is one of 8.0 or later; with outputs that begin as NaN.
tests/mutate_kernels.py breaks the kernels and checks that these tests fail.
"""

import ctypes
import re

import pytest
import torch
import torch.nn.functional as F

import ops
from tests import cuda_on_cpu

MACHINES = [f"order {order}" for order in cuda_on_cpu.ORDERS]
GPU = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
if GPU >= (8, 0):
    MACHINES.append("gpu")

# Rows of each expert, and the widths F and D of its matrix.
CASES = {
    "ragged, an empty one": ((130, 0, 1, 200), 320, 136), "one row each": ((1, 1, 1, 1), 8, 8),
    "one expert": ((77,), 136, 200), "one expert has all rows": ((0, 0, 70, 0), 264, 72),
    "as the slices": ((64, 128, 192, 5), 256, 128), "no rows": ((0, 0), 16, 8),
    "more than 16 rows of tiles": ((17 * 128, 128 * 18 + 3), 264, 8)}  # fmt: skip


@pytest.fixture(name="machine", params=MACHINES, autouse=True)
def _machine(request):
    """What computes. Memory that was not written yet is NaN, or the largest integer."""
    if request.param == "gpu":
        ops.build(torch.device("cuda"))
        machine, device = None, "cuda"  # it orders its threads itself
    else:
        if why := cuda_on_cpu.missing():
            pytest.skip(why)
        machine, device = cuda_on_cpu.Machine(cuda_on_cpu.compiled()), "cpu"
        machine.set(order=int(request.param[-1]), blocks=3, only=-1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.device(device):
        yield machine
    torch.use_deterministic_algorithms(False)


@pytest.fixture(name="library")
def _library(machine):
    """What is loaded for this machine, for ctypes."""
    gpus = (path for path in torch.ops.loaded_libraries if re.search(r"medmoe_(?!on)", path))
    library = machine.library if machine else ctypes.CDLL(next(gpus))
    yield library
    cuda_on_cpu.force_major(library, 0)


@pytest.fixture(name="major", params=[8, 9])
def _major(machine, library, request):
    """Which grouped matmul: ladder/pipelined.cu, or gmm.cu, which only a Hopper can run."""
    if machine is None and request.param == 9 and GPU != (9, 0):
        pytest.skip("gmm.cu is for compute capability 9.0")
    cuda_on_cpu.force_major(library, request.param)
    return request.param


def randn(*shape, seed=0, dtype=torch.bfloat16):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return noise.to(torch.get_default_device(), dtype)


def check(ours, expected):
    """Of the whole tensor; where ours has a NaN, the difference is no number and not below."""
    assert ours.shape == expected.shape and ours.dtype == torch.bfloat16
    assert (ours.float() - expected).norm() <= 6e-3 * expected.norm()


def gates_of(pattern, n, n_experts):
    """Gates (N, E): `pattern` random experts for each token, or "any" number, or the last one."""
    noise = randn(n, n_experts, seed=1, dtype=torch.float32)
    choices = {"any": noise > 0.3, "last": torch.arange(n_experts) == n_experts - 1}
    order = noise.argsort(dim=1).argsort(dim=1)
    routed = order < pattern if isinstance(pattern, int) else choices[pattern]
    gates = (noise.abs() + 0.1) * routed
    gates[:, 0] *= -1  # a negative gate is routed too
    return gates


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("n", "n_experts", "pattern", "d"), [
    (1, 1, 1, 64), (5, 4, 2, 56), (300, 4, 2, 48), (1001, 7, "any", 40), (64, 4, "last", 32),
    (9, 3, 0, 24), (40, 48, 8, 16), (4096, 4, 2, 8), (37, 4, 2, 2560), (0, 4, 2, 8)])  # fmt: skip
def test_routing_permute_unpermute_and_their_gradients(dtype, off, n, n_experts, pattern, d):
    gates, close = gates_of(pattern, n, n_experts), torch.testing.assert_close
    plan, (slot, offs) = ops.dispatch_plan(gates), ops.CALL.route(gates)
    x, n_routed = randn(n, d, dtype=dtype), int(offs[-1])
    expected = torch.full((n, n_experts), -1, dtype=torch.int32)
    expected[plan.token, plan.expert] = torch.arange(n_routed, dtype=torch.int32)
    assert torch.equal(offs, plan.offsets) and torch.equal(slot, expected)
    assert torch.equal(ops.CALL.permute(x, slot, n_routed), x[plan.token])
    y, weight = randn(n_routed, d, seed=1, dtype=dtype), gates[plan.token, plan.expert, None]
    for given, factor in ((gates, weight), (None, 1)):
        expected = torch.zeros(n, d).index_add(0, plan.token, y.float() * factor)
        close(ops.CALL.unpermute(y, slot, given).float(), expected, rtol=off, atol=off)
    grad = randn(n, d, seed=2, dtype=dtype)
    dy, dgates = ops.CALL.unpermute_grad(grad, y, slot, gates)
    rows = grad[plan.token].float()
    close(dy, (rows * weight).to(dtype), rtol=0, atol=0)
    expected = torch.zeros(n, n_experts)
    expected[plan.token, plan.expert] = (rows * y.float()).sum(dim=1)
    close(dgates, expected, rtol=1e-4, atol=1e-4)


def each(of, *operands):
    """One matmul an expert, in fp32."""
    return [of(*(t.float() for t in group)) for group in zip(*operands, strict=True)]


def operands(sizes, f, d):
    offs, n = torch.tensor(sizes).cumsum(dim=0).int(), sum(sizes)
    return offs, randn(n, d), randn(n, f, seed=1), randn(len(sizes), f, d, seed=2)


@pytest.mark.usefixtures("major")
@pytest.mark.parametrize("case", CASES)
def test_grouped_products_equal_one_matmul_an_expert(case):
    sizes, f, d = CASES[case]
    offs, x, dy, w = operands(sizes, f, d)
    xs, dys, bias = x.split(sizes), dy.split(sizes), randn(len(sizes), f, seed=3)
    y = torch.cat(each(lambda a, b: a @ b.T, xs, w))
    check(ops.forward(x, w, None, offs)[0], y)
    check(ops.forward(x, w, bias, offs)[0], y + bias.repeat_interleave(torch.tensor(sizes), dim=0))
    check(ops.input_grad(dy, w, offs)[0], torch.cat(each(torch.matmul, dys, w)))
    check(ops.weight_grad(dy, x, offs), torch.stack(each(lambda a, b: a.T @ b, dys, xs)))
    check(ops.bias_grad(dy, offs), torch.stack(each(lambda a: a.sum(dim=0), dys)))


@pytest.mark.usefixtures("major")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_and_weights_of_other_experts_do_not_reach_an_expert(bad):
    """Tiles extend past an expert's rows, and past its matrix: what lies there must not count."""
    offs, x, dy, w = operands((70, 30, 64), 72, 40)
    found = []
    for _ in range(2):
        found.append((ops.forward(x, w, None, offs)[0], ops.input_grad(dy, w, offs)[0],
                      ops.weight_grad(dy, x, offs)))  # fmt: skip
        x[70:100] = dy[70:100] = w[1] = bad
    clean, dirty = found
    for before, after in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(before[:70], after[:70]) and torch.equal(before[100:], after[100:])
    assert torch.equal(clean[2][[0, 2]], dirty[2][[0, 2]]) and not dirty[2][1].isfinite().any()


@pytest.mark.usefixtures("major")
@pytest.mark.parametrize("activation", [ops.GELU, ops.SILU])
@pytest.mark.parametrize("case", list(CASES)[:3])
def test_fused_activations_forward_and_in_the_gradient(case, activation):
    sizes, f, d = CASES[case]
    offs, x, _, w = operands(sizes, f, d)
    w, up, down = w / d**0.5, randn(len(sizes), f, d, seed=3), randn(len(sizes), d, f, seed=4)
    bias, up = (randn(len(sizes), f), None) if activation == ops.GELU else (None, up)
    dy = randn(len(x), d, seed=5)
    h, *kept = ops.forward(x, w, bias, offs, activation, up)  # z, and for the gate u
    with torch.inference_mode():  # no backward: what it would read is not written
        alone, *empty = ops.forward(x, w, bias, offs, activation, up)
    assert torch.equal(alone, h) and [len(t) for t in empty] == [0] * len(kept)
    assert torch.equal(kept[0], ops.forward(x, w, bias, offs)[0])
    assert up is None or torch.equal(kept[1], ops.forward(x, up, None, offs)[0])
    leaves = [t.float().requires_grad_() for t in kept]
    expected = F.gelu(leaves[0], approximate="tanh") if up is None else F.silu(leaves[0])
    expected = expected if up is None else expected * leaves[1]
    torch.testing.assert_close(h.float(), expected, rtol=8e-3, atol=1e-4)
    *found, again = ops.input_grad(dy, down, offs, activation, *kept)
    assert torch.equal(again, h)
    dh = torch.cat(each(torch.matmul, dy.split(sizes), down))
    for ours, exact in zip(found, torch.autograd.grad(expected, leaves, dh), strict=True):
        check(ours, exact)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (130, 200, 72), (77, 264, 328)])
def test_every_rung_of_the_ladder_computes_the_same_product(library, major, m, n, k):
    a, b, offs = randn(m, k), randn(n, k, seed=1), torch.tensor([m], dtype=torch.int32)
    found = [ops.forward(a, b[None], None, offs)[0]]  # the fourth, or the last
    for rung in (library.naive, library.tiles, library.tensor_cores) if major == 8 else ():
        found.append(torch.empty(m, n, dtype=torch.bfloat16))
        rung(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, found[-1])), m, n, k, None)
    check(torch.cat(found), (a.float() @ b.float().T).repeat(len(found), 1))


# More than 2^31 entries, of which few are ever touched: memory is only taken where it is written.
D = 2560
LAST = 2**31 // D + 5  # a row that begins beyond


def sparse(*shape):
    torch.use_deterministic_algorithms(False)  # or it would all be filled with NaN
    return torch.empty(*shape, dtype=torch.bfloat16)


def test_rows_times_columns_may_pass_2_to_the_31():
    slot, gates = torch.tensor([[LAST]], dtype=torch.int32), torch.full((1, 1), 0.5)
    x, far = randn(1, D), sparse(LAST + 1, D)
    assert torch.equal(ops.CALL.permute(x, slot, LAST + 1)[LAST], x[0])
    far[LAST] = x[0]
    assert torch.equal(ops.CALL.unpermute(far, slot, gates), x / 2)
    dy, dgates = ops.CALL.unpermute_grad(2 * x, far, slot, gates)
    dgate = 2 * x.float().square().sum().item()
    assert torch.equal(dy[LAST], x[0]) and dgates.item() == pytest.approx(dgate, rel=1e-4)


@pytest.mark.parametrize("what", ["rows of a result", "weights of all experts"])
def test_grouped_products_may_pass_2_to_the_31(machine, major, what):
    """Only the last tile is computed: a block for each, and only the last one runs."""
    of_rows, n_experts, f, d = what == "rows of a result", 12, 8 * D, 10240
    tiles = -(-(LAST + 1) // 128) * (D // 256) if of_rows else n_experts * f // 128 * d // 256
    if machine:  # pipelined.cu: two blocks a multiprocessor, two tiles where gmm.cu has one
        machine.set(blocks=tiles, only=tiles * (2 if major == 8 else 1) - 1)
    if of_rows:
        offs = torch.tensor([LAST + 1], dtype=torch.int32)
        x, w = sparse(LAST + 1, 8), randn(1, D, 8)
        x[-40:] = randn(40, 8, seed=1)
        y = ops.forward(x, w, None, offs)[0]
        check(y[-3:, -128:], (x[-3:].float() @ w[0].float().T)[:, -128:])
    else:
        offs = torch.zeros(n_experts, dtype=torch.int32)
        offs[-1] = 40
        dw = ops.weight_grad(sparse(40, f).fill_(0.5), sparse(40, d).fill_(1), offs)
        assert dw[-1, -1, -1] == 20


def test_arguments_that_do_not_fit_are_refused_by_name(machine):
    x, w, offs = randn(4, 16), randn(2, 8, 16), torch.tensor([2, 4], dtype=torch.int32)
    gmm = {"product": ops.FORWARD, "activation": ops.PLAIN, "a": x, "b": w, "offs": offs}
    gmm |= dict.fromkeys(("up", "bias", "z", "u"))
    weight, gated = gmm | {"product": ops.WEIGHT_GRAD, "b": x}, gmm | {"activation": 2, "up": w}
    grad = gated | {"product": ops.INPUT_GRAD, "a": randn(4, 8), "up": None, "z": x, "u": x}
    slot, gates = torch.tensor([[0], [1]], dtype=torch.int32), torch.ones(2, 1)
    move = {"x": x[:2], "slot": slot, "n_routed": 2}
    rows = {"y": x, "slot": slot, "gates": gates}
    if machine:  # a GPU's values are not read
        far, negative, beyond = offs * 10**6, offs - 3, slot + 10**8
    else:
        far, negative, beyond = offs.cpu(), offs.cpu(), slot.cpu()
    calls = (
        ("gmm", gmm, (("product", 3, -1), ("activation", 3, -1), ("up", w), ("z", x),
                      ("a", x.float(), randn(16, 4).t(), x[0], x[:, :8]),
                      ("b", w[0], randn(3, 8, 16), randn(2, 16, 8).mT),
                      ("bias", randn(2, 16)), ("offs", offs.long(), offs[:1, None], far))),
        ("gmm", gated, (("up", None, w[:1]), ("bias", randn(2, 8)))),
        ("gmm", grad, (("z", None, x[:2]), ("u", None), ("bias", randn(2, 8)), ("up", w))),
        ("gmm", weight, (("activation", ops.GELU), ("b", w), ("u", x), ("offs", negative))),
        ("route", {"gates": gates}, (("gates", torch.ones(2, 49), x, gates[0]),)),
        ("permute", move, (("x", x, x[:2].T), ("n_routed", -1), ("slot", beyond))),
        ("unpermute", rows, (("y", x.half(), randn(4, 4)), ("slot", slot.long(), slot[0], beyond),
                             ("gates", gates[:1]))),
        ("unpermute_grad", rows | {"grad": x[:2]}, (("grad", x), ("y", x.T), ("slot", beyond))),
    )  # fmt: skip
    for op, args, _ in calls:
        getattr(ops.CALL, op)(**args)  # as it is, it is allowed
    bad = [(getattr(ops.CALL, op), args, name, value) for op, args, bads in calls
           for name, *values in bads for value in values]  # fmt: skip
    assert len(bad) > 40
    for op, args, name, value in bad:
        with pytest.raises(RuntimeError, match=rf"^(a, )?{name}\b"):
            op(**args | {name: value})
