"""Compiles cuda/ for the CPU, cuda_on_cpu.h in the GPU's place: ops.py's ops of CPU tensors."""

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
    headers = [HERE / "cuda_on_cpu.h", *sorted(CUDA.glob("*.h")), *sorted(CUDA.glob("*.cuh"))]
    objects = []
    for name in ("permute.cu", "gmm.cu", "binding.cpp"):
        flags = ["-O1", "-std=c++20", "-fPIC", "-DCUDA_ON_CPU", "-x", "c++", "-c"]
        flags += ["-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CUDA}"]
        if name == "binding.cpp":  # slow because of torch's headers, and little to optimise
            folders = ("include", "include/torch/csrc/api/include")
            flags += ["-O0", *(f"-I{torch_folder / folder}" for folder in folders)]
            headers = [CUDA / "launchers.h"]
        objects.append(_kept([*flags, str(CUDA / name)], [CUDA / name, *headers], ".o"))
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


class Machine:
    """The library in this process. A test chooses the order of threads, and may run one block."""

    def __init__(self, library: Path):
        torch.ops.load_library(str(library))
        self.library = ctypes.CDLL(str(library))

    def set(self, **values: int) -> None:
        """order, blocks: how many multiprocessors, only: the one block to run, -1 for all."""
        for name, value in values.items():
            ctypes.c_int.in_dll(self.library, f"cuda_on_cpu_{name}").value = value
