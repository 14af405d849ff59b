"""Tensors out of files: safetensors and PyTorch's own, whole or in shards, one tensor at a time.

Nothing in a file is executed, and no more of it is in memory than one tensor, or MAX_MAPPED of
small ones. A .bin file is mapped; only those from before torch 1.6 are read whole.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import UserError
from sources.records import read_json, unique_keys

MAX_MAPPED = 64_000_000  # bytes of a file, and the rest of its last tensor, mapped at a time


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a published model, safetensors before .bin, shards as indexed."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if index.is_file():
            where = read_json(index, dict).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise UserError(f"{index}: its JSON lacks 'weight_map'")
            names = sorted({str(name) for name in where.values()})
            if outside := [name for name in names if Path(name).name != name]:
                raise UserError(f"{index}: {outside[0]!r} is not beside it")
            return [directory / name for name in names]
        if (directory / single).is_file():
            return [directory / single]
    raise UserError(f"{directory / 'model.safetensors'}: no such file, nor pytorch_model.bin")


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a Hugging Face directory, one in memory at a time."""
    for path in weight_files(directory):
        yield from open_tensors(path)


def open_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    yield from open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path)


def header(path: Path) -> dict[str, str]:
    """The tensors of a safetensors file and their types: "F32", "BF16" .. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:  # checks it, but keeps one of two same names
            names = list(file.keys())
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            values = json.loads(file.read(size), object_pairs_hook=unique_keys)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    return {name: values[name]["dtype"] for name in names}


def open_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    file, n_mapped = None, 0
    for key in header(path):
        try:
            # All that was read stays mapped until the file is closed; to open it again reads its
            # header again, which for thousands of small tensors would take longer than they do.
            if file is None or n_mapped > MAX_MAPPED:
                file, n_mapped = safe_open(path, framework="pt"), 0
            tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged: {error}") from error
        n_mapped += tensor.nbytes
        yield key, tensor
        del tensor


def open_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    """A state dict saved by torch.save. Anything but tensors and plain containers is refused."""
    try:  # files from before torch 1.6 are not zip files and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # damaged bytes raise nearly any kind
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged, or not only tensors: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not named tensors")
    for key in list(state):
        if not isinstance(key, str) or not isinstance(state[key], Tensor):
            raise UserError(f"{path}: {key!r} is not a named tensor")
        yield key, state.pop(key)
