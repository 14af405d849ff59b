"""The extension as an op of torch, and how it is chosen: python -m pytest tests/test_kernels.py

opcheck, autograd, the sparse layer on top of it, --kernels, the build, and nvcc.
"""

import copy
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import ops
from config import UserError
from moe import MLP, GatedMLP
from ops import SortedExperts
from tests import cuda_on_cpu

CUDA = Path(ops.SOURCES)
needs_stand_in = pytest.mark.skipif(
    cuda_on_cpu.missing() is not None, reason=f"kernels on a CPU: {cuda_on_cpu.missing()}"
)
FFNS = pytest.mark.parametrize("ffn", [MLP, GatedMLP])
OFFS = torch.tensor([3, 3, 20], dtype=torch.int32)


@pytest.fixture(name="enabled")
def _enabled(monkeypatch):
    """The extension computes CPU tensors, as if --kernels had been applied to a GPU."""
    cuda_on_cpu.Machine(cuda_on_cpu.compiled())
    monkeypatch.setattr(ops, "_enabled", {"cpu"})


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# The ops in torch


@needs_stand_in
def test_schemas_and_gradients_pass_opcheck(enabled):
    gates = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    slot, _ = ops.CALL.route(gates)
    x, y = randn(2, 8).requires_grad_(), randn(3, 8).requires_grad_()
    a, b, w = randn(20, 16), randn(20, 24), randn(3, 24, 16)
    call, none = ops.CALL, [None] * 4
    differentiable = (
        (call.route, (gates,)),
        (call.permute, (x, slot, 3)),
        (call.unpermute, (y, slot, gates.clone().requires_grad_())),
        (call.gmm, (ops.FORWARD, ops.SILU, a, w, w, None, None, None, OFFS)),
    )
    for op, args in differentiable:
        tests = ("test_schema", "test_autograd_registration")
        torch.library.opcheck(op.default, args, test_utils=tests)
    for op, args in (
        (call.unpermute, (y, slot, None)),
        (call.unpermute_grad, (x.detach(), y.detach(), slot, gates)),
        (call.gmm, (ops.FORWARD, ops.PLAIN, a, w, *none, OFFS)),
        (call.gmm, (ops.INPUT_GRAD, ops.GELU, b, w, None, None, a, None, OFFS)),
        (call.gmm, (ops.WEIGHT_GRAD, ops.PLAIN, b, a, *none, OFFS)),
    ):
        torch.library.opcheck(op.default, args, test_utils="test_schema")


def layer_and_plan(ffn, gates):
    torch.manual_seed(0)
    layer = SortedExperts(ffn(16, 24), 3)
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return layer.bfloat16(), ops.dispatch_plan(gates)


GATES = torch.rand(40, 3, generator=torch.Generator().manual_seed(5))
GATES = GATES * (GATES > 0.4)


def through(layer, x, gates):
    """The output of the experts, and the gradients of everything that has one."""
    x, gates = leaves(x, gates)
    y = layer(x, gates)
    (y.float() * randn(*y.shape, seed=9).float()).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y, "x": x.grad, "gates": gates.grad * (gates != 0)} | grads


@needs_stand_in
@FFNS
def test_the_layer_and_all_its_gradients_are_those_of_torch(ffn, enabled, monkeypatch):
    layer, plan = layer_and_plan(ffn, GATES)
    assert plan.slot is not None  # or nothing was tested
    twin, exact = copy.deepcopy(layer), copy.deepcopy(layer).float()
    ours = through(layer, randn(40, 16), GATES)
    monkeypatch.setattr(ops, "_enabled", set())
    theirs = through(twin, randn(40, 16), GATES)
    exact = through(exact, randn(40, 16).float(), GATES)
    assert {"y", "x", "gates"} < exact.keys()
    for name, expected in exact.items():
        scale = expected.norm()
        ours_off = (ours[name].float() - expected).norm() / scale
        theirs_off = (theirs[name].float() - expected).norm() / scale
        assert ours_off < 0.02, name
        assert ours_off < 1.1 * theirs_off + 1e-3, name  # no worse than torch's own in bf16


@needs_stand_in
@FFNS
@pytest.mark.parametrize("rank", [8, 4])  # 4: not what the kernels multiply, and torch does it
def test_a_layer_with_lora_works_too(ffn, rank, enabled, monkeypatch):
    layer, _ = layer_and_plan(ffn, GATES)
    for i, part in enumerate(layer.children()):
        n_experts, n_out, n_in = part.weight.shape
        part.lora_a = torch.nn.Parameter(randn(n_experts, rank, n_in, seed=i))
        part.lora_b = torch.nn.Parameter(randn(n_experts, n_out, rank, seed=-i))
        part.lora_scale = 0.1
    x = randn(40, 16)
    ours = layer(x, GATES)
    monkeypatch.setattr(ops, "_enabled", set())
    theirs = layer(x, GATES)
    assert (ours - theirs).norm() / theirs.norm() < 0.02


@needs_stand_in
def test_under_autocast_the_gradients_come_back_in_fp32(enabled):
    layer, _ = layer_and_plan(MLP, GATES)
    layer.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(randn(40, 16, dtype=torch.float32), GATES)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


@needs_stand_in
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_go_through_torch_although_the_plan_was_the_kernels(enabled, dtype):
    layer, plan = layer_and_plan(MLP, GATES)
    layer, x = layer.to(dtype), randn(40, 16).to(dtype)
    rows = ops.permute(x, plan)
    y = ops.unpermute(layer.grouped_ffn(rows, plan), GATES, plan)
    by_hand = ops.DispatchPlan(*ops._as_list(plan)[:3])
    assert torch.equal(
        y, ops.unpermute(layer.grouped_ffn(x[by_hand.token], by_hand), GATES, by_hand)
    )


# --kernels


@FFNS
def test_where_it_was_not_chosen_nothing_is_cast_for_it(ffn, monkeypatch):
    layer, _ = layer_and_plan(ffn, GATES)
    casts, cast = [], ops._cast
    monkeypatch.setattr(ops, "_cast", lambda *tensors: casts.append(tensors) or cast(*tensors))
    layer(randn(40, 16), GATES)
    assert len(casts) == len(list(layer.children()))


def test_nothing_is_compiled_where_it_was_not_chosen(capsys):
    ops.choose("auto", torch.device("cpu"))
    ops.choose("torch", torch.device("cuda"))
    assert not ops.supports(randn(8, 8)) and capsys.readouterr() == ("", "")


def test_on_a_cpu_cuda_is_refused():
    with pytest.raises(UserError, match="--kernels cuda: cuda/ needs a GPU, not cpu"):
        ops.choose("cuda", torch.device("cpu"))


@pytest.fixture(name="gpu")
def _gpu(monkeypatch, tmp_path):
    """A GPU of some capability, as far as ops.choose can find out, and an empty build folder."""
    monkeypatch.setattr(ops, "_enabled", set())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def make(*capability, load=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cpp_extension, "load", load)
        return torch.device("cuda")

    return make


def test_on_another_gpu_auto_prints_in_one_line_why_it_uses_torch(gpu, capsys):
    device = gpu(8, 0)
    ops.choose("auto", device)
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["kernels: torch's own, cuda/ is made for compute capability 9.0 (Hopper), "
                    "this GPU has 8.0"]  # fmt: skip
    with pytest.raises(UserError, match="this GPU has"):
        ops.choose("cuda", device)


LOG = """Error building extension 'medmoe': [1/4] nvcc -c gmm.cu
In file included from gmm.cu:9:
gmm.cu(31): error: identifier "offset" is undefined
1 error detected in the compilation of "gmm.cu".
ninja: build stopped: subcommand failed.
"""


def test_a_compilers_error_is_printed_in_one_line_with_the_path_of_its_log(gpu, capsys, tmp_path):
    def load(*args, **kwargs):
        raise RuntimeError(LOG)

    ops.choose("auto", gpu(9, 0, load=load))
    progress, message = capsys.readouterr().err.splitlines()
    assert "compiling cuda/" in progress
    assert 'gmm.cu(31): error: identifier "offset" is undefined' in message
    (log,) = tmp_path.rglob("build.log")
    assert str(log) in message and log.read_text() == LOG
    assert not ops._enabled


def test_what_is_built_is_used_on_the_gpu_until_torch_is_chosen(gpu):
    calls = []
    device = gpu(9, 0, load=lambda *args, **kwargs: calls.append((args, kwargs)))
    ops.choose("auto", device)
    assert ops._enabled == {"cuda"}
    ((name, sources), options) = calls[0]
    assert ops.digest() in name and all(Path(source).is_file() for source in sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in options["extra_cuda_cflags"]
    ops.choose("torch", device)
    assert not ops._enabled


# The compiler


def nvcc(source, target, folder):
    """Compiles for sm_{target}; returns the output of ptxas."""
    command = ["nvcc", "-c", "-std=c++20", "-Xptxas", "-v", str(CUDA / source)]
    command += ["-gencode", f"arch=compute_{target},code=sm_{target}"]
    command += ["-o", str(folder / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("target", ["90a", "80"])
@pytest.mark.parametrize("source", ["permute.cu", "gmm.cu"])
def test_nvcc_compiles_it_without_spills_or_warnings(tmp_path, source, target):
    printed = nvcc(source, target, tmp_path)
    assert printed.count("Compiling entry function") == 7
    no_spills = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert printed.count(no_spills) == 7
    assert not re.search(r"warning|C75\d\d|serializ", printed)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("cuobjdump")), reason="no nvcc or cuobjdump here"
)
def test_the_matmuls_machine_code_uses_the_tensor_cores_and_the_copy_engine(tmp_path):
    nvcc("gmm.cu", "90a", tmp_path)
    sass = subprocess.run(
        ["cuobjdump", "-sass", str(tmp_path / "out.o")], capture_output=True, text=True, check=True
    ).stdout
    assert "HGMMA.64x256x16" in sass and "UTMALDG" in sass
    assert "LDL" not in sass and "STL" not in sass


@pytest.mark.slow
@needs_nvcc
def test_nvcc_compiles_the_binding(tmp_path):
    # torch without CUDA has the headers all the same, but for one that its build would make.
    torch_folder = Path(torch.__file__).parent
    command = ["nvcc", "-x", "c++", "-std=c++20", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-c"]
    command += [str(CUDA / "binding.cpp"), "-o", str(tmp_path / "out.o")]
    for folder in ("include", "include/torch/csrc/api/include"):
        command += ["-I", str(torch_folder / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
