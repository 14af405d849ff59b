"""Dimensions, presets, the table of phases, and the flags of training.

The letters used for shapes in the whole project, and their sizes in three presets:

    B batch (image-question pairs)      T decoder positions: text tokens + patches
    S image side       112 / 336 / 336  P patches per image         49 / 576 / 576
    W tower width     128 / 1024 / 1024 D decoder width, d_model 128 / 2560 / 2048
    H attention heads   4 / 32 / 32     K head width               32 / 80 / 64
    F FFN hidden, d_ff 128/10240/5632   V vocabulary       1024 / 51200 / 100352
    E experts                   4       k experts per token                 2
    N = B*T tokens of a batch           C positions a query can look at: cached + new
    L sparse layers                     G heads of keys and values, H if not shared
                                        (sizes: tiny / phi2 / stablelm2)
    mask (B, T) True on real positions  attn_mask (B, 1, T, C) 0 or -inf, added to scores
"""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

MODALITIES = ("CT", "MRI", "X-ray", "pathology")  # the router's labels; index = expert: append

IMAGE_ID = -200  # marks a patch's position in token ids (LLaVA's IMAGE_TOKEN_INDEX)
IGNORE = -100  # label of a position that carries no loss

ASSETS = Path(__file__).parent / "assets" / "tiny"


class UserError(Exception):
    """A mistake of the user's: printed as one line, exit code 2, no traceback."""


def one_line(text: str, most: int = 2000) -> str:
    """Text from a file, made safe to print: no line breaks, no control characters, not endless."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text[: 2 * most].split()))
    return line if len(line) <= most else line[:most] + " ..."


@functools.cache
def warn_once(message: str) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)


def tolerate(where: str, faults: Sequence[tuple[str, str]], allowed: int, then: str) -> None:
    """Raise UserError for more faults (name, reason) than --max-bad allows; else warn of them."""
    if not faults:
        return
    names = ", ".join(name for name, _ in faults[:5]) + ", ..." * (len(faults) > 5)
    message = f"{where}: {len(faults)} cannot be used: {names} ({faults[0][1]})"
    if len(faults) > allowed:
        raise UserError(f"{message}; --max-bad {len(faults)} {then}")
    warn_once(f"{message}; --max-bad {then}")


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
    """A Phi-2 ("phi"), StableLM-2 ("stablelm") or Llama-style ("llama") language model."""

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
    n_kv_heads: int | None = None  # heads of keys and values; None: as many as n_heads
    norm_eps: float = 1e-5
    tied: bool = False  # the head scores with the token embedding


@dataclass(frozen=True)
class MoEConfig:
    """The sparse layers. A model whose `moe` is None is dense."""

    n_experts: int = len(MODALITIES)
    top_k: int = 2
    router: str = "modality"
    level: str = "token"
    start: str = "preserving"  # or "released", "fresh": moe.upcycle
    layers: tuple[int, ...] | None = None  # the sparse blocks; None: every second one
    meta: bool = True  # Med-MoE's always-on expert


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig
    decoder: DecoderConfig
    moe: MoEConfig | None = None
    system: str = ""  # the chat template's text before the first question


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
    long: dict[int, Recipe]  # while the tower is trained too: see --tune-vision
    clip: Path | None  # directories of the pretrained parts; None: the user names them
    llm: Path | None


@dataclass(frozen=True)
class Phase:
    """One stage. `trains` are patterns over parameter names; everything else is frozen."""

    title: str
    task: str  # which samples of a source: sources/load.py
    plain: bool  # caption after image (True) or the chat template (False)
    trains: tuple[str, ...]


LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CLIP_L = VisionConfig(image_size=336, patch_size=14, width=1024, n_layers=24, n_heads=16, d_ff=4096)
CLIP_TINY = VisionConfig(image_size=112, patch_size=16, width=128, n_layers=6, n_heads=4, d_ff=512)

# fmt: off
#                       family vocabulary     D layers heads F
PHI2      = DecoderConfig("phi",       51200, 2560, 32, 32, 10240, rotary_dim=32, dropout=0.1)
STABLELM2 = DecoderConfig("stablelm", 100352, 2048, 24, 32,  5632, rotary_dim=16, max_len=4096)
SMOLLM2   = DecoderConfig("llama",     49152,  576, 30,  9,  1536, rotary_dim=64, max_len=8192,
                          rope_theta=1e5, n_kv_heads=3, tied=True)
PHI_TINY      = DecoderConfig("phi",      1024, 128, 4, 4, 128, rotary_dim=12, max_len=512)
STABLELM_TINY = DecoderConfig("stablelm", 1024, 128, 4, 4,  88, rotary_dim=8,  max_len=512)

PAPER = {1: Recipe(1e-3, 1, 64), 2: Recipe(2e-5, 3, 64), 3: Recipe(2e-5, 9, 64)}  # Table 11
# Found by a search (results/README.md): together about four minutes on two cores. Phase 3's
# learning rate is for FFNs this narrow, which have many facts to learn in 125 steps.
SMALL = {1: Recipe(3e-3, 1, 64), 2: Recipe(3e-3, 2.5, 64), 3: Recipe(6e-3, 1, 64)}
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
    "smollm2-tiny":  Preset(ModelConfig(CLIP_TINY, SMOLLM2),
                            PAPER, PAPER, ASSETS / "clip", None),
    "smollm2":       Preset(ModelConfig(CLIP_L, SMOLLM2, system=LLAVA_SYSTEM),
                            PAPER, PAPER, None, None),
}

# What a phase trains. train.trained_patterns changes it for flags that ask for more or less.
EXPERTS_AND_META = ("decoder.*.mlp.experts.*", "decoder.*.mlp.meta.*")
PHASES = {
    1: Phase("alignment",          "captions",     True,  ("projector.*",)),
    2: Phase("instruction tuning", "instructions", False, ("projector.*", "decoder.*")),
    3: Phase("MoE tuning",         "tuning",       False, EXPERTS_AND_META),
}
# What the released code trains as well in phase 3: the projector and the dense FFNs.
RELEASED_EXTRA = ("projector.*", "decoder.*.mlp.[!emr]*")  # all but experts, meta, router
# fmt: on


def to_dict(config: Any) -> dict:
    """A config dataclass -> plain JSON values."""
    return json.loads(json.dumps(asdict(config)))


def model_config(values: dict) -> ModelConfig:
    """The inverse of to_dict for a ModelConfig. Raises KeyError, TypeError on unknown fields."""
    vision, decoder = VisionConfig(**values["vision"]), DecoderConfig(**values["decoder"])
    moe = None
    if values["moe"]:
        layers = values["moe"].get("layers")  # JSON has no tuples
        layers = tuple(layers) if isinstance(layers, list) else layers
        moe = MoEConfig(**values["moe"] | {"layers": layers})
    return ModelConfig(vision, decoder, moe, values["system"])


def named_layers(name: str, n_layers: int) -> tuple[int, ...] | None:
    """--moe-layers -> the sparse blocks; None: every second one. Raises UserError."""
    every, half = tuple(range(n_layers)), n_layers // 2
    named = {"every-second": None, "first-half": every[:half], "second-half": every[half:],
             "all": every}  # fmt: skip
    if name in named:
        return named[name]
    numbers = name.split(",")
    if not all(n.isdecimal() and int(n) < n_layers for n in numbers):
        raise UserError(f"--moe-layers {name}: {', '.join(named)}, or numbers below {n_layers} "
                        "with commas between")  # fmt: skip
    return tuple(sorted({int(n) for n in numbers}))


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"--preset {name}: not one of {', '.join(PRESETS)}")
    return PRESETS[name]


# Below are the flags of the command line. Skip them on first reading.


def flag(default: Any, help: str, group: str = "", least: float = 0) -> Any:
    """A dataclass field that becomes a command-line flag, in a named group of --help.

    least: of a number, the smallest that is accepted.
    """
    return field(default=default, metadata={"help": help, "group": group, "least": least})


def argument(help: str, optional: bool = False) -> Any:
    """A positional argument: a field without default, or with None where it may be left out."""
    default = {"default": None} if optional else {}
    return field(metadata={"help": help, "positional": True}, kw_only=True, **default)


MODEL, OPTIM, DATA = "model", "optimisation", "data"
SPEED, MANY, SAVE = "speed and memory", "many processes", "checkpoints"
GROUPS = ("", MODEL, OPTIM, DATA, SPEED, MANY, SAVE)  # in the order of --help


@dataclass(frozen=True)
class Common:
    """Flags that mean the same in every script; a script that lacks one names it in `lacks`."""

    lacks: ClassVar[tuple[str, ...]] = ()

    data: tuple[str, ...] = flag((), "SOURCE or SOURCE@WEIGHT; repeatable (sources/README.md)")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to compute")
    batch_size: int | None = flag(None, "samples per step (default: the phase's)", least=1)
    max_missing: int = flag(0, "image files of a source that may be missing", DATA)
    max_bad: int = flag(0, "records of a source, or its images, that may be unusable", DATA)
    follow_links: bool = flag(False, "read images that are links out of their source", DATA)
    image_folder: str | None = flag(None, "images of llava: that are not beside their file", DATA)
    router_labels: str | None = flag(None, 'FILE.json of {"image": "CT", ...} to use', DATA)
    window: Literal["auto", "soft", "brain", "lung"] = flag("auto", "of CT in DICOM files", DATA)
    frame: Literal["first", "middle"] = flag("first", "of DICOM files with several", DATA)
    lang: Literal["en", "zh", "all"] = flag("en", "language of SLAKE's questions", DATA)
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "matmul precision", SPEED)
    kernels: Literal["auto", "torch", "cuda"] = flag("auto", "cuda/ on a GPU", SPEED)
    seed: int = flag(0, "of weights, order and dropout; not of the data", OPTIM)
    json: str | None = flag(None, "also write the results to this FILE", SAVE)


@dataclass(frozen=True)
class TrainConfig(Common):
    """Train a Med-MoE. Phases that --out does not have yet run first."""

    phase: Literal[1, 2, 3] = flag(3, "1 alignment, 2 instruction tuning + router, 3 MoE tuning")
    preset: str = flag("tiny", "one of " + ", ".join(PRESETS))
    out: str | None = flag(None, "output DIR (default: runs/PRESET)")
    init: str | None = flag(None, "start from this checkpoint DIR instead of the phase before")
    resume: bool = flag(False, "continue from the last checkpoint in --out")
    overwrite: bool = flag(False, "replace the finished phase in --out")
    router: str = flag("modality", "modality, topk, random, oracle, or FILE.py:Class")
    steps: int | None = flag(None, "optimizer steps of each phase; overrides --epochs", least=1)
    clip: str | None = flag(None, "pretrained CLIP tower DIR (default: the preset's)", MODEL)
    llm: str | None = flag(None, "pretrained decoder DIR (default: the preset's)", MODEL)
    router_level: Literal["auto", "token", "sequence", "once"] = flag(
        "auto", "see routers.Router; auto: once for modality, else token", MODEL
    )
    router_images: int = flag(1000, "images whose modality label trains the router", DATA, 1)
    router_noise: float = flag(0.0, "share of those labels to replace by wrong ones", DATA)
    experts: int = flag(len(MODALITIES), "experts in a sparse block; 0: it stays dense", MODEL)
    top_k: int = flag(2, "experts per token", MODEL, 1)
    meta: bool = flag(True, "an always-on expert", MODEL)
    moe_layers: str = flag("every-second", "or first-half, second-half, all, 0,2,...", MODEL)
    start: Literal["preserving", "released", "fresh"] = flag("preserving", "see moe.upcycle", MODEL)
    trains: Literal["paper", "released"] = flag("paper", "in phase 3: experts, or more", OPTIM)
    balance: float = flag(0.0, "weight of the load-balancing loss", OPTIM)
    z_loss: float = flag(0.0, "weight of the router z-loss", OPTIM)
    modality_loss: float = flag(0.0, "of phase 2's loss of the router, trained on", OPTIM)
    tune_vision: bool | None = flag(None, "train the tower too (default: on new data)", OPTIM)
    jitter: bool | None = flag(None, "augment the images (default: as --tune-vision)", DATA)
    lr: float | None = flag(None, "peak learning rate (default: the phase's)", OPTIM)
    epochs: float | None = flag(None, "passes over the data (default: the phase's)", OPTIM)
    accumulate: int = flag(1, "micro-batches per step, which share the batch size", OPTIM, 1)
    clip_grad: float = flag(1.0, "largest gradient norm; 0: no clipping", OPTIM)
    workers: int = flag(2, "threads that read the images of the next batches", SPEED)
    cache_features: bool = flag(False, "keep the frozen tower's features in memory", SPEED)
    cache_gb: float = flag(20.0, "largest size of that cache", SPEED)
    compile: bool = flag(False, "compile the blocks with torch.compile", SPEED)
    activation_checkpointing: bool = flag(False, "recompute activations in backward", SPEED)
    weights: Literal["float32", "bf16", "bf16-stochastic"] = flag(
        "float32", "bf16: with fp32 master copies, or stochastic rounding", SPEED
    )
    lora_rank: int = flag(0, "train LoRA of this rank in the FFNs, phases 2 and 3; 0: none", OPTIM)
    expert_parallel: int = flag(1, "processes that share the experts (torchrun)", MANY, 1)
    save_every: int = flag(200, "steps between checkpoints", SAVE, 1)
    keep: int = flag(2, "how many checkpoints of an unfinished run are kept", SAVE, 1)
    eval: bool = flag(True, "score the held-out split at the end", SAVE)
