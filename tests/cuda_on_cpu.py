"""Compiles cuda/ for the CPU, cuda_on_cpu.h in the GPU's place: ops.py's ops of CPU tensors.

    python -m tests.cuda_on_cpu 9    one product, 6 slices deep; prints which thread waits for what

9 is cuda/gmm.cu, 8 cuda/ladder/pipelined.cu.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
CUDA = HERE.parent / "cuda"
ORDERS = (0, 1, 2)  # of threads and blocks: forward, reverse, random


def missing() -> str | None:
    """Why it cannot be done here."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "fibers are switched in assembly for Linux on x86-64"
    return None if shutil.which("g++") else "no g++ here"


def compiled() -> Path:
    """The library, compiled once for these sources and this torch. Raises CalledProcessError."""
    torch_folder = Path(torch.__file__).parent
    headers = [HERE / "cuda_on_cpu.h", *sorted(CUDA.rglob("*.h")), *sorted(CUDA.glob("*.cuh"))]
    objects = []
    for path in (*sorted(CUDA.rglob("*.cu")), CUDA / "binding.cpp"):
        flags = ["-O1", "-std=c++20", "-fPIC", "-DCUDA_ON_CPU", "-x", "c++", "-c"]
        flags += ["-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CUDA}"]
        if path.name == "binding.cpp":  # slow because of torch's headers, and little to optimise
            folders = ("include", "include/torch/csrc/api/include")
            flags += ["-O0", *(f"-I{torch_folder / folder}" for folder in folders)]
            headers = [CUDA / "launchers.h"]
        objects.append(_kept([*flags, str(path)], [path, *headers], ".o"))
    link = ["-shared", *map(str, objects), f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    return _kept(link, objects, ".so")


def _kept(flags: list[str], reads: list[Path], suffix: str) -> Path:
    """What g++ makes, from an earlier run where nothing that it reads has changed."""
    words = [torch.__version__, *(word for word in flags if "/" not in word)]  # no paths
    content = [" ".join(words).encode(), *(path.read_bytes() for path in reads)]
    folder = Path(tempfile.gettempdir()) / f"medmoe_on_cpu_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    made = folder / (hashlib.sha256(b"\0".join(content)).hexdigest()[:16] + suffix)
    if not made.exists():
        part = made.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run(["g++", *flags, "-o", str(part)], check=True, capture_output=True)
        part.rename(made)
    return made


def force_major(library: ctypes.CDLL, major: int) -> None:
    """Which grouped matmul: 9 gmm.cu, 8 ladder/pipelined.cu, 0 the one for this device."""
    ctypes.c_int.in_dll(library, "medmoe_major").value = major


class Machine:
    """The library in this process. A test chooses the order of threads, and may run one block."""

    def __init__(self, library: Path):
        torch.ops.load_library(str(library))
        self.library = ctypes.CDLL(str(library))

    def set(self, **values: int) -> None:
        """order, blocks: how many multiprocessors, only: one block, -1 for all; trace: 0, 1."""
        for name, value in values.items():
            ctypes.c_int.in_dll(self.library, f"cuda_on_cpu_{name}").value = value


if __name__ == "__main__":
    import ops

    machine = Machine(compiled())
    force_major(machine.library, int(sys.argv[1]))
    deep = 384 if sys.argv[1] == "9" else 192
    x, w = torch.ones(2, deep, dtype=torch.bfloat16), torch.ones(1, 8, deep, dtype=torch.bfloat16)
    machine.set(blocks=1, only=0, trace=1)
    ops.forward(x, w, None, torch.tensor([2], dtype=torch.int32))
