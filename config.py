"""Dimensions, presets, the table of phases, and command-line flags made from dataclasses.

The letters used for shapes in the whole project, and their sizes in three presets:

    B batch (image-question pairs)      T decoder positions: text tokens + patches
    S image side       112 / 336 / 336  P patches per image         49 / 576 / 576
    W tower width     128 / 1024 / 1024 D decoder width, d_model 128 / 2560 / 2048
    H attention heads   4 / 32 / 32     K head width               32 / 80 / 64
    F FFN hidden, d_ff 512/10240/5632   V vocabulary       1024 / 51200 / 100352
    E experts                   4       k experts a token visits            2
    R rows: (token, expert) visits, sorted by expert      N = B*T positions of a batch
                                        (sizes: tiny / phi2 / stablelm2)
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

MODALITIES = ("CT", "MRI", "X-ray", "pathology")  # the router's labels; index = expert

IMAGE_ID = -200  # marks a patch's position in token ids (LLaVA's IMAGE_TOKEN_INDEX)
IGNORE = -100  # label of a position that carries no loss

ASSETS = Path(__file__).parent / "assets" / "tiny"


class UserError(Exception):
    """Something the user can mend: told in one line, exit code 2, no traceback."""


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP tower. `n_layers` counts the published layers; the last one is never run."""

    image_size: int
    patch_size: int
    width: int
    n_layers: int
    n_heads: int
    d_ff: int

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class DecoderConfig:
    """A Phi-2 ("phi") or StableLM-2 ("stablelm") language model."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    rotary_dim: int  # the first channels of each head that are rotated; the rest pass through
    rope_theta: float = 10000.0
    max_len: int = 2048
    dropout: float = 0.0  # on both branches of a block, in training (Phi-2 publishes 0.1)


@dataclass(frozen=True)
class MoEConfig:
    """The sparse layers. A model whose `moe` is None is dense."""

    n_experts: int = 4
    top_k: int = 2
    router: str = "modality"
    level: str = "token"
    every: int = 2  # blocks 0, every, 2 * every, ... are sparse
    start: str = "preserving"


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    moe: MoEConfig | None = None
    system: str = ""  # what the chat template says before the first question


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one phase trains at one preset's size."""

    lr: float  # peak, after warm-up
    epochs: float
    batch_size: int


@dataclass(frozen=True)
class Preset:
    model: ModelConfig
    recipes: dict[int, Recipe]
    long: dict[int, Recipe]  # while the tower learns these pictures too: see --tune-vision
    clip: Path | None  # where the pretrained parts lie; None: the user names them
    llm: Path | None


@dataclass(frozen=True)
class Phase:
    """One stage. `trains` are patterns over parameter names; everything else is frozen."""

    title: str
    data: str  # which samples of a source: data.load_samples
    plain: bool  # caption after image (True) or the chat template (False)
    trains: tuple[str, ...]


LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CLIP_L = VisionConfig(image_size=336, patch_size=14, width=1024, n_layers=24, n_heads=16, d_ff=4096)
CLIP_TINY = VisionConfig(image_size=112, patch_size=16, width=128, n_layers=6, n_heads=4, d_ff=512)

# fmt: off
PHI2      = DecoderConfig("phi",       51200, 2560, 32, 32, 10240, rotary_dim=32, dropout=0.1)
STABLELM2 = DecoderConfig("stablelm", 100352, 2048, 24, 32,  5632, rotary_dim=16, max_len=4096)
PHI_TINY      = DecoderConfig("phi",      1024, 128, 4, 4, 512, rotary_dim=12, max_len=512)
STABLELM_TINY = DecoderConfig("stablelm", 1024, 128, 4, 4, 344, rotary_dim=8,  max_len=512)

PAPER = {1: Recipe(1e-3, 1, 64), 2: Recipe(2e-5, 3, 64), 3: Recipe(2e-5, 9, 64)}  # Table 11
SMALL = {1: Recipe(3e-3, 1, 64), 2: Recipe(1e-3, 2, 64), 3: Recipe(1e-3, 0.25, 64)}
LONG  = {1: Recipe(1e-3, 10, 64), 2: Recipe(1e-3, 24, 64), 3: Recipe(5e-4, 4, 64)}

PRESETS = {
    "tiny":          Preset(ModelConfig(CLIP_TINY, PHI_TINY),
                            SMALL, LONG, ASSETS / "clip", ASSETS / "phi"),
    "tiny-stablelm": Preset(ModelConfig(CLIP_TINY, STABLELM_TINY),
                            SMALL, LONG, ASSETS / "clip", ASSETS / "stablelm"),
    "phi2":          Preset(ModelConfig(CLIP_L, PHI2, system=LLAVA_SYSTEM),
                            PAPER, PAPER, None, None),
    "stablelm2":     Preset(ModelConfig(CLIP_L, STABLELM2, system=LLAVA_SYSTEM),
                            PAPER, PAPER, None, None),
}

EXPERTS = ("decoder.*.mlp.experts.*", "decoder.*.mlp.meta.*")
PHASES = {
    1: Phase("alignment",          "captions",     True,  ("projector.*",)),
    2: Phase("instruction tuning", "instructions", False, ("projector.*", "decoder.*")),
    3: Phase("MoE tuning",         "vqa",          False, EXPERTS),
}
# What the released code trains besides in phase 3, by name match: dense FFNs and the projector.
RELEASED_EXTRA = {
    "phi":      ("projector.*", "decoder.blocks.*.mlp.fc*"),
    "stablelm": ("projector.*", "decoder.blocks.*.mlp.gate.*", "decoder.blocks.*.mlp.up.*",
                 "decoder.blocks.*.mlp.down.*"),
}
# fmt: on


def flag(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help, **extra})


def argument(help: str) -> Any:
    """A field without default: a positional argument."""
    return field(metadata={"help": help}, kw_only=True)


@dataclass(frozen=True)
class Common:
    """Flags that mean the same in every script."""

    data: tuple[str, ...] = flag((), "phantoms[:N], slake:DIR, vqa-rad:DIR; may be repeated")
    lang: Literal["en", "zh", "all"] = flag("en", "language of SLAKE's questions")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "matmul precision")
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
    router_labels: int = flag(1000, "images whose modality label trains the router")
    experts: int = flag(4, "experts in a sparse block")
    top_k: int = flag(2, "experts a token visits")
    start: Literal["preserving", "released"] = flag("preserving", "phase 3 at step 0: see README")
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
    save_every: int = flag(200, "steps between checkpoints")
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    eval: bool = flag(True, "score the held-out split at the end")


def parse(cls: type, argv: Sequence[str] | None, prog: str) -> Any:
    """Command line -> an instance of the dataclass `cls`; its fields are the flags, kebab-case.

    Raises UserError for anything that is not one of them. A field without default is positional.
    """
    parser = _Parser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    for f in fields(cls):
        kind: dict[str, Any] = {"help": f.metadata.get("help")}
        if f.default is MISSING:
            parser.add_argument(f.name, **kind)
            continue
        options = get_args(f.type)
        kind["metavar"] = f.name.split("_")[-1].upper()
        if get_origin(f.type) is UnionType:  # int | None: the flag is an int
            base = options[0]
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


def user_errors(main: Callable) -> Callable:
    """Wrap a script's main(argv): a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> Any:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped


Config = TypeVar("Config")


def to_dict(config: Any) -> dict:
    """A config dataclass -> plain JSON values."""
    return json.loads(json.dumps(asdict(config)))


def write_json(path: Path, values: Any) -> None:
    """For --json FILE. Raises UserError where it cannot be written."""
    try:
        path.write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def model_config(values: dict) -> ModelConfig:
    """The inverse of to_dict for a ModelConfig. Raises KeyError, TypeError on unknown fields."""
    return ModelConfig(
        vision=VisionConfig(**values["vision"]),
        decoder=DecoderConfig(**values["decoder"]),
        moe=MoEConfig(**values["moe"]) if values["moe"] else None,
        system=values["system"],
    )


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"--preset {name}: not one of {', '.join(PRESETS)}")
    return PRESETS[name]
