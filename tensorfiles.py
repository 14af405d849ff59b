"""Tensors out of files: safetensors and PyTorch's own, whole or in shards, one tensor at a time.

Nothing in a file is executed, and no more of it is in memory than one tensor. A .bin file is
mapped; only those from before torch 1.6 are read whole.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


def read_json(path: Path) -> dict:
    """Raises UserError for what cannot be read or is not a JSON object."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a published model, safetensors before .bin, shards as indexed."""
    for index, single in zip(INDEXES, SINGLE, strict=True):
        if (directory / index).is_file():
            where = read_json(directory / index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise UserError(f"{directory / index}: its JSON lacks 'weight_map'")
            names = sorted({str(name) for name in where.values()})
            if outside := [name for name in names if Path(name).name != name]:
                raise UserError(f"{directory / index}: {outside[0]!r} is not beside it")
            return [directory / name for name in names]
        if (directory / single).is_file():
            return [directory / single]
    raise UserError(f"{directory / SINGLE[0]}: no such file, nor {SINGLE[1]}")


def tensor_names(directory: Path) -> set[str]:
    """The names that read_tensors will give."""
    found = set()
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            found |= set(header_names(path))
        else:
            found |= {name for name, _ in open_tensors(path)}
    return found


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a Hugging Face directory, one in memory at a time."""
    for path in weight_files(directory):
        yield from open_tensors(path)


def open_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file. Raises UserError if it is missing or damaged."""
    if path.suffix == ".safetensors":
        yield from open_safetensors(path)
    elif path.is_file():
        yield from open_pickle(path)
    else:
        raise UserError(f"{path}: no such file")


def header_names(path: Path) -> list[str]:
    """The tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")  # the library has found it sound
            entries = json.loads(file.read(size), object_pairs_hook=list)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    # The library keeps the last of two entries that have one name.
    stored = [name for name, _ in entries if name != "__metadata__"]
    if len(stored) > len(names):
        double = next(name for name in names if stored.count(name) > 1)
        raise UserError(f"{path}: {double!r} is in its header twice")
    return names


def open_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    names = header_names(path)
    try:
        for key in names:  # opened anew, since what was read stays mapped until it is closed
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(key)
            yield key, tensor
            del tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error


def tensor_dtype(path: Path, name: str) -> torch.dtype | None:
    """What one tensor of a safetensors file is stored as; None if it cannot be told."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).dtype
    except (SafetensorError, OSError):
        return None


def open_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    """A state dict saved by torch.save. Anything but tensors and plain containers is refused."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError, KeyError,
            TypeError, AttributeError, IndexError) as error:  # fmt: skip
        told = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged, or not only tensors: {told}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not named tensors")
    for key in list(state):
        if not isinstance(key, str) or not isinstance(state[key], Tensor):
            raise UserError(f"{path}: {key!r} is not a named tensor")
        yield key, state.pop(key)
