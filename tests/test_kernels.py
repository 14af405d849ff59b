"""The extension as an op of torch, and how it is chosen: python -m pytest tests/test_kernels.py"""

import copy
import itertools
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils import cpp_extension

import ops
from config import UserError
from engine.lora import add_to_ffn
from tests import cuda_on_cpu
from tests.conftest import FFNS, randn, shake

HALF = torch.bfloat16
CUDA = Path(ops.__file__).parent / "cuda"
GATES = randn(40, 3, seed=5) * (randn(40, 3, seed=5) > 0.3)


@pytest.fixture(name="enabled")
def _enabled(monkeypatch):
    """The extension computes CPU tensors, as if --kernels had been applied to a GPU."""
    if why := cuda_on_cpu.missing():
        pytest.skip(f"kernels on a CPU: {why}")
    cuda_on_cpu.Machine(cuda_on_cpu.compiled())
    monkeypatch.setattr(ops, "_enabled", {"cpu"})


def through(layer, x, autocast=False):
    """The output, and the gradients of everything that has one."""
    x, gates = x.clone().requires_grad_(), GATES.clone().requires_grad_()
    with torch.autocast("cpu", HALF) if autocast else nullcontext():
        y = layer(x, gates)
    (y.float() * randn(*y.shape, seed=9)).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y, "x": x.grad, "gates": gates.grad * (gates != 0)} | grads


@FFNS
@pytest.mark.parametrize("rank", [0, 4])  # of LoRA
@pytest.mark.parametrize("dtype", [HALF, torch.float32])  # the latter under autocast
def test_the_layer_and_all_its_gradients_are_those_of_torch(ffn, rank, dtype, enabled, monkeypatch):
    assert ops.dispatch_plan(GATES).slot is not None  # or nothing was tested
    layer, autocast = ops.SortedExperts(ffn(16, 24), 3), dtype == torch.float32
    if rank:
        add_to_ffn(layer, rank)
    layer, x = shake(layer).to(dtype), randn(40, 16, dtype=dtype)
    twin, exact = copy.deepcopy(layer), copy.deepcopy(layer).float()
    ours = through(layer, x, autocast)
    monkeypatch.setattr(ops, "_enabled", set())
    theirs, exact = through(twin, x, autocast), through(exact, x.float())
    assert len(exact) == 3 + len(list(layer.parameters()))
    for name, expected in exact.items():
        off, torchs_off = ((found[name].float() - expected).norm() / expected.norm()
                           for found in (ours, theirs))  # fmt: skip
        assert ours[name].dtype == theirs[name].dtype, name
        assert torchs_off < 0.02 and off < 0.02, name
        assert off < 1.1 * torchs_off + 1e-3, name  # no worse than torch in bf16


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


def test_nothing_is_compiled_where_it_was_not_chosen_or_cannot_run(gpu, capsys):
    ops.choose("auto", torch.device("cpu"))
    ops.choose("torch", torch.device("cuda"))
    assert capsys.readouterr() == ("", "")
    older = gpu(7, 5)
    ops.choose("auto", older)
    (printed,) = capsys.readouterr().err.splitlines()
    assert "torch" in printed and "this GPU has 7.5" in printed
    for device, why in ((older, "this GPU has 7.5"), (torch.device("cpu"), "needs a GPU, not cpu")):
        with pytest.raises(UserError, match=f"--kernels cuda: .*{why}"):
            ops.choose("cuda", device)
    assert not ops._enabled


def test_what_is_built_is_used_and_a_compilers_error_printed_in_one_line(gpu, capsys, tmp_path):
    text = "Error building extension: [1/4] nvcc\n gmm.cu(31): error: no such name\nninja: stopped"
    ops.choose("auto", gpu(9, 0, load=Mock(side_effect=RuntimeError(text))))
    progress, message = capsys.readouterr().err.splitlines()
    (log,) = tmp_path.rglob("build.log")
    assert "compiling cuda/" in progress and log.read_text() == text and not ops._enabled
    assert "gmm.cu(31): error: no such name" in message and str(log) in message
    for capability, target in (((9, 0), "90a"), ((8, 6), "86"), ((12, 0), "120")):
        load = Mock()
        ops.choose("auto", gpu(*capability, load=load))
        assert ops._enabled == {"cuda"}
        ((name, sources), options) = load.call_args
        assert ops.digest() in name and name.endswith(target)
        assert {*map(Path, sources)} == {CUDA / "binding.cpp", *CUDA.rglob("*.cu")}
        assert f"-gencode=arch=compute_{target},code=sm_{target}" in options["extra_cuda_cflags"]
    ops.choose("torch", torch.device("cuda"))
    assert not ops._enabled


def test_where_no_gpu_can_be_simulated_a_gpu_is_tested_all_the_same():
    fake = "import platform, pytest, torch.cuda as c; platform.machine = lambda: 'aarch64';"
    fake += "c.is_available, c.get_device_capability = lambda: True, lambda *_: (9, 0);"
    fake += "raise SystemExit(pytest.main(['-qx', 'tests/test_cuda.py', '-k', 'gpu']))"
    done = subprocess.run([sys.executable, "-c", fake], cwd=CUDA.parent, capture_output=True)
    assert done.returncode and b"1 error" in done.stdout and b"skipped" not in done.stdout


def nvcc(*words):
    done = subprocess.run(["nvcc", "-c", "-std=c++20", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_nvcc_compiles_kernels_and_binding_without_spills_or_warnings(tmp_path):
    out = ["-o", str(tmp_path / "out.o")]
    sources = [*CUDA.rglob("*.cu")]
    assert len(sources) == 6

    def compile_one(job):
        target, source = job
        arch = f"arch=compute_{target},code=sm_{target}"
        made = str(tmp_path / f"{source.stem}{target}.o")
        return nvcc("-Xptxas", "-v", str(source), "-gencode", arch, "-o", made)

    jobs = [*itertools.product(("80", "86", "89", "90a", "100", "120"), sources)]
    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(compile_one, jobs)]
    assert len(results) == 36
    for (_, source), printed in zip(jobs, results, strict=True):
        none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        n_kernels = 1 if source.stem in ("naive", "tiles", "tensor_cores") else 7
        assert printed.count("Compiling entry function") == n_kernels == printed.count(none)
        assert not re.search(r"warning|C75\d\d|serializ", printed)
    # torch without CUDA has the headers all the same, but for one that its build would make.
    include = Path(torch.__file__).parent / "include"
    more = ["-I", str(include), "-I", str(include / "torch/csrc/api/include"), *out]
    nvcc("-x", "c++", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", str(CUDA / "binding.cpp"), *more)
