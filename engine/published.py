"""Published weights: their names (Hugging Face files) -> ours, loaded strictly.

Every key of a file is accounted for, every parameter filled exactly once, every shape checked;
tensors are read one at a time. config.json must agree with the preset. At the end: what config.json
of a checkpoint of our own may hold.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import filter as matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config import DecoderConfig, ModelConfig, UserError, VisionConfig, one_line, warn_once
from engine.durable import digest
from engine.processes import put
from model import MedMoE
from routers import ROUTERS
from sources.records import read_json
from sources.tensorfiles import read_tensors
from vision import CLIP_MEAN, CLIP_STD

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
# What vision.square and vision.normalise do, in the fields of preprocessor_config.json.
PREPROCESSING = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "rescale_factor": 1 / 255,
                 "resample": 3, "do_resize": True, "do_center_crop": True, "do_rescale": True,
                 "do_normalize": True}  # fmt: skip  # 3: bicubic
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

    detach, not .data: what is filled counts as a new version of the parameter (engine/casts.py).

    decoder.blocks.0.mlp.experts.fc1.weight (E, F, D) becomes ...experts[0].fc1.weight (F, D), ...
    """
    found = {}
    for name, param in stored(module).items():
        if name.startswith(prefix):
            before, stacked, after = name.partition(".mlp.experts.")
            if by_expert and stacked:
                for e, share in enumerate(param.detach()):
                    found[f"{before}.mlp.experts[{e}].{after}"] = share
            else:
                found[name] = param.detach()
    return found


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, in a tenth of isfinite().all()'s time."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(end.isfinite() for end in tensor.aminmax())  # a NaN is both ends


def fill(
    module: nn.Module, prefix: str | tuple[str, ...], tensors: Iterable[tuple[str, Tensor]],
    table: Table | None, optional: Sequence[str] = (),
) -> None:  # fmt: skip
    """Copy a checkpoint into what is stored under `prefix`, each exactly once. No table: our names.

    optional: patterns; what one matches becomes 0 if the checkpoint has nothing that it matches
    Raises KeyError for an unknown, doubled or missing name, ValueError for a wrong shape or type,
    and for a parameter that is not finite.
    """
    by_expert = any("experts[" in ours for ours in (table or {}).values() if ours)
    places = slots(module, prefix, by_expert)
    missing, buffers = dict(places), {name for name, _ in module.named_buffers()}
    for key, tensor in tensors:
        if (name := rename(key, table) if table else key) is None:
            continue
        if name not in missing:
            raise KeyError(f"{key!r} -> {name!r}: not a parameter, or filled twice")
        place = missing.pop(name)
        if place.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(place.shape)}"
            raise ValueError(f"{key!r} -> {name!r}: shape {shapes}")
        if name not in buffers and not is_finite(tensor):
            raise ValueError(f"{key!r} -> {name!r}: holds values that are NaN or infinite")
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


def check_preprocessing(directory: Path, size: int) -> None:
    """Refuse by name other pixels than ours, at a tower's size. Files and fields may be missing."""
    squares = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    for file in ("preprocessor_config.json", "processor_config.json"):
        values = read_json(directory / file, dict) if (directory / file).is_file() else {}
        if isinstance(inner := values.get("image_processor"), dict):  # of processor_config.json
            values = inner
        for name, ours in (PREPROCESSING | squares).items():
            if (theirs := values.get(name)) is None:
                continue
            if isinstance(theirs, int) and name in squares:  # as in the published file
                theirs = dict.fromkeys(ours, theirs)
            try:  # means may have been stored in single precision
                is_ours = np.allclose(theirs, ours)
            except (TypeError, ValueError):  # no numbers, or not as many
                is_ours = theirs == ours
            if not is_ours:
                raise UserError(f"{directory / file}: {name} {one_line(repr(theirs), 100)} is not "
                                f"implemented, only {ours!r}")  # fmt: skip


def published_vision(directory: Path) -> VisionConfig:
    """config.json of a CLIP directory -> our dimensions. Other preprocessing is refused, too."""
    values = read_json(directory / "config.json", dict)
    values = values.get("vision_config", values)
    if not isinstance(values, dict):
        raise UserError(f"{directory}: vision_config {one_line(repr(values), 100)}: not an object")
    check_implemented(directory, "clip", values)
    sizes = ("image_size", "patch_size", "hidden_size", "num_hidden_layers",
             "num_attention_heads", "intermediate_size")  # fmt: skip
    config = VisionConfig(*(number(directory, values, name) for name in sizes))
    check_preprocessing(directory, config.image_size)
    return config


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


# config.json of our own checkpoints: a field -> its smallest and largest value, or all of them.
LIMITS = {
    "image_size": (1, 4096), "patch_size": (1, 4096), "width": (1, 2**16), "n_layers": (1, 128),
    "n_heads": (1, 1024), "d_ff": (1, 2**20), "vocab_size": (1, 2**22), "d_model": (1, 2**16),
    "rotary_dim": (0, 2**16), "rope_theta": (1.0, 1e12), "max_len": (1, 2**24),
    "dropout": (0.0, 1.0), "n_kv_heads": (1, 1024), "norm_eps": (0.0, 1.0),
    "n_experts": (1, 1024), "top_k": (1, 1024),
}  # fmt: skip
CHOICES = {
    "family": tuple(DECODERS), "tied": (False, True), "meta": (False, True),
    "level": ("token", "sequence", "once"), "start": ("preserving", "released", "fresh"),
}  # fmt: skip


def check_config(file: Path, config: ModelConfig) -> None:
    """Raise UserError, naming the field, for dimensions that no model has."""

    def check(name: str, value: Any, is_right: bool, allowed: str) -> None:
        if not is_right:
            shown = one_line(repr(value), 100)
            raise UserError(f"{file}: model.{name} {shown}: must be {allowed}")

    vision, decoder, moe = config.vision, config.decoder, config.moe
    check("system", config.system, isinstance(config.system, str), "a text")
    for part, values in (("vision", vision), ("decoder", decoder), ("moe", moe)):
        for name, value in vars(values).items() if values else ():
            if name in CHOICES:
                all_ = CHOICES[name]
                is_right = value in all_ and type(value) is type(all_[0])
                check(f"{part}.{name}", value, is_right, f"one of {', '.join(map(str, all_))}")
            elif name in LIMITS and (name, value) != ("n_kv_heads", None):
                least, most = LIMITS[name]
                kinds = (int,) if type(least) is int else (int, float)
                is_right = type(value) in kinds and least <= value <= most
                allowed = f"a {'whole ' if len(kinds) == 1 else ''}number from {least} to {most}"
                check(f"{part}.{name}", value, is_right, allowed)
    size, patch, n_heads = vision.image_size, vision.patch_size, vision.n_heads
    check("vision.patch_size", patch, patch <= size, f"at most image_size, {size}")
    check("vision.n_heads", n_heads, vision.width % n_heads == 0, "a divisor of width")
    width, n_heads, n_kv_heads = decoder.d_model, decoder.n_heads, decoder.n_kv_heads
    check("decoder.n_heads", n_heads, width % n_heads == 0, f"a divisor of d_model, {width}")
    check("decoder.n_kv_heads", n_kv_heads, n_heads % (n_kv_heads or 1) == 0,
          f"a divisor of n_heads, {n_heads}")  # fmt: skip
    rotary, channels = decoder.rotary_dim, width // n_heads
    check("decoder.rotary_dim", rotary, rotary % 2 == 0 and rotary <= channels,
          f"even, and at most the {channels} channels of a head")  # fmt: skip
    if moe is not None:
        layers, n = moe.layers, decoder.n_layers
        check("moe.router", moe.router, isinstance(moe.router, str), "a text")
        check("moe.top_k", moe.top_k, moe.top_k <= moe.n_experts,
              f"at most n_experts, {moe.n_experts}")  # fmt: skip
        if layers is not None:
            is_right = isinstance(layers, tuple) and len(layers) and list(layers) == sorted(
                {i for i in layers if type(i) is int and 0 <= i < n}
            )  # fmt: skip
            check("moe.layers", layers, is_right, f"null, or ascending numbers below {n}")


class WithoutNormal(TorchFunctionMode):
    """nn.init.normal_ does nothing. For a "meta" tensor it would import torch._dynamo, for 1 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig) -> MedMoE:
    """A model without memory, only shapes; its router is a built-in one: no code of others runs."""
    if config.moe is not None:
        config = replace(config, moe=replace(config.moe, router="topk"))
    with torch.device("meta"), WithoutNormal():
        return MedMoE(config)


def check_size(directory: Path, config: ModelConfig) -> None:
    """Raise UserError if model.safetensors is too short for the model, before memory is taken."""
    file = directory / "model.safetensors"
    n = sum(p.numel() for p in meta_model(config).parameters())
    if file.is_file() and (size := file.stat().st_size) < 2 * n:  # no type has fewer bytes
        raise UserError(f"{directory / 'config.json'}: a model of {n:,} parameters, but "
                        f"{file.name} has {size:,} bytes")  # fmt: skip


def router_hash(router: str) -> str | None:
    """SHA-256 of the file of FILE.py:Class; None for a built-in router."""
    file = Path(router.rpartition(":")[0])
    return digest(file)["sha256"] if file.is_file() else None


def with_router(
    directory: Path, config: ModelConfig, info: dict, router: str | None
) -> ModelConfig:  # fmt: skip
    """A checkpoint's config with the user's router, None for the checkpoint's own.

    Raises UserError if that is a file: code runs because the user names it, not because a
    checkpoint does.
    """
    if config.moe is None:
        return config
    if router is None and config.moe.router not in ROUTERS:
        raise UserError(f"{directory}: trained with --router {config.moe.router}, a file that "
                        "runs only if you name it again: --router FILE.py:Class")  # fmt: skip
    before, now = info.get("run", {}).get("router_sha256"), router and router_hash(router)
    if before and now and before != now:
        warn_once(f"--router {router}: changed since {directory} was trained (its SHA-256)")
    return replace(config, moe=replace(config.moe, router=router or config.moe.router))
