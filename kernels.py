"""The CUDA extension in cuda/: its ops as torch knows them, and how it is built and switched on.

An op has a schema and says here, for torch.compile, what shapes come out, and what its gradient
is; what computes it is C++ (cuda/binding.cpp), which is not there until `build` has loaded it.
ops.py asks `serve` before it calls any. Nothing is compiled when this file is imported.

Shapes: N rows, E experts, R visits, D, F widths, as in ops.py; slot (N, E) says where among the
visits a row's visit to an expert lies, -1: nowhere.
"""

import hashlib
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from config import UserError

SOURCES = Path(__file__).parent / "cuda"
LIBRARY = torch.library.Library("medmoe", "DEF")
SCHEMAS = (
    "route(Tensor gates) -> (Tensor slot, Tensor offs)",
    "permute(Tensor x, Tensor slot, SymInt n_visits) -> Tensor",
    "unpermute(Tensor y, Tensor slot, Tensor? gates) -> Tensor",
    "unpermute_grad(Tensor grad, Tensor y, Tensor slot, Tensor gates) -> (Tensor, Tensor)",
    "gmm(int product, int activation, Tensor a, Tensor b, Tensor? up, Tensor? bias, Tensor? z,"
    " Tensor? u, Tensor offs) -> Tensor[]",
)
for schema in SCHEMAS:
    LIBRARY.define(schema)
CALL = torch.ops.medmoe

FORWARD, INPUT_GRAD, WEIGHT_GRAD = range(3)  # cuda/launchers.h
PLAIN, GELU, SILU = range(3)

_serving: set[str] = set()  # device types whose tensors the extension computes, see choose


def choose(how: str, device: torch.device) -> None:
    """Apply --kernels: "cuda" the extension or a UserError, "torch" not, "auto" where it can be.

    On a GPU that it is not made for, or where it cannot be built, "auto" says so in one line.
    """
    _serving.discard(device.type)
    if how == "torch" or (how == "auto" and device.type != "cuda"):
        return
    try:
        build(device)
    except UserError as error:
        if how == "cuda":
            raise UserError(f"--kernels cuda: {error}") from error
        print(f"kernels: torch's own, {error}", file=sys.stderr)
        return
    _serving.add(device.type)


def build(device: torch.device) -> None:
    """Compile cuda/ with nvcc, or load what an earlier run has compiled. Raises UserError."""
    if device.type != "cuda":
        raise UserError(f"cuda/ needs a GPU, not {device.type}")
    if (found := torch.cuda.get_device_capability(device)) != (9, 0):
        raise UserError("cuda/ is made for compute capability 9.0 (Hopper), this GPU has "
                        f"{found[0]}.{found[1]}")  # fmt: skip
    from torch.utils import cpp_extension

    name = f"medmoe_{digest()}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.so").exists():
        print(f"kernels: compiling cuda/ in {folder}, once; about a minute", file=sys.stderr)
    try:
        cpp_extension.load(
            name,
            [str(SOURCES / file) for file in ("binding.cpp", "permute.cu", "gmm.cu")],
            extra_cflags=["-O2", "-std=c++20"],
            extra_cuda_cflags=["-O3", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a"],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:  # no nvcc, no ninja, a compiler's error
        log = folder / "build.log"
        log.write_text(str(error))
        raise UserError(
            f"cuda/ cannot be built: {first_error(str(error))} (all in {log})"
        ) from None


def digest() -> str:
    """Of the sources and the torch they are compiled for: another one, another build."""
    files = sorted(file for file in SOURCES.iterdir() if file.suffix != ".md")
    text = torch.__version__.encode() + b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:12]


def first_error(log: str) -> str:
    """The line of a compiler's log that says what is wrong; else its first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\berror\b:|: fatal error", line)]
    return (wrong or lines or ["no reason given"])[0]


def active(x: Tensor) -> bool:
    """Was the extension chosen for this tensor's device?"""
    return x.device.type in _serving


def serve(*tensors: Tensor | None) -> bool:
    """Does it multiply these? They must be bf16, all widths multiples of 8: 16 bytes."""
    return all(
        active(t) and t.dtype == torch.bfloat16 and all(n % 8 == 0 for n in t.shape[1:])
        for t in tensors
        if t is not None
    )


def serve_rows(x: Tensor) -> bool:
    """Does it move the rows of x? In fp32 too."""
    able = x.dtype in (torch.bfloat16, torch.float32)
    return active(x) and able and x.shape[-1] * x.element_size() % 16 == 0


def serve_routing(gates: Tensor) -> bool:
    """Does it route these? Gates in fp32, as routers give them, of as many experts as it counts."""
    return active(gates) and gates.dtype == torch.float32 and gates.shape[1] <= 48


# What comes out, for torch.compile, which asks without computing.


@torch.library.register_fake("medmoe::route", lib=LIBRARY)
def _(gates):
    slot = torch.empty_like(gates, dtype=torch.int32)
    return slot, slot.new_empty(gates.shape[1])


@torch.library.register_fake("medmoe::permute", lib=LIBRARY)
def _(x, slot, n_visits):
    return x.new_empty(n_visits, x.shape[1])


@torch.library.register_fake("medmoe::unpermute", lib=LIBRARY)
def _(y, slot, gates):
    return y.new_empty(slot.shape[0], y.shape[1])


@torch.library.register_fake("medmoe::unpermute_grad", lib=LIBRARY)
def _(grad, y, slot, gates):
    return torch.empty_like(y), torch.empty_like(gates)


@torch.library.register_fake("medmoe::gmm", lib=LIBRARY)
def _(product, activation, a, b, up, bias, z, u, offs):
    shape = {
        FORWARD: (a.shape[0], b.shape[-2]),
        INPUT_GRAD: (a.shape[0], b.shape[-1]),
        WEIGHT_GRAD: (offs.shape[0], a.shape[-1], b.shape[-1]),
    }[product]
    return [a.new_empty(shape) for _ in range(activation + 1)]


# Gradients. Of the ops on rows as torch.library has them; of the products by hand, as a whole FFN
# is one step of autograd: what it keeps and what it computes again is chosen here.


def _permute_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _permute_backward(ctx, grad):
    return CALL.unpermute(grad.contiguous(), *ctx.saved_tensors, None), None, None


def _unpermute_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx, grad):
    y, slot, gates = ctx.saved_tensors
    grad = grad.contiguous()
    if gates is None:
        return CALL.permute(grad, slot, y.shape[0]), None, None
    dy, dgates = CALL.unpermute_grad(grad, y, slot, gates)
    return dy, None, dgates


torch.library.register_autograd(
    "medmoe::permute", _permute_backward, setup_context=_permute_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "medmoe::unpermute", _unpermute_backward, setup_context=_unpermute_setup, lib=LIBRARY
)


def forward(x, w, bias, offs, activation=PLAIN, up=None) -> list[Tensor]:
    """x (R, D), w (E, F, D) -> (R, F): act(x_r w[e]' + bias[e]), and what the activation read."""
    return CALL.gmm(FORWARD, activation, x, w, up, bias, None, None, offs)


def input_grad(dy, w, offs, activation=PLAIN, z=None, u=None) -> list[Tensor]:
    """dy (R, F), w (E, F, D) -> (R, D): dy_r w[e], through the slope of an activation at z, u."""
    return CALL.gmm(INPUT_GRAD, activation, dy, w, None, None, z, u, offs)


def weight_grad(dy, x, offs) -> Tensor:
    """dy (R, F), x (R, D) -> (E, F, D): dy_e' x_e."""
    return CALL.gmm(WEIGHT_GRAD, PLAIN, dy, x, None, None, None, None, offs)[0]


def bias_grad(dy, offs) -> Tensor:
    """dy (R, F) -> (E, F): the weight gradient where inputs are 1; 8 of them, for alignment."""
    return weight_grad(dy, dy.new_ones(dy.shape[0], 8), offs)[..., 0]


def apply(function: type[torch.autograd.Function], *args: Tensor | None) -> Tensor:
    """One of the functions below, whose arguments must be contiguous."""
    return function.apply(*(None if arg is None else arg.contiguous() for arg in args))


class Linear(torch.autograd.Function):
    """x (R, D), w (E, F, D), bias (E, F) or None, offs (E,) -> (R, F)."""

    @staticmethod
    def forward(ctx, x, w, bias, offs):
        ctx.save_for_backward(x, w, offs)
        return forward(x, w, bias, offs)[0]

    @staticmethod
    def backward(ctx, dy):
        x, w, offs = ctx.saved_tensors
        dy, needed = dy.contiguous(), ctx.needs_input_grad
        dx = input_grad(dy, w, offs)[0] if needed[0] else None
        dw = weight_grad(dy, x, offs) if needed[1] else None
        return dx, dw, bias_grad(dy, offs) if needed[2] else None, None


class GeluFFN(torch.autograd.Function):
    """w2[e] gelu(w1[e] x_r + b1[e]) + b2[e], x (R, D), w1 (E, F, D), w2 (E, D, F) -> (R, D).

    Kept for backward: x and z, what GELU read. Its result is computed again.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, offs):
        h, z = forward(x, w1, b1, offs, GELU)
        ctx.save_for_backward(x, z, w1, w2, offs)
        return forward(h, w2, b2, offs)[0]

    @staticmethod
    def backward(ctx, dy):
        x, z, w1, w2, offs = ctx.saved_tensors
        dy, needed = dy.contiguous(), ctx.needs_input_grad
        dz, h = input_grad(dy, w2, offs, GELU, z)
        return (
            input_grad(dz, w1, offs)[0] if needed[0] else None,
            weight_grad(dz, x, offs) if needed[1] else None,
            bias_grad(dz, offs) if needed[2] else None,
            weight_grad(dy, h, offs) if needed[3] else None,
            bias_grad(dy, offs) if needed[4] else None,
            None,
        )


class GatedFFN(torch.autograd.Function):
    """down[e] (silu(gate[e] x_r) * up[e] x_r), gate and up (E, F, D), down (E, D, F) -> (R, D).

    Kept for backward: x, and z and u, what gate and up made of it.
    """

    @staticmethod
    def forward(ctx, x, gate, up, down, offs):
        h, z, u = forward(x, gate, None, offs, SILU, up)
        ctx.save_for_backward(x, z, u, gate, up, down, offs)
        return forward(h, down, None, offs)[0]

    @staticmethod
    def backward(ctx, dy):
        x, z, u, gate, up, down, offs = ctx.saved_tensors
        dy, needed = dy.contiguous(), ctx.needs_input_grad
        dz, du, h = input_grad(dy, down, offs, SILU, z, u)
        dx = None
        if needed[0]:
            dx = input_grad(dz, gate, offs)[0] + input_grad(du, up, offs)[0]
        return (
            dx,
            weight_grad(dz, x, offs) if needed[1] else None,
            weight_grad(du, x, offs) if needed[2] else None,
            weight_grad(dy, h, offs) if needed[3] else None,
            None,
        )
