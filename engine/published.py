"""Published weights: their names (Hugging Face files) -> ours, loaded strictly.

Every key of a file is accounted for, every parameter filled exactly once, every shape checked;
tensors are read one at a time. config.json must agree with the preset.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import filter as matches
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from config import DecoderConfig, ModelConfig, UserError, VisionConfig
from engine.processes import put
from sources.records import read_json
from sources.tensorfiles import read_tensors

Table = dict[str, str | None]  # published name -> ours; None: known, and left out on purpose

# fmt: off
# {} is a number, [12] one of these characters, * "weight" or "bias", ** anything.
CLIP: Table = {
    "vision_model.embeddings.class_embedding":             "vision.cls",
    "vision_model.embeddings.patch_embedding.weight":      "vision.patch_embed.weight",
    "vision_model.embeddings.position_embedding.weight":   "vision.positions",
    "vision_model.embeddings.position_ids":                None,  # 0..P, stored by old versions
    "vision_model.pre_layrnorm.*":                         "vision.ln_pre.*",  # sic
    "vision_model.encoder.layers.{}.layer_norm[12].*":     "vision.blocks.{}.ln_[12].*",
    "vision_model.encoder.layers.{}.self_attn.[qkv]_proj.*": "vision.blocks.{}.[qkv].*",
    "vision_model.encoder.layers.{}.self_attn.out_proj.*": "vision.blocks.{}.o.*",
    "vision_model.encoder.layers.{}.mlp.fc[12].*":         "vision.blocks.{}.fc[12].*",
    "vision_model.post_layernorm.*":                       None,  # features are read before it
    "visual_projection.weight":                            None,  # CLIP's contrastive head
    "text_**":                                             None,
    "logit_scale":                                         None,
}
PHI: Table = {
    "model.embed_tokens.weight":              "decoder.embed.weight",
    "model.layers.{}.input_layernorm.*":      "decoder.blocks.{}.ln.*",
    "model.layers.{}.self_attn.[qkv]_proj.*": "decoder.blocks.{}.attn.[qkv].*",
    "model.layers.{}.self_attn.dense.*":      "decoder.blocks.{}.attn.o.*",
    "model.layers.{}.mlp.fc[12].*":           "decoder.blocks.{}.mlp.fc[12].*",
    "model.final_layernorm.*":                "decoder.ln_f.*",
    "lm_head.*":                              "decoder.lm_head.*",  # a bias too: phi-2 has one
}
STABLELM: Table = {
    "model.embed_tokens.weight":                  "decoder.embed.weight",
    "model.layers.{}.input_layernorm.*":          "decoder.blocks.{}.ln_1.*",
    "model.layers.{}.post_attention_layernorm.*": "decoder.blocks.{}.ln_2.*",
    "model.layers.{}.self_attn.[qkv]_proj.*":     "decoder.blocks.{}.attn.[qkv].*",
    "model.layers.{}.self_attn.o_proj.weight":    "decoder.blocks.{}.attn.o.weight",
    "model.layers.{}.mlp.gate_proj.weight":       "decoder.blocks.{}.mlp.gate.weight",
    "model.layers.{}.mlp.up_proj.weight":         "decoder.blocks.{}.mlp.up.weight",
    "model.layers.{}.mlp.down_proj.weight":       "decoder.blocks.{}.mlp.down.weight",
    "model.norm.*":                               "decoder.ln_f.*",
    "lm_head.weight":                             "decoder.lm_head.weight",
}
# fmt: on
DECODERS = {"phi": PHI, "stablelm": STABLELM, "llama": STABLELM}  # Llama's lack the biases

# What the code computes, by the published field. A field that is missing has this value; one that
# has another is refused.
ANY_DECODER = {"rope_scaling": None, "attention_dropout": 0.0}
IMPLEMENTED: dict[str, dict[str, Any]] = {
    "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
             "num_channels": 3},
    "phi": ANY_DECODER | {"hidden_act": "gelu_new", "qk_layernorm": False, "embd_pdrop": 0.0},
    "stablelm": ANY_DECODER | {"hidden_act": "silu", "qk_layernorm": False, "use_qkv_bias": True,
                               "use_parallel_residual": False},
    "llama": ANY_DECODER | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}  # fmt: skip
# Values of fields that a decoder's config.json may lack.
DEFAULTS = {"rope_theta": 10000.0, "resid_pdrop": 0.0, "layer_norm_eps": 1e-5,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}  # fmt: skip
# Fields as StableLM's first, remote-code class named them.
OLD_NAMES = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
# StableLM-2's files may come without the blocks' LayerNorm biases, which are then 0.
OPTIONAL = {"stablelm": ("decoder.blocks.*.ln_?.bias",)}


def clip_table(config: VisionConfig) -> Table:
    """CLIP's names; the last layer is left out, since features are read before it."""
    return {f"vision_model.encoder.layers.{config.n_layers - 1}.**": None} | CLIP


def decoder_table(config: DecoderConfig) -> Table:
    """The family's names; a tied head may be stored a second time and is left out."""
    return DECODERS[config.family] | ({"lm_head.weight": None} if config.tied else {})


def with_prefix(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """transformers 5 stores a CLIP tower without the prefix that the published files have."""
    bare = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
    return ((f"vision_model.{k}" if k.startswith(bare) else k, tensor) for k, tensor in tensors)


def rename(key: str, table: Table) -> str | None:
    """One published key -> our name, or None if left out. Raises KeyError for an unknown key."""
    for theirs, ours in table.items():
        pattern = re.sub(r"\\\[(\w+)\\\]", r"([\1])", re.escape(theirs))
        pattern = pattern.replace(r"\{\}", r"(\d+)").replace(r"\*\*", ".*")
        if match := re.fullmatch(pattern.replace(r"\*", "(weight|bias)"), key):
            return ours and re.sub(r"\{\}|\*|\[\w+\]", "%s", ours) % match.groups()
    raise KeyError(f"{key!r} is in the checkpoint but in no row of the table")


def stored(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under its name; tied ones once."""
    persistent = module.state_dict().keys()  # first: FSDP reshards here, freeing gathered weights
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: named[name] for name in persistent if name in named}


def slots(
    module: nn.Module, prefix: str | tuple[str, ...], by_expert: bool = False
) -> dict[str, Tensor]:
    """Our name -> the storage to fill. by_expert: each expert's share of a stacked one by itself.

    decoder.blocks.0.mlp.experts.fc1.weight (E, F, D) becomes ...experts[0].fc1.weight (F, D), ...
    """
    found = {}
    for name, param in stored(module).items():
        if name.startswith(prefix):
            before, stacked, after = name.partition(".mlp.experts.")
            if by_expert and stacked:
                for e, share in enumerate(param.data):
                    found[f"{before}.mlp.experts[{e}].{after}"] = share
            else:
                found[name] = param.data
    return found


def fill(
    module: nn.Module, prefix: str | tuple[str, ...], tensors: Iterable[tuple[str, Tensor]],
    table: Table | None, optional: Sequence[str] = (),
) -> None:  # fmt: skip
    """Copy a checkpoint into what is stored under `prefix`, each exactly once. No table: our names.

    optional: patterns; what one matches becomes 0 if the checkpoint has nothing that it matches
    Raises KeyError for an unknown, doubled or missing name, ValueError for a wrong shape or type.
    """
    by_expert = any("experts[" in ours for ours in (table or {}).values() if ours)
    places = slots(module, prefix, by_expert)
    missing = dict(places)
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
        absent = matches(missing, pattern)
        if absent == matches(places, pattern):
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
    values = read_json(directory / "config.json", dict)
    values = values.get("vision_config", values)
    check_implemented(directory, "clip", values)
    sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers",
             "num_attention_heads", "intermediate_size")  # fmt: skip
    return VisionConfig(*(number(directory, values, name) for name in sizes))


def published_decoder(directory: Path, family: str | None = None) -> DecoderConfig:
    """config.json of a Phi-2, StableLM-2 or Llama-style directory -> our dimensions.

    family: what model_type stands for, where it is another name
    """
    values = read_json(directory / "config.json", dict)
    rope = values.get("rope_parameters") or {}  # where transformers 5 puts them
    if not isinstance(rope, dict):
        raise UserError(f"{directory}: rope_parameters {rope!r} must be an object")
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    values |= rope
    values = DEFAULTS | {OLD_NAMES.get(name, name): value for name, value in values.items()}
    family = family or values.get("model_type")
    family = "stablelm" if family == "stablelm_epoch" else family
    if family not in DECODERS:
        raise UserError(f"{directory}: model_type {family!r} is not one of {', '.join(DECODERS)}")
    check_implemented(directory, family, values)
    size = partial(number, directory, values)
    width, heads = size("hidden_size"), size("num_attention_heads")
    if width % heads or values.get("head_dim") not in (None, width // heads):
        raise UserError(f"{directory}: {heads} heads of {values.get('head_dim')} in {width}")
    n_kv_heads = heads if values.get("num_key_value_heads") is None else size("num_key_value_heads")
    if heads % n_kv_heads:
        raise UserError(f"{directory}: num_key_value_heads {n_kv_heads} does not divide {heads}")
    rotated = 1.0 if family == "llama" else size("partial_rotary_factor", 0)
    return DecoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        d_model=width,
        n_layers=size("num_hidden_layers"),
        n_heads=heads,
        d_ff=size("intermediate_size"),
        rotary_dim=int(width // heads * rotated),
        rope_theta=size("rope_theta", 0),
        max_len=size("max_position_embeddings"),
        dropout=size("resid_pdrop", 0),
        n_kv_heads=None if n_kv_heads == heads else n_kv_heads,
        norm_eps=size("rms_norm_eps" if family == "llama" else "layer_norm_eps", 0),
        tied=bool(values.get("tie_word_embeddings", False)),
    )


def number(directory: Path, values: dict, name: str, least: int = 1) -> Any:
    """A field of config.json: a positive whole number, or with least=0 any number from 0 up."""
    if name not in values:
        raise UserError(f"{directory}: its JSON lacks {name!r}")
    value, kind = values[name], int if least else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < 1e12:
        allowed = "positive whole number" if least else "number from 0 up"
        raise UserError(f"{directory}: {name} {value!r} must be a {allowed}")
    return value


def load_published(model: nn.Module, config: ModelConfig, clip: Path, llm: Path) -> None:
    """Fill the tower from `clip`, the decoder from `llm`. Raises UserError if they do not fit."""
    for where, found, wanted in (
        (f"--clip {clip}", published_vision(clip), config.vision),
        (f"--llm {llm}", published_decoder(llm), config.decoder),
    ):
        if found != wanted:
            raise UserError(f"{where}: {found} is not the preset's {wanted}")
    table, optional = decoder_table(config.decoder), OPTIONAL.get(config.decoder.family, ())
    try:
        fill(model, "vision.", with_prefix(read_tensors(clip)), clip_table(config.vision))
        fill(model, "decoder.", read_tensors(llm), table, optional)
    except (KeyError, ValueError) as error:
        raise UserError(f"{clip} or {llm}: {error.args[0]}") from error
