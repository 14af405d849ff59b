"""Dimensions, presets and the table of phases.

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

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

    n_experts: int = 4
    top_k: int = 2
    router: str = "modality"
    level: str = "token"
    every: int = 2  # blocks 0, every, 2 * every, ... are sparse
    start: str = "preserving"  # or "released", "fresh": moe.upcycle
    layers: tuple[int, ...] | None = None  # the sparse blocks; None: every `every`-th
    meta: bool = True  # Med-MoE's always-on expert
    residual: bool = False  # early TinyMed's mixture with a dense FFN


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
SMOLLM2   = DecoderConfig("llama",     49152,  576, 30,  9,  1536, rotary_dim=64, max_len=8192,
                          rope_theta=1e5, n_kv_heads=3, tied=True)
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
    "smollm2":       Preset(ModelConfig(CLIP_L, SMOLLM2, system=LLAVA_SYSTEM),
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
RELEASED_EXTRA["llama"] = RELEASED_EXTRA["stablelm"]
# fmt: on


def to_dict(config: Any) -> dict:
    """A config dataclass -> plain JSON values."""
    return json.loads(json.dumps(asdict(config)))


def model_config(values: dict) -> ModelConfig:
    """The inverse of to_dict for a ModelConfig. Raises KeyError, TypeError on unknown fields."""
    return ModelConfig(
        vision=VisionConfig(**values["vision"]),
        decoder=DecoderConfig(**values["decoder"]),
        moe=moe_config(values["moe"]) if values["moe"] else None,
        system=values["system"],
    )


def moe_config(values: dict) -> MoEConfig:
    layers = values.get("layers")  # JSON knows no tuples; older checkpoints have no such field
    return MoEConfig(**values | {"layers": None if layers is None else tuple(layers)})


def named_layers(name: str, n_layers: int) -> tuple[int, ...] | None:
    """--moe-layers -> the sparse blocks; None: every second one. Raises UserError."""
    if name == "every-second":
        return None
    half = n_layers // 2
    named = {
        "first-half": range(half),
        "second-half": range(half, n_layers),
        "all": range(n_layers),
    }
    numbers = name.split(",")
    if name not in named and all(n.isdecimal() and int(n) < n_layers for n in numbers):
        return tuple(sorted({int(n) for n in numbers}))
    if name not in named:
        raise UserError(f"--moe-layers {name}: every-second, {', '.join(named)}, or numbers "
                        f"below {n_layers} with commas between")  # fmt: skip
    return tuple(named[name])


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"--preset {name}: not one of {', '.join(PRESETS)}")
    return PRESETS[name]
