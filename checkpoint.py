"""Checkpoints: a directory, written completely or not at all, that needs nothing else.

    config.json            the model's dimensions, the flags it was trained with, what was measured
    model.safetensors      every parameter and persistent buffer, under our names
    tokenizer.json         as it came with the decoder
    seen.safetensors       hashes of the images and answers it was trained on
    image_features...      mean and covariance of its images' features (engine/familiar.py)
    router.safetensors     phase 2 only: the router it trained
    trainer.safetensors    unfinished runs only: the optimizer
    processN.safetensors   unfinished runs only: the random generators of process N
    checksums.json         of all these; compared before a file is read

A run's folder holds phase1, phase2, phase3 (finished), phaseN-stepS (to resume from), log.jsonl.
"""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import ModelConfig, UserError, model_config, to_dict
from data import Text
from engine import inference, older
from engine.durable import verify, write_directory
from engine.first_gate import check_routers
from engine.processes import ALONE, Processes, write_tensors
from engine.published import check_config, check_size, fill, meta_model, stored, with_router
from model import MedMoE, make_router
from sources.load import how_read
from sources.records import read_json
from sources.tensorfiles import header, open_tensors


def empty_model(config: ModelConfig, dtype: torch.dtype) -> MedMoE:
    """A model to be filled from a file: only its routers are initialised, which stay in fp32.

    A router may have tensors that no file holds.
    """
    model = meta_model(config).to(dtype).to_empty(device="cpu")
    model.config = config
    with torch.random.fork_rng(devices=[]):  # reading a file changes no random numbers
        for block in model.decoder.blocks:
            if block.is_sparse:
                block.mlp.router = make_router(config, config.moe)
    model.decoder.tie()  # to_empty makes two of what was one
    return model


def save_checkpoint(
    directory: Path, model: nn.Module, config: ModelConfig, info: dict, tokenizer: Path,
    extra: dict[str, dict[str, Tensor]], own: dict[str, Tensor] | None = None,
    processes: Processes = ALONE,
) -> None:  # fmt: skip
    """Write a complete checkpoint or none. Every process calls it.

    extra  {"router": {...}, "trainer": {...}} become further safetensors files
    own    tensors of this process alone
    """
    tensors = {n: t.detach() for n, t in stored(model).items()}
    text = json.dumps({"model": to_dict(config), **info}, indent=1)
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


def read_config(directory: Path) -> tuple[ModelConfig, dict]:
    """config.json of one of our checkpoints -> the model's config and everything else in it."""
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory}: no such directory")
    if phases := sorted(directory.glob("phase[123]")):  # a run's folder
        raise UserError(f"checkpoint {directory}: name one of its phases, as {phases[-1]}")
    verify(directory, "config.json")
    info = read_json(file := directory / "config.json", dict)
    try:
        older.upgrade(info)
        config, flags = model_config(info.pop("model")), info["flags"]
        if not isinstance(info["phase"], int) or not isinstance(flags["seed"], int):
            raise TypeError("phase and seed must be numbers")
        if not isinstance(flags["preset"], str):
            raise TypeError("preset must be a name")
        if not all(isinstance(question, str) for question in info.get("questions", [])):
            raise TypeError("questions must be texts")
        if not isinstance(info.get("run", {}), dict):
            raise TypeError("run must be an object")
        how_read(flags, file)  # only to check them
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a checkpoint of this project: {error}") from error
    check_config(file, config)
    check_size(directory, config)
    return config, info


def load_checkpoint(model: nn.Module, directory: Path) -> None:
    """Fill every parameter and persistent buffer from model.safetensors, each exactly once.

    Raises UserError, before anything is filled, if any file of the checkpoint is not as written.
    """
    verify(directory)
    if older.has_residual(header(file := directory / "model.safetensors")):
        older.add_residual(model)
    try:
        fill(model, "", open_tensors(file), table=None)
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: {error.args[0]}") from error


def load_model(
    directory: Path, device: torch.device, dtype: torch.dtype | None = None,
    router: str | None = None, level: str = "trained",
) -> tuple[MedMoE, Text, dict]:  # fmt: skip
    """-> the model, ready to answer, its tokenizer, and the rest of config.json.

    dtype    of its matmuls: torch.float32 widens weights that are stored in less; bfloat16 casts
             those that only matmuls read; None leaves all as stored
    router   replaces the checkpoint's; same parameters. One of the user's own must be given again
    level    "token", "sequence" or "once" replaces the one it was trained with
    """
    config, info = read_config(directory)
    if router is not None and config.moe is None:
        raise UserError(f"--router {router}: {directory} is dense")
    config = with_router(directory, config, info, router)
    if level != "trained" and config.moe is not None:
        config = replace(config, moe=replace(config.moe, level=level))
    stored_as = header(directory / "model.safetensors").get("decoder.embed.weight")
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored_as)
    try:
        is_narrow = narrow is not None and dtype != torch.float32
        model = empty_model(config, narrow) if is_narrow else MedMoE(config)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{directory / 'config.json'}: not a possible model: {error}") from error
    load_checkpoint(model, directory)
    inference.prepare(model, device, dtype)
    check_routers(model)
    return model, Text(directory / "tokenizer.json", config.decoder.vocab_size), info


def read_seen(directory: Path) -> Tensor | None:
    """Hashes of what it was trained on, for scoring/leaks.py; None if the checkpoint has none."""
    file = directory / "seen.safetensors"
    if not file.is_file():
        return None
    verify(directory, file.name)
    tensors = dict(open_tensors(file))
    if "pairs" in tensors:  # an older version's, in another form
        return None
    rows = tensors.get("rows")
    if rows is None or rows.dtype != torch.int64 or rows.shape[1:] != (6,):
        raise UserError(f"{file}: not a record of what was seen in training")
    return rows
