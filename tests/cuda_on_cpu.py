"""Compiles cuda/ for the CPU, with tests/cuda_on_cpu.h in the GPU's place, and loads it.

The kernels are then what torch calls for CPU tensors of the ops in ops.py.
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
    if not shutil.which("g++"):
        return "no g++ here"
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "fibers are switched in assembly for Linux on x86-64"
    return None


def compiled(cuda: Path = CUDA, header: Path = HERE / "cuda_on_cpu.h") -> Path:
    """The library, compiled once for these sources and this torch. Raises CalledProcessError."""
    torch_folder = Path(torch.__file__).parent
    include = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    headers = [header, *sorted(cuda.glob("*.h")), *sorted(cuda.glob("*.cuh"))]
    objects = []
    for source, more in (
        (cuda / "permute.cu", headers),
        (cuda / "gmm.cu", headers),
        (cuda / "binding.cpp", [cuda / "launchers.h"]),
    ):
        command = ["g++", "-O1", "-std=c++20", "-fPIC", "-DCUDA_ON_CPU", "-x", "c++", "-c"]
        command += ["-Wno-unknown-pragmas", f"-I{header.parent}", f"-I{cuda}"]
        if source.suffix == ".cpp":  # slow because of torch's headers, and little to optimise
            command += ["-O0", *(f"-I{folder}" for folder in include)]
        objects.append(_kept(source, more, command, ".o"))
    link = ["g++", "-shared", *map(str, objects), f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    return _kept(None, objects, link, ".so")


def _kept(source: Path | None, others: list[Path], command: list[str], suffix: str) -> Path:
    """What the command makes, from an earlier run where nothing that it reads has changed."""
    words = [word for word in command if not word.startswith("-I")] + [torch.__version__]
    content = [p.read_bytes() for p in ([source] if source else []) + others]
    key = hashlib.sha256(b"\0".join([" ".join(words).encode(), *content])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"medmoe_on_cpu_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    made = folder / (key + suffix)
    if not made.exists():
        part = folder / f"{key}{os.getpid()}{suffix}"
        inputs = [str(source)] if source else []
        subprocess.run([*command, *inputs, "-o", str(part)], check=True, capture_output=True)
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
