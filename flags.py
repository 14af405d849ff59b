"""Command-line flags made from dataclasses, those that all scripts share and those of train.py.

Every field is a flag, in kebab-case; a mistake is one line on stderr and exit code 2.
"""

import argparse
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from config import PRESETS, UserError
from records import one_line


def flag(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help, **extra})


def argument(help: str, optional: bool = False) -> Any:
    """A positional argument: a field without default, or with None where it may be left out."""
    default = {"default": None} if optional else {}
    return field(metadata={"help": help, "positional": True}, kw_only=True, **default)


@dataclass(frozen=True)
class Common:
    """Flags that mean the same in every script."""

    data: tuple[str, ...] = flag((), "SOURCE, SOURCE@WEIGHT; may be repeated (sources.py has all)")
    max_missing: int = flag(0, "image files of a source that may be missing")
    image_folder: str | None = flag(None, "where the images of llava:FILE.json lie")
    router_labels: str | None = flag(
        None, 'FILE.json with {"image": "CT", ...}, instead of the source\'s'
    )
    lang: Literal["en", "zh", "all"] = flag("en", "language of SLAKE's questions")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "matmul precision")
    kernels: Literal["auto", "torch", "cuda"] = flag("auto", "the experts': cuda/ on a Hopper GPU")
    seed: int = flag(0, "seeds weights, order and dropout; not the data")
    batch_size: int | None = flag(None, "samples a step (default: the phase's)")
    json: str | None = flag(None, "also write the results to this FILE")


@dataclass(frozen=True)
class TrainConfig(Common):
    phase: Literal[1, 2, 3] = flag(3, "1 alignment, 2 instruction tuning + router, 3 MoE tuning")
    preset: str = flag("tiny", "one of " + ", ".join(PRESETS))
    init: str | None = flag(None, "start from this checkpoint DIR instead of the phase before")
    out: str | None = flag(None, "output DIR (default: runs/PRESET)")
    clip: str | None = flag(None, "pretrained CLIP tower DIR (default: the preset's)")
    llm: str | None = flag(None, "pretrained decoder and tokenizer DIR (default: the preset's)")
    router: str = flag("modality", "modality, topk, random, oracle, or FILE.py:Class")
    router_level: Literal["token", "sequence"] = flag("token", "a decision a token, or a sample")
    router_images: int = flag(1000, "images whose modality label trains the router")
    router_noise: float = flag(0.0, "share of those labels that are made wrong")
    experts: int = flag(4, "experts in a sparse block; 0: it stays dense, and trains as it is")
    top_k: int = flag(2, "experts a token visits")
    meta: bool = flag(True, "an expert that all tokens visit")
    moe_layers: str = flag(
        "every-second", "sparse blocks: every-second, first-half, second-half, all, or 0,2,..."
    )
    start: Literal["preserving", "released", "fresh"] = flag(
        "preserving", "phase 3 at step 0: see README"
    )
    trains: Literal["paper", "released"] = flag("paper", "what phase 3 trains: see README")
    balance: float = flag(0.0, "weight of the load-balancing loss")
    z_loss: float = flag(0.0, "weight of the router z-loss")
    tune_vision: bool | None = flag(
        None, "train the tower in phases 1, 2 (default: only if it was pretrained on other data)"
    )
    jitter: bool | None = flag(None, "vary the pictures a little (default: as --tune-vision)")
    lr: float | None = flag(None, "peak learning rate (default: the phase's)")
    epochs: float | None = flag(None, "passes over the data (default: the phase's)")
    steps: int | None = flag(None, "optimizer steps; overrides --epochs")
    accumulate: int = flag(1, "micro-batches a step; each holds batch_size / accumulate samples")
    clip_grad: float = flag(1.0, "largest gradient norm; 0: no clipping")
    workers: int = flag(2, "threads that read the pictures of the next batches")
    cache_features: bool = flag(False, "keep what the frozen tower says of a picture on disk")
    cache_gb: float = flag(20.0, "largest size of that cache")
    compile: bool = flag(False, "compile the blocks with torch.compile")
    activation_checkpointing: bool = flag(
        False, "compute a block's activations again in backward instead of keeping them"
    )
    weights: Literal["float32", "bf16", "bf16-stochastic"] = flag(
        "float32", "kept so; bf16: with fp32 copies of what is trained, or rounded by chance"
    )
    lora_rank: int = flag(0, "train low-rank additions to the FFNs in phases 2 and 3; 0: none")
    expert_parallel: int = flag(1, "processes that share the experts between them (torchrun)")
    save_every: int = flag(200, "steps between checkpoints")
    keep: int = flag(2, "how many of an unfinished run's checkpoints stay")
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    eval: bool = flag(True, "score the held-out split at the end")


def parse(cls: type, argv: Sequence[str] | None, prog: str) -> Any:
    """Command line -> an instance of the dataclass `cls`; its fields are the flags, kebab-case.

    Raises UserError for anything that is not one of them.
    """
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    for f in fields(cls):
        kind: dict[str, Any] = {"help": f.metadata.get("help")}
        if f.metadata.get("positional"):
            if get_origin(f.type) is Literal:
                kind["choices"] = get_args(f.type)
            nargs = "+" if get_origin(f.type) is tuple else None if f.default is MISSING else "?"
            parser.add_argument(f.name, nargs=nargs, **kind)
            continue
        options = get_args(f.type)
        kind["metavar"] = f.name.split("_")[-1].upper()
        if get_origin(f.type) is UnionType:  # int | None: the flag is an int
            base = options[0]
            if get_origin(base) is tuple:  # tuple[str, str] | None: two words
                kind["nargs"], base = len(get_args(base)), get_args(base)[0]
        elif get_origin(f.type) is Literal:
            base, kind["choices"] = type(options[0]), options
            del kind["metavar"]
        elif get_origin(f.type) is tuple:
            base, kind["action"] = options[0], "append"
        else:
            base = f.type
        if base is bool:
            kind["action"] = argparse.BooleanOptionalAction
            del kind["metavar"]
        else:
            kind["type"] = base
        default = None if kind.get("action") == "append" else f.default
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, **kind)
    values = vars(parser.parse_args(argv))
    repeated = {f.name for f in fields(cls) if get_origin(f.type) is tuple}
    return cls(**{k: tuple(v or ()) if k in repeated else v for k, v in values.items()})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help lists every flag)")


def reading(flags: Common) -> dict[str, Any]:
    """How to read --data, as the keywords of sources.load_samples."""
    names = ("lang", "max_missing", "image_folder", "router_labels")
    return {name: getattr(flags, name) for name in names}


# What says which questions were asked, as checkpoints and results keep it.
READING = {"data": (list, tuple), "lang": str, "max_missing": int, "image_folder": str,
           "router_labels": str, "split": str, "limit": int}  # fmt: skip


def how_read(values: Any, file: Path) -> dict[str, Any]:
    """What a checkpoint's flags or a result of eval.py say about their data; some may be missing.

    Raises UserError for a field of another kind. Older checkpoints have a number in router_labels.
    """
    found = {}
    for name, kind in READING.items():
        value = values.get(name) if isinstance(values, dict) else None
        if value is None or (name == "router_labels" and isinstance(value, int)):
            continue
        is_right = isinstance(value, kind)
        if is_right and name == "data":
            is_right = all(isinstance(spec, str) for spec in value)
        if not is_right:
            raise UserError(f'{file}: field "{name}" {value!r} is of the wrong kind')
        found[name] = tuple(value) if name == "data" else value
    for name, allowed in (("lang", ("en", "zh", "all")), ("split", ("train", "val", "test"))):
        if found.get(name, allowed[0]) not in allowed:
            raise UserError(f'{file}: field "{name}" must be one of {", ".join(allowed)}')
    return found


def at_least(flags: Common, **least: int) -> None:
    """Raise UserError for a number below its least value; None is the default and passes."""
    for name, minimum in least.items():
        if (value := getattr(flags, name)) is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")


def check_sparse(flags: TrainConfig) -> None:
    """Raise UserError for flags of the sparse blocks that exclude each other."""
    if flags.experts == 0 and (flags.lora_rank or flags.trains == "released"):
        raise UserError("--experts 0: trains its FFNs whole, without --lora-rank or --trains")
    if flags.start == "fresh" and not flags.meta:
        raise UserError("--start fresh: only the meta expert knows anything then, not --no-meta")
    if flags.trains == "released" and flags.moe_layers == "all":
        raise UserError("--trains released: trains dense FFNs too, --moe-layers all leaves none")
    if not 0 <= flags.router_noise <= 1:
        raise UserError(f"--router-noise {flags.router_noise}: must be from 0 to 1")


def check_writable(file: Path) -> None:
    """Before long work: raise UserError where its result could not be written."""
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UserError(f"{file}: cannot be written there")


def user_errors(main: Callable) -> Callable:
    """Wrap a script's main(argv): a UserError becomes one line on stderr and exit code 2.

    So does Ctrl-C, with exit code 130.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a file's name need not be text
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except UserError as error:
            told = str(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # whoever reads our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(1) from None
        except OSError as error:  # a name too long, a full disk, no permission
            told = f"{error.filename or main.__module__}: {error.strerror or error}"
        print(f"error: {one_line(told)}", file=sys.stderr)
        raise SystemExit(2)

    return wrapped


def command_line(cls: type, values: dict, prog: str) -> str:
    """The command whose flags are these: what differs from the defaults of the dataclass."""
    words = ["python", prog]
    for f in fields(cls):
        value, name = values.get(f.name, f.default), "--" + f.name.replace("_", "-")
        value = tuple(value) if isinstance(value, list) else value
        if value == f.default or value is None:
            continue
        if f.name == "router_labels" and isinstance(value, int):
            continue  # an older checkpoint's --router-images
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            for part in value if isinstance(value, tuple) else (value,):
                words += [name, str(part)]
    return shlex.join(words)


def write_json(path: Path, values: Any) -> None:
    """For --json FILE. Raises UserError where it cannot be written."""
    write_text(path, json.dumps(values, indent=1) + "\n", "--json")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records), "--answers")


def write_text(path: Path, text: str, name: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{name} {path}: {error.strerror}") from error
