"""Command lines made from dataclasses, and what all scripts do with a user's mistakes.

Every field is a flag, in kebab-case; a mistake is one line on stderr and exit code 2.
"""

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from config import GROUPS, TrainConfig, UserError, named_layers, one_line, preset
from engine.first_gate import own_errors
from model import choose_device


def parse(cls: type, argv: Sequence[str] | None, prog: str) -> Any:
    """Command line -> an instance of the dataclass `cls`, whose fields are the flags.

    Raises UserError for anything that is not one of them.
    """
    names = [(f.name.upper(), f.default) for f in fields(cls) if f.metadata.get("positional")]
    words = (n if default is MISSING else f"[{n}]" for n, default in names)
    usage = " ".join([prog, *words, "[flags]"])
    parser = _Parser(prog=prog, usage=usage, description=cls.__doc__, allow_abbrev=False)
    groups = {title: parser.add_argument_group(title) for title in GROUPS[1:]} | {"": parser}
    accepted = [f for f in fields(cls) if f.name not in getattr(cls, "lacks", ())]
    for f in sorted(accepted, key=lambda f: GROUPS.index(f.metadata.get("group", ""))):
        outer, inner = get_origin(f.type), get_args(f.type)
        kind: dict[str, Any] = {"help": f.metadata.get("help")}
        if outer is Literal:
            kind |= {"choices": inner, "type": type(inner[0])}
        if f.metadata.get("positional"):
            nargs = "+" if outer is tuple else None if f.default is MISSING else "?"
            parser.add_argument(f.name, nargs=nargs, **kind)
            continue
        kind["default"] = f.default
        if f.type is bool or bool in inner:  # bool | None
            kind["action"] = argparse.BooleanOptionalAction
        elif outer is not Literal:
            kind["metavar"] = f.name.split("_")[-1].upper()
            kind["type"] = inner[0] if inner else f.type  # of int | None, too, the flag is an int
            if outer is tuple:
                kind |= {"action": "append", "default": []}
            elif words := get_args(kind["type"]):  # tuple[str, str] | None: a flag of two words
                kind |= {"nargs": len(words), "type": words[0]}
        groups[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), **kind)
    values = vars(parser.parse_args(argv))
    for f in accepted:
        if type(value := values[f.name]) in (int, float) and value != f.default:
            least, typed = f.metadata.get("least", 0), f"--{f.name.replace('_', '-')} {value}"
            if not least <= value < 2**62:  # a NaN is neither
                raise UserError(f"{typed}: must be a number from {least} up, below 2^62")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help lists every flag)")


def check_training(flags: TrainConfig) -> None:
    """Raise UserError for numbers out of their range, and for flags that exclude each other."""
    decoder = preset(flags.preset).model.decoder
    largest = min(decoder.d_model, decoder.d_ff)
    layers = named_layers(flags.moe_layers, decoder.n_layers)
    if flags.json:
        check_writable(Path(flags.json))
    if flags.weights != "float32" and choose_device(flags.device, flags.dtype)[1].itemsize == 4:
        raise UserError(f"--weights {flags.weights}: needs --dtype bfloat16, not float32")
    if flags.lora_rank > largest:
        raise UserError(f"--lora-rank {flags.lora_rank}: must be from 0 to {largest}, the width")
    if flags.epochs == 0:
        raise UserError("--epochs 0: must be above 0")
    if flags.resume and flags.overwrite:
        raise UserError("--resume, --overwrite: give one of the two")
    if flags.lora_rank and flags.trains == "released":
        raise UserError("--lora-rank: --trains released trains whole FFNs; give one of the two")
    if flags.experts == 0 and (flags.lora_rank or flags.trains == "released"):
        raise UserError("--experts 0: trains its FFNs whole, without --lora-rank or --trains")
    if flags.start == "fresh" and not flags.meta:
        raise UserError("--start fresh: only the meta expert keeps what was trained, not --no-meta")
    if flags.trains == "released" and layers is not None and len(layers) == decoder.n_layers:
        raise UserError("--trains released: trains dense FFNs too, and --moe-layers "
                        f"{flags.moe_layers} leaves none")  # fmt: skip
    if flags.phase == 3 and flags.experts % flags.expert_parallel:
        raise UserError(f"--expert-parallel {flags.expert_parallel}: must divide the "
                        f"{flags.experts} experts")  # fmt: skip
    if flags.router_noise > 1:
        raise UserError(f"--router-noise {flags.router_noise}: must be from 0 to 1")


def check_writable(file: Path) -> None:
    """Before long work: raise UserError where its result could not be written."""
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UserError(f"{file}: cannot be written there")


def check_outputs(written: Sequence[str | None], read: Sequence[str | None]) -> None:
    """The same for several, none of which may be another file of this command."""
    places = [Path(f).absolute() for f in (*written, *read) if f]
    for file in (Path(f) for f in written if f):
        check_writable(file)
        if places.count(file.absolute()) > 1:
            raise UserError(f"{file}: would be written over another file of this command")


def flush_output() -> None:
    """Before leaving; what nobody reads any more, as after `| head`, is dropped."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def user_errors(main: Callable) -> Callable:
    """Wrap a script's main(argv): a UserError becomes one line on stderr and exit code 2.

    So does Ctrl-C, with exit code 130, and output that nobody reads any more, with 141.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # file names may hold bytes that are no text
                stream.reconfigure(errors="backslashreplace")
        try:
            with own_errors():
                return main(argv)
        except UserError as error:
            code, line = 2, f"error: {one_line(str(error))}"
        except KeyboardInterrupt:
            code, line = 130, "interrupted"
        except BrokenPipeError:
            code, line = 141, "stopped: nobody reads the output any more"
        except OSError as error:  # a name too long, a full disk, no permission
            reason = f"{error.filename or main.__module__}: {error.strerror or error}"
            code, line = 2, f"error: {one_line(reason)}"
        finally:
            flush_output()
        with suppress(BrokenPipeError):
            print(line, file=sys.stderr)
        raise SystemExit(code)

    return wrapped


def command_line(cls: type, values: dict, prog: str) -> str:
    """The command that sets these flags: those that differ from the dataclass's defaults."""
    words = ["python", prog]
    for f in fields(cls):
        value, name = values.get(f.name, f.default), f.name.replace("_", "-")
        if isinstance(value, bool) and value != f.default:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value not in (f.default, None):
            for part in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{name}", str(part)]
    return shlex.join(words)


def write_json(path: Path, values: Any) -> None:
    """For --json FILE. Raises UserError where it cannot be written."""
    write_text(path, json.dumps(values, indent=1) + "\n", "--json")


def write_text(path: Path, text: str, name: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} {path}: {error.strerror}") from error
