"""Checkpoints of our own: a directory, written whole or not at all, that needs nothing beside it.

    config.json            the model's dimensions, the flags it was trained with, what was measured
    model.safetensors      every parameter and persistent buffer, under our names
    tokenizer.json         as it came with the decoder
    seen.safetensors       hashes of the pictures and answers it was trained on
    router.safetensors     phase 2 only: the router it trained
    trainer.safetensors    unfinished runs only: the optimizer
    processN.safetensors   unfinished runs only: the random generators of process N
    checksums.json         of all these; whoever reads one of them compares it first

A run's folder holds phase1, phase2, phase3 (finished) and phaseN-stepS (to go on from), log.jsonl.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import ModelConfig, UserError, model_config, to_dict
from data import Text
from engine.durable import verify, write_directory
from engine.processes import ALONE, Processes
from flags import how_read
from model import MedMoE, empty_model
from moe import Experts
from tensorfiles import open_tensors, read_json, tensor_dtype
from weights import fill, stored


def write_whole(values: dict[str, Tensor], file: Path) -> None:
    """One safetensors file, from whatever device."""
    save_file({name: t.cpu().contiguous() for name, t in values.items()}, file)


def save_checkpoint(
    directory: Path, model: nn.Module, config: ModelConfig, meta: dict, tokenizer: Path,
    extra: dict[str, dict[str, Tensor]],
    own: dict[str, Tensor] | None = None,
    write_tensors: Callable[[dict[str, Tensor], Path], None] = write_whole,
    processes: Processes = ALONE,
) -> None:  # fmt: skip
    """Write a whole checkpoint or none. Every process calls it.

    extra          {"router": {...}, "trainer": {...}} become further safetensors files
    own            tensors that each process has for itself
    write_tensors  called in every process for model and extra; one file must come of it
    """
    tensors = {n: t.detach() for n, t in stored(model).items()}
    text = json.dumps({"model": to_dict(config), **meta}, indent=1)
    by_all = {
        f"{name}.safetensors": partial(write_tensors, values)
        for name, values in {"model": tensors, **extra}.items()
    }
    if own is not None:
        by_all[f"process{processes.rank}.safetensors"] = partial(save_file, own)
    by_first = {
        "tokenizer.json": partial(shutil.copyfile, tokenizer),
        "config.json": lambda path: path.write_text(text),
    }
    write_directory(directory, by_all, by_first, processes)


def read_meta(directory: Path) -> tuple[ModelConfig, dict]:
    """config.json of one of our checkpoints -> the model's config and everything else in it."""
    if not directory.is_dir():
        old = directory.with_name(f".{directory.name}.old")
        hint = f" (but {old}, left by an interrupted save)" if old.is_dir() else ""
        raise UserError(f"checkpoint {directory}: no such directory{hint}")
    verify(directory, "config.json")
    meta = read_json(directory / "config.json")
    try:
        config, flags, phase = model_config(meta.pop("model")), meta["flags"], meta["phase"]
        if not isinstance(phase, int) or not isinstance(flags["seed"] + 0, int):
            raise TypeError("phase and seed must be numbers")
        how_read(flags, directory / "config.json")
        return config, meta
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{directory / 'config.json'}: not a checkpoint of ours: {error}"
        ) from error


def load_checkpoint(
    model: nn.Module, directory: Path, put: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """Fill every parameter and persistent buffer from our model.safetensors, each exactly once.

    put    copies a tensor of the file to its place
    Raises UserError, before anything is filled, if any file of the checkpoint is not as written.
    """
    verify(directory)
    try:
        fill(model, "", open_tensors(directory / "model.safetensors"), table=None, put=put)
    except (KeyError, ValueError) as error:
        raise UserError(f"{directory / 'model.safetensors'}: {error.args[0]}") from error


def narrow_matmuls(model: MedMoE, dtype: torch.dtype) -> None:
    """Once, what autocast would do for every token: same results. Not the routers; they take fp32.

    Tied heads stay too: the embedding reads them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | Experts) and ".router" not in name:
            for param in module.parameters():
                if param is not model.decoder.embed.weight:
                    param.data = param.data.to(dtype)


def load_model(
    directory: Path, device: torch.device, dtype: torch.dtype | None = None,
    router: str | None = None, level: str = "trained",
) -> tuple[MedMoE, Text, dict]:  # fmt: skip
    """-> the model, ready to answer, its tokenizer, and what else config.json says.

    dtype    what its matmuls will run in. torch.float32 makes narrower weights wider, a narrower
             one only those that nothing but matmuls read; None leaves them as they are stored
    router   takes the place of the checkpoint's, as when its file has moved; same parameters
    level    "token" or "sequence": it decides so, however it was trained
    """
    config, meta = read_meta(directory)
    if router is not None and config.moe is None:
        raise UserError(f"--router {router}: {directory} is dense")
    if router is not None:
        config = replace(config, moe=replace(config.moe, router=router))
    if level != "trained" and config.moe is not None:
        config = replace(config, moe=replace(config.moe, level=level))
    stored = tensor_dtype(directory / "model.safetensors", "decoder.embed.weight")
    narrow = stored in (torch.bfloat16, torch.float16) and dtype != torch.float32
    try:
        model = empty_model(config, stored) if narrow else MedMoE(config)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{directory / 'config.json'}: not a possible model: {error}") from error
    load_checkpoint(model, directory)
    if dtype not in (None, torch.float32):
        narrow_matmuls(model, dtype)
    model.eval().to(device)
    for block in model.decoder.blocks:
        block.attn.fuse()
    return model, Text(directory / "tokenizer.json"), meta


def read_seen(directory: Path) -> dict[str, Tensor] | None:
    """What training saw, for benchmarks/leaks.py; None if the checkpoint does not say."""
    file = directory / "seen.safetensors"
    if not file.is_file():
        return None
    verify(directory, file.name)
    seen = dict(open_tensors(file))
    shapes = {"images": 1, "looks": 2, "pairs": 2}
    is_whole = seen.keys() == shapes.keys() and all(
        t.dtype == torch.int64 and t.dim() == shapes[name] for name, t in seen.items()
    )
    if is_whole:
        images, looks, pairs = (seen[name] for name in shapes)
        is_whole = looks.shape == (len(images), 4) and pairs.shape[1] == 2
        is_whole &= bool(((pairs[:, 1:] >= -1) & (pairs[:, 1:] < len(images))).all())
    if not is_whole:
        raise UserError(f"{file}: not a record of what was seen in training")
    return seen
