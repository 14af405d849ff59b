"""The sparse layer with the tokens sorted by expert, and the CUDA extension behind it.

    plan = dispatch_plan(gates)         which token goes where
    rows = permute(x, plan)             a copy of its token for each routed token, expert by expert
    out  = grouped_ffn(rows, experts)   each expert's stretch of rows through that expert's FFN
    y    = unpermute(out, gates, plan)  per token, the sum of its rows weighted by their gates

`SortedExperts` does so in place of moe.Experts' loop, with the same result; no token is ever
dropped or padded, whatever the router decides. What stands here in torch is the definition of each
op; on a GPU the kernels of cuda/ compute the same, where --kernels allows it. Nothing is
compiled when this file is imported. Read it with cuda/README.md.

Shapes: N tokens, E experts, R routed tokens, D, F widths; slot (N, E) says where among the R a
token's row for an expert lies, -1: nowhere.
"""

import hashlib
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError, one_line
from moe import Experts, GatedMLP, MoE

# On a CPU, oneDNN and ideep each keep what they compile for a bf16 matmul, 0.25 MB, by default for
# the last 1 024 shapes, and an expert has another number of rows in each batch.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "64")


class DispatchPlan(NamedTuple):
    """The routed tokens, sorted by expert, and by token within an expert."""

    token: Tensor | None  # (R,) int64, the token of each row; None: see slot
    expert: Tensor | None  # (R,) int64, ascending
    offsets: Tensor  # (E,) int32, where each expert's stretch ends
    slot: Tensor | None = None  # for the kernels: (N, E) int32, each token's row, -1: none


def dispatch_plan(gates: Tensor) -> DispatchPlan:
    """gates (N, E), 0 = not routed -> the plan. One host sync on a GPU: R must be known.

    For the kernels the rows are listed in `slot` alone, and the sync is left to `permute`.
    """
    if supports_routing(gates):
        slot, offsets = CALL.route(gates.detach().contiguous())
        return DispatchPlan(None, None, offsets, slot)
    return _listed(gates.t() != 0)


def _listed(routed: Tensor) -> DispatchPlan:  # (E, N) bool
    expert, token = routed.nonzero(as_tuple=True)  # both (R,)
    return DispatchPlan(token, expert, routed.sum(dim=1).cumsum(dim=0).int())


def _as_list(plan: DispatchPlan) -> DispatchPlan:
    """A plan made for the kernels, where torch has to do the work after all."""
    return plan if plan.token is not None else _listed(plan.slot.t() >= 0)


def permute(x: Tensor, plan: DispatchPlan, most: int | None = None) -> Tensor:
    """x (N, D) -> (R, D): a copy of its token for every row.

    most: a bound of R, for the kernels alone: (most, D), of which the first R rows are filled, and
    no host sync. Where it is exceeded the run ends.
    """
    if plan.slot is not None and supports_rows(x):
        if most is not None:
            torch._assert_async(plan.offsets[-1] <= most, "a token has more than top_k experts")
        n_rows = int(plan.offsets[-1]) if most is None else most
        return CALL.permute(x.contiguous(), plan.slot, n_rows)
    return x.index_select(0, _as_list(plan).token)


def unpermute(y: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
    """y (R, D) outputs of the experts, gates (N, E) -> (N, D): per token, the gated sum."""
    if plan.slot is not None and supports_rows(y):
        return CALL.unpermute(y.contiguous(), plan.slot, gates.contiguous())
    plan = _as_list(plan)
    weight = gates[plan.token, plan.expert].to(y.dtype)  # (R,)
    out = y.new_zeros(gates.shape[0], y.shape[1])
    return out.index_add(0, plan.token, y * weight[:, None])


class SortedExperts(Experts):
    """moe.Experts, computed for all experts together. `use_sorted_experts` puts it in place."""

    layer: tuple[MoE, ...] = ()  # that these experts are of; in a tuple, so that it is no submodule

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        plan = dispatch_plan(gates)
        out = self.grouped_ffn(permute(x, plan, self.most_rows(x)), plan)  # (R, D)
        return unpermute(out, gates, plan)

    def most_rows(self, x: Tensor) -> int | None:
        """N k, if the router routes a token to at most k experts, and the kernels do all the rest.

        They read none of the rows after the last expert's; torch's ops would.
        """
        router = self.layer[0].router if self.layer else None
        if not getattr(router, "at_most_k", False) or not self.is_fused(x):
            return None
        return len(x) * router.top_k

    def is_fused(self, x: Tensor) -> bool:
        """Do the kernels compute a whole FFN?"""
        if not enabled(x) or hasattr(next(self.children()), "lora_a"):
            return False
        return supports(*_cast(*(t[:0] for t in (x, *self.parameters()))))

    def grouped_ffn(self, rows: Tensor, plan: DispatchPlan) -> Tensor:
        """rows (R, D) in the plan's order -> (R, D), each through its expert's FFN."""
        is_gated = isinstance(self.ffn[0], GatedMLP)
        if self.is_fused(rows):
            function = GatedFFN if is_gated else GeluFFN
            return call(function, *_cast(rows, *self.parameters()), plan.offsets)
        if is_gated:
            hidden = F.silu(_linear(rows, self.gate, plan)) * _linear(rows, self.up, plan)
            return _linear(hidden, self.down, plan)
        hidden = F.gelu(_linear(rows, self.fc1, plan), approximate="tanh")  # (R, F)
        return _linear(hidden, self.fc2, plan)


def use_sorted_experts(model: nn.Module, cls: type[Experts] = SortedExperts) -> None:
    """The hook: every sparse layer's experts are computed by `cls` from now on."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.__class__ = cls
        if isinstance(module, MoE):
            module.experts.layer = (module,)


def place_experts(model: nn.Module, device: torch.device) -> None:
    """For training: the sorted path where it is faster, else the loop.

    Measured on two cores, fp32 weights, forward and backward: the loop takes 0.8 to 1.0 times as
    long with d_ff 512 and 2 048, and 1.2 to 1.4 times with Phi-2's 10 240.
    """
    if device.type != "cpu" or model.config.decoder.d_ff > 4096:
        use_sorted_experts(model)


def _linear(x: Tensor, layer: nn.Module, plan: DispatchPlan) -> Tensor:
    y = grouped_linear(x, layer.weight, getattr(layer, "bias", None), plan)
    if hasattr(layer, "lora_a"):  # engine/lora.py
        low = grouped_linear(x, layer.lora_a, None, plan)
        y = y + layer.lora_scale * grouped_linear(low, layer.lora_b, None, plan)
    return y


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: DispatchPlan) -> Tensor:
    """x (R, D) in the plan's order, weight (E, F, D), bias (E, F) -> (R, F): x_r w[e]' + bias[e].

    torch.nn.functional.grouped_mm where `_has_grouped_mm`; else one matmul per expert that has
    tokens, which is the definition. Computed in the weight's dtype, or in that of autocast.
    """
    x, weight, bias = _cast(x, weight, bias)
    if _has_grouped_mm(x, weight):
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=plan.offsets)
        if y.requires_grad:  # its backward refuses an expanded gradient
            y.register_hook(Tensor.contiguous)
        return y if bias is None else y + bias.index_select(0, _as_list(plan).expert)
    sizes = [end - start for start, end in pairwise([0, *plan.offsets.tolist()])]
    biases = [None] * len(sizes) if bias is None else bias.unbind()
    groups = zip(x.split(sizes), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(*group) for group in groups if len(group[0]) or not len(x)])


def _cast(x: Tensor, *params: Tensor | None) -> list[Tensor | None]:
    """This process's share of parameters, and x, in the dtype that a matmul of them runs in."""
    params = [None if p is None else local(p) for p in params]
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)  # it does not know grouped_mm
    dtype = torch.get_autocast_dtype(kind) if autocast else params[0].dtype
    return [None if t is None else t.to(dtype) for t in (x, *params)]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """For 2 or 4 byte floats in rows that are multiples of 16 bytes, at least one of them.

    Below sm_90, and on CPUs, torch itself loops over the experts, empty ones too: a loop here is
    as good, and for the few rows of an answer's next token twice as fast.
    """
    if x.device.type == "cpu":
        able = torch.is_grad_enabled()
    else:
        able = x.device.type != "mps" and torch.cuda.get_device_capability(x.device) >= (9, 0)
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    return able and aligned and x.dtype != torch.float64 and len(x) > 0


# The CUDA extension. An op has a schema and a gradient; it is computed by cuda/binding.cpp, once
# `build` has loaded it.

SOURCES = Path(__file__).parent / "cuda"
LIBRARY = torch.library.Library("medmoe", "DEF")
SCHEMAS = (
    "route(Tensor gates) -> (Tensor slot, Tensor offs)",
    "permute(Tensor x, Tensor slot, SymInt n_routed) -> Tensor",
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

_enabled: set[str] = set()  # device types that the extension computes for, see choose


def choose(how: str, device: torch.device) -> None:
    """Apply --kernels: "cuda" the extension or a UserError, "torch" not, "auto" where it can be.

    On a GPU that is too old for it, or where it cannot be built, "auto" says so in one line.
    """
    _enabled.discard(device.type)
    if how == "torch" or (how == "auto" and device.type != "cuda"):
        return
    try:
        build(device)
    except UserError as error:
        if how == "cuda":
            raise UserError(f"--kernels cuda: {error}") from error
        print(f"kernels: torch's own, {error}", file=sys.stderr)
        return
    _enabled.add(device.type)


def build(device: torch.device) -> None:
    """Compile cuda/ for this GPU by nvcc, or load what an earlier run has. Raises UserError."""
    if device.type != "cuda":
        raise UserError(f"cuda/ needs a GPU, not {device.type}")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UserError(f"cuda/ needs compute capability 8.0, this GPU has {major}.{minor}")
    from torch.utils import cpp_extension

    target = f"{major}{minor}" + "a" * (major == 9)  # "a": with Hopper's own instructions
    name, arch = f"medmoe_{digest()}_{target}", f"arch=compute_{target},code=sm_{target}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.so").exists():
        print(f"kernels: compiling cuda/ in {folder}, once; about a minute", file=sys.stderr)
    try:
        cpp_extension.load(
            name,
            [str(file) for file in (SOURCES / "binding.cpp", *sorted(SOURCES.rglob("*.cu")))],
            extra_cflags=["-O2", "-std=c++20"],
            extra_cuda_cflags=["-O3", "-std=c++20", f"-gencode={arch}"],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:  # no nvcc, no ninja, a compiler's error
        log = folder / "build.log"
        log.write_text(str(error))
        lines = [line.strip() for line in str(error).splitlines() if re.search(r"\berror\b:", line)]
        why = "; ".join(lines[:1] + lacking_tools()) or one_line(str(error), 300)
        raise UserError(f"cuda/ cannot be built: {why} (all in {log})") from None


def lacking_tools() -> list[str]:
    """What the compilation needs and is not here, or not of torch's version."""
    from torch.utils import cpp_extension

    ours, found = torch.version.cuda, []
    if not cpp_extension.is_ninja_available():
        found.append("ninja is missing: pip install ninja")
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin/nvcc")
    if not nvcc.is_file():
        return [*found, f"nvcc is missing: install the CUDA toolkit {ours}, or set CUDA_HOME"]
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    theirs = re.search(r"release ([\d.]+)", printed)
    if theirs and ours and theirs[1].split(".")[0] != ours.split(".")[0]:
        found.append(f"the toolkit is CUDA {theirs[1]}, torch was built with {ours}")
    return found


def digest() -> str:
    """Of the sources and of torch's version: where one changes, cuda/ is compiled again."""
    files = sorted(file for file in SOURCES.rglob("*.*") if file.suffix != ".md")
    text = torch.__version__.encode() + b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:12]


def enabled(x: Tensor) -> bool:
    """Is the extension in use on this tensor's device?"""
    return x.device.type in _enabled


def supports(*tensors: Tensor | None) -> bool:
    """Can it multiply these? They must be bf16, all widths multiples of 8: 16 bytes."""
    return all(
        enabled(t) and t.dtype == torch.bfloat16 and all(n % 8 == 0 for n in t.shape[1:])
        for t in tensors
        if t is not None
    )


def supports_rows(x: Tensor) -> bool:
    """Can it move the rows of x? In fp32 too."""
    able = x.dtype in (torch.bfloat16, torch.float32)
    return enabled(x) and able and x.shape[-1] * x.element_size() % 16 == 0


def supports_routing(gates: Tensor) -> bool:
    """Can it sort by these? Gates in fp32, as routers give them, of at most 48 experts."""
    return enabled(gates) and gates.dtype == torch.float32 and gates.shape[1] <= 48


# Gradients. Those of permute and unpermute are registered with torch.library. A whole FFN is one
# autograd.Function, which chooses what to keep for backward and what to recompute.


def _permute_backward(ctx, grad):
    return CALL.unpermute(grad.contiguous(), *ctx.saved_tensors, None), None, None


def _unpermute_backward(ctx, grad):
    y, slot, gates = ctx.saved_tensors
    grad = grad.contiguous()
    if gates is None:
        return CALL.permute(grad, slot, y.shape[0]), None, None
    dy, dgates = CALL.unpermute_grad(grad, y, slot, gates)
    return dy, None, dgates


torch.library.register_autograd(
    "medmoe::permute", _permute_backward, lib=LIBRARY,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)  # fmt: skip
torch.library.register_autograd(
    "medmoe::unpermute", _unpermute_backward, lib=LIBRARY,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)  # fmt: skip


def forward(x, w, bias, offs, activation=PLAIN, up=None) -> list[Tensor]:
    """x (R, D), w (E, F, D) -> (R, F): act(x_r w[e]' + bias[e]), and the input of act."""
    return CALL.gmm(FORWARD, activation, x, w, up, bias, None, None, offs)


def input_grad(dy, w, offs, activation=PLAIN, z=None, u=None) -> list[Tensor]:
    """dy (R, F), w (E, F, D) -> (R, D): dy_r w[e], through the derivative of act at z, u."""
    return CALL.gmm(INPUT_GRAD, activation, dy, w, None, None, z, u, offs)


def weight_grad(dy, x, offs) -> Tensor:
    """dy (R, F), x (R, D) -> (E, F, D): dy_e' x_e."""
    return CALL.gmm(WEIGHT_GRAD, PLAIN, dy, x, None, None, None, None, offs)[0]


def bias_grad(dy, offs) -> Tensor:
    """dy (R, F) -> (E, F): the weight gradient where inputs are 1; 8 of them, for alignment."""
    return weight_grad(dy, dy.new_ones(dy.shape[0], 8), offs)[..., 0]


def call(function: type[torch.autograd.Function], *args: Tensor | None) -> Tensor:
    """Apply one of the functions below; they need contiguous arguments."""
    return function.apply(*(None if arg is None else arg.contiguous() for arg in args))


class GeluFFN(torch.autograd.Function):
    """w2[e] gelu(w1[e] x_r + b1[e]) + b2[e], x (R, D), w1 (E, F, D), w2 (E, D, F) -> (R, D).

    Kept for backward: x and z, the input of GELU. Its output is recomputed.
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

    Kept for backward: x, and z and u, the outputs of gate and up.
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
