"""Published weights: their names (Hugging Face files) -> ours, loaded strictly.

Every key of a file is accounted for, every parameter filled exactly once, every shape checked;
tensors are read one at a time. config.json must agree with the preset.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import DecoderConfig, ModelConfig, UserError, VisionConfig
from tensorfiles import read_json, read_tensors

# fmt: off
# {} a number, * "weight" or "bias", ** anything. None: known, and left out on purpose.
CLIP = {
    "vision_model.embeddings.class_embedding":            "vision.cls",
    "vision_model.embeddings.patch_embedding.weight":     "vision.patch_embed.weight",
    "vision_model.embeddings.position_embedding.weight":  "vision.positions",
    "vision_model.embeddings.position_ids":               None,  # 0..P, stored by old versions
    "vision_model.pre_layrnorm.*":                        "vision.ln_pre.*",  # sic
    "vision_model.encoder.layers.{}.layer_norm1.*":       "vision.blocks.{}.ln_1.*",
    "vision_model.encoder.layers.{}.self_attn.q_proj.*":  "vision.blocks.{}.q.*",
    "vision_model.encoder.layers.{}.self_attn.k_proj.*":  "vision.blocks.{}.k.*",
    "vision_model.encoder.layers.{}.self_attn.v_proj.*":  "vision.blocks.{}.v.*",
    "vision_model.encoder.layers.{}.self_attn.out_proj.*": "vision.blocks.{}.o.*",
    "vision_model.encoder.layers.{}.layer_norm2.*":       "vision.blocks.{}.ln_2.*",
    "vision_model.encoder.layers.{}.mlp.fc1.*":           "vision.blocks.{}.fc1.*",
    "vision_model.encoder.layers.{}.mlp.fc2.*":           "vision.blocks.{}.fc2.*",
    "vision_model.post_layernorm.*":                      None,  # features are read before it
    "visual_projection.weight":                           None,  # CLIP's contrastive head
    "text_model.**":                                      None,
    "text_projection.weight":                             None,
    "logit_scale":                                        None,
}
PHI = {
    "model.embed_tokens.weight":          "decoder.embed.weight",
    "model.layers.{}.input_layernorm.*":  "decoder.blocks.{}.ln.*",
    "model.layers.{}.self_attn.q_proj.*": "decoder.blocks.{}.attn.q.*",
    "model.layers.{}.self_attn.k_proj.*": "decoder.blocks.{}.attn.k.*",
    "model.layers.{}.self_attn.v_proj.*": "decoder.blocks.{}.attn.v.*",
    "model.layers.{}.self_attn.dense.*":  "decoder.blocks.{}.attn.o.*",
    "model.layers.{}.mlp.fc1.*":          "decoder.blocks.{}.mlp.fc1.*",
    "model.layers.{}.mlp.fc2.*":          "decoder.blocks.{}.mlp.fc2.*",
    "model.final_layernorm.*":            "decoder.ln_f.*",
    "lm_head.*":                          "decoder.lm_head.*",  # a bias too: phi-2 has one
}
STABLELM = {
    "model.embed_tokens.weight":                   "decoder.embed.weight",
    "model.layers.{}.input_layernorm.*":           "decoder.blocks.{}.ln_1.*",
    "model.layers.{}.post_attention_layernorm.*":  "decoder.blocks.{}.ln_2.*",
    "model.layers.{}.self_attn.q_proj.*":          "decoder.blocks.{}.attn.q.*",
    "model.layers.{}.self_attn.k_proj.*":          "decoder.blocks.{}.attn.k.*",
    "model.layers.{}.self_attn.v_proj.*":          "decoder.blocks.{}.attn.v.*",
    "model.layers.{}.self_attn.o_proj.weight":     "decoder.blocks.{}.attn.o.weight",
    "model.layers.{}.mlp.gate_proj.weight":        "decoder.blocks.{}.mlp.gate.weight",
    "model.layers.{}.mlp.up_proj.weight":          "decoder.blocks.{}.mlp.up.weight",
    "model.layers.{}.mlp.down_proj.weight":        "decoder.blocks.{}.mlp.down.weight",
    "model.norm.*":                                "decoder.ln_f.*",
    "lm_head.weight":                              "decoder.lm_head.weight",
}
# fmt: on
DECODERS = {"phi": PHI, "stablelm": STABLELM, "llama": STABLELM}  # Llama's lack the biases

# What the code computes, by the published field. A field that is missing has this value; one that
# has another is refused.
IMPLEMENTED: dict[str, dict[str, Any]] = {
    "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
             "num_channels": 3},
    "phi": {"hidden_act": "gelu_new", "qk_layernorm": False, "rope_scaling": None,
            "attention_dropout": 0.0, "embd_pdrop": 0.0},
    "stablelm": {"hidden_act": "silu", "use_qkv_bias": True, "use_parallel_residual": False,
                 "qk_layernorm": False, "rope_scaling": None, "attention_dropout": 0.0},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
              "rope_scaling": None, "attention_dropout": 0.0},
}  # fmt: skip
# StableLM-2's files may come without the blocks' LayerNorm biases, which are then 0.
OPTIONAL = {"stablelm": ("decoder.blocks.*.ln_?.bias",)}


def clip_table(config: VisionConfig) -> dict[str, str | None]:
    """CLIP's names; the last layer is left out, since features are read before it."""
    return {f"vision_model.encoder.layers.{config.n_layers - 1}.**": None} | CLIP


def decoder_table(config: DecoderConfig) -> dict[str, str | None]:
    """The family's names; a tied head may be stored a second time and is left out."""
    return DECODERS[config.family] | ({"lm_head.weight": None} if config.tied else {})


def with_prefix(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """transformers 5 stores a CLIP tower without the prefix that the published files have."""
    for key, tensor in tensors:
        bare = key.startswith(("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."))
        yield (f"vision_model.{key}" if bare else key), tensor


def rename(key: str, table: dict[str, str | None]) -> str | None:
    """One published key -> our name, or None if left out. Raises KeyError for an unknown key."""
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace(r"\{\}", r"(\d+)").replace(r"\*\*", ".*")
        if match := re.fullmatch(pattern.replace(r"\*", "(weight|bias)"), key):
            return ours and re.sub(r"\{\}|\*", "%s", ours) % match.groups()
    raise KeyError(f"{key!r} is in the checkpoint but in no row of the table")


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under its name; tied ones once."""
    persistent = module.state_dict(keep_vars=True).keys()
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor for name, tensor in named.items() if name in persistent}


def slots(
    module: nn.Module, prefix: str | tuple[str, ...], by_expert: bool = False
) -> dict[str, Tensor]:
    """Our name -> the storage to fill. by_expert: each expert's share of a stacked one by itself.

    decoder.blocks.0.mlp.experts.fc1.weight (E, F, D) becomes ...experts[0].fc1.weight (F, D), ...
    """
    found = {}
    for name, param in stored(module).items():
        if by_expert and ".mlp.experts." in name:
            before, _, after = name.partition(".mlp.experts.")
            shares = enumerate(param.data)
            found |= {f"{before}.mlp.experts[{k}].{after}": share for k, share in shares}
        else:
            found[name] = param.data
    return {name: place for name, place in found.items() if name.startswith(prefix)}


def publish(
    tensors: dict[str, Tensor], table: dict[str, str | None], dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Our names -> the published ones. Raises KeyError for a name in no row."""
    inverse = {ours: theirs for theirs, ours in table.items() if ours}
    return {rename(n, inverse): t.detach().to(dtype).contiguous() for n, t in tensors.items()}


def fill(
    module: nn.Module,
    prefix: str | tuple[str, ...],
    tensors: Iterable[tuple[str, Tensor]],
    table: dict | None,
    optional: Sequence[str] = (),
    put: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> None:
    """Copy a checkpoint into what is stored under `prefix`, each exactly once. No table: our names.

    optional: patterns; what one matches becomes 0 if the checkpoint has nothing that it matches
    Raises KeyError for an unknown, doubled or missing name, ValueError for a wrong shape or type.
    """
    by_expert = any("experts[" in ours for ours in (table or {}).values() if ours)
    missing = slots(module, prefix, by_expert)
    every = list(missing)
    for key, tensor in tensors:
        if (name := rename(key, table) if table else key) is None:
            continue
        if name not in missing:
            raise KeyError(f"{key!r} -> {name!r}: not a parameter, or filled twice")
        place = missing.pop(name)
        if place.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(place.shape)}"
            raise ValueError(f"{key!r} -> {name!r}: shape {shapes}")
        if tensor.is_floating_point() != place.is_floating_point():
            kind = "a float type" if place.is_floating_point() else place.dtype
            raise ValueError(f"{key!r} -> {name!r}: {tensor.dtype}, expected {kind}")
        put(place, tensor)
    for pattern in optional:
        absent = fnmatch.filter(missing, pattern)
        if len(absent) == len(fnmatch.filter(every, pattern)):
            for name in absent:
                missing.pop(name).zero_()
    if missing:
        raise KeyError(f"not in the checkpoint: {sorted(missing)[:3]} ({len(missing)} in all)")


def check_implemented(directory: Path, family: str, values: dict) -> None:
    """Refuse by name what the code does not compute."""
    for name, ours in IMPLEMENTED[family].items():
        if (theirs := values.get(name, ours)) != ours:
            raise UserError(f"{directory}: {name} {theirs!r} is not implemented, only {ours!r}")


def published_vision(directory: Path) -> VisionConfig:
    """config.json of a CLIP directory -> our dimensions."""
    values = read_json(directory / "config.json")
    values = values.get("vision_config", values)
    check_implemented(directory, "clip", values)
    theirs = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
    theirs += ("num_attention_heads", "intermediate_size")
    return VisionConfig(*(whole(directory, values, name) for name in theirs))


# Fields as StableLM's first, remote-code class named them.
OLD_NAMES = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}


def published_decoder(directory: Path, family: str | None = None) -> DecoderConfig:
    """config.json of a Phi-2, StableLM-2 or Llama-style directory -> our dimensions.

    family: what model_type stands for, where it is another name
    """
    values = read_json(directory / "config.json")
    rope = values.get("rope_parameters") or {}  # where transformers 5 puts them
    if not isinstance(rope, dict):
        raise UserError(f"{directory}: rope_parameters {rope!r} must be an object")
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    values |= {name: v for name, v in rope.items() if name != "rope_type"}
    values = {OLD_NAMES.get(name, name): value for name, value in values.items()}
    family = family or field(directory, values, "model_type")
    family = "stablelm" if family == "stablelm_epoch" else family
    if family not in DECODERS:
        raise UserError(f"{directory}: model_type {family!r} is not one of {', '.join(DECODERS)}")
    check_implemented(directory, family, values)
    width, heads = (whole(directory, values, n) for n in ("hidden_size", "num_attention_heads"))
    if width % heads or values.get("head_dim") not in (None, width // heads):
        raise UserError(f"{directory}: {heads} heads of {values.get('head_dim')} in {width}")
    if family == "llama":
        values["partial_rotary_factor"] = 1.0
    partial = number(directory, values, "partial_rotary_factor")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    values.setdefault("max_position_embeddings", 2048)
    n_kv_heads = whole(directory, values, "num_key_value_heads")
    if heads % n_kv_heads:
        raise UserError(f"{directory}: num_key_value_heads {n_kv_heads} does not divide {heads}")
    eps = "rms_norm_eps" if family == "llama" else "layer_norm_eps"
    return DecoderConfig(
        family=family,
        vocab_size=whole(directory, values, "vocab_size"),
        d_model=width,
        n_layers=whole(directory, values, "num_hidden_layers"),
        n_heads=heads,
        d_ff=whole(directory, values, "intermediate_size"),
        rotary_dim=int(width // heads * partial),
        rope_theta=number(directory, values, "rope_theta", 10000.0),
        max_len=whole(directory, values, "max_position_embeddings"),
        dropout=number(directory, values, "resid_pdrop", 0.0),
        n_kv_heads=None if n_kv_heads == heads else n_kv_heads,
        norm_eps=number(directory, values, eps, 1e-5),
        tied=bool(values.get("tie_word_embeddings", False)),
    )


def field(directory: Path, values: dict, name: str) -> Any:
    if name not in values:
        raise UserError(f"{directory}: its JSON lacks {name!r}")
    return values[name]


def whole(directory: Path, values: dict, name: str) -> int:
    value = field(directory, values, name)
    if not isinstance(value, int) or not 0 < value < 10**6:
        raise UserError(f"{directory}: {name} {value!r} must be a positive whole number")
    return value


def number(directory: Path, values: dict, name: str, default: float | None = None) -> float:
    value = field(directory, values, name) if default is None else values.get(name, default)
    if not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise UserError(f"{directory}: {name} {value!r} must be a number from 0 up")
    return value


def load_published(model: nn.Module, config: ModelConfig, clip: Path, llm: Path) -> None:
    """Fill the tower from `clip`, the decoder from `llm`. Raises UserError if they do not fit."""
    for flag, directory, found, wanted in (
        ("--clip", clip, published_vision(clip), config.vision),
        ("--llm", llm, published_decoder(llm), config.decoder),
    ):
        if found != wanted:
            raise UserError(f"{flag} {directory}: {found} is not the preset's {wanted}")
    family = config.decoder.family
    try:
        fill(model, "vision.", with_prefix(read_tensors(clip)), clip_table(config.vision))
        tensors, table = read_tensors(llm), decoder_table(config.decoder)
        fill(model, "decoder.", tensors, table, OPTIONAL.get(family, ()))
    except (KeyError, ValueError) as error:
        raise UserError(f"{clip} or {llm}: {error.args[0]}") from error
