"""Published weights: their names (Hugging Face files) -> ours, loaded strictly.

Every key of a file is accounted for, every parameter filled exactly once, every shape checked;
tensors are read one at a time. config.json must agree with the preset.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from config import DecoderConfig, ModelConfig, UserError, VisionConfig

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
DECODERS = {"phi": PHI, "stablelm": STABLELM}


def clip_table(config: VisionConfig) -> dict[str, str | None]:
    """CLIP's names; the last layer is left out, since features are read before it."""
    return {f"vision_model.encoder.layers.{config.n_layers - 1}.**": None} | CLIP


def rename(key: str, table: dict[str, str | None]) -> str | None:
    """One published key -> our name, or None if left out. Raises KeyError for an unknown key."""
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace(r"\{\}", r"(\d+)").replace(r"\*\*", ".*")
        if match := re.fullmatch(pattern.replace(r"\*", "(weight|bias)"), key):
            return ours and re.sub(r"\{\}|\*", "%s", ours) % match.groups()
    raise KeyError(f"{key!r} is in the checkpoint but in no row of the table")


def publish(tensors: dict[str, Tensor], table: dict[str, str | None]) -> dict[str, Tensor]:
    """Our names -> the published ones, in fp16. Raises KeyError for a name in no row."""
    inverse = {ours: theirs for theirs, ours in table.items() if ours}
    return {rename(name, inverse): t.detach().half().contiguous() for name, t in tensors.items()}


def fill(
    module: nn.Module, prefix: str, tensors: Iterator[tuple[str, Tensor]], table: dict | None
) -> None:
    """Copy a checkpoint into the parameters under `prefix`, each exactly once. No table: our names.

    Raises KeyError for an unknown, doubled or missing name, ValueError for a wrong shape.
    """
    missing = {n: p for n, p in module.named_parameters() if n.startswith(prefix)}
    for key, tensor in tensors:
        if (name := rename(key, table) if table else key) is None:
            continue
        if name not in missing:
            raise KeyError(f"{key!r} -> {name!r}: not a parameter, or filled twice")
        param = missing.pop(name)
        if param.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(param.shape)}"
            raise ValueError(f"{key!r} -> {name!r}: shape {shapes}")
        param.data.copy_(tensor)
    if missing:
        raise KeyError(f"not in the checkpoint: {sorted(missing)[:3]} ({len(missing)} in all)")


def read_json(path: Path) -> dict:
    """Raises UserError for what cannot be read or is not a JSON object."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of model.safetensors or all shards of its index, one in memory at a time."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(_field(directory, read_json(index), "weight_map").values()))
    for file in files:
        yield from open_tensors(directory / file)


def open_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one safetensors file. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        has_bin = path.with_name("pytorch_model.bin").is_file()
        hint = " (pytorch_model.bin is not read: save it as safetensors)" if has_bin else ""
        raise UserError(f"{path}: no such file{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from error


def published_vision(directory: Path) -> VisionConfig:
    """config.json of a CLIP directory -> our dimensions."""
    values = read_json(directory / "config.json")
    values = values.get("vision_config", values)
    theirs = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
    theirs += ("num_attention_heads", "intermediate_size")
    return VisionConfig(*(_field(directory, values, name) for name in theirs))


def published_decoder(directory: Path, like: DecoderConfig) -> DecoderConfig:
    """config.json of a Phi-2 or StableLM-2 directory -> our dimensions; the rest as in `like`."""
    values = read_json(directory / "config.json")
    values |= values.get("rope_parameters") or {}  # where transformers 5 puts them
    heads, width, partial = (
        _field(directory, values, name)
        for name in ("num_attention_heads", "hidden_size", "partial_rotary_factor")
    )
    return DecoderConfig(
        family=_field(directory, values, "model_type"),
        vocab_size=_field(directory, values, "vocab_size"),
        d_model=width,
        n_layers=_field(directory, values, "num_hidden_layers"),
        n_heads=heads,
        d_ff=_field(directory, values, "intermediate_size"),
        rotary_dim=int(width // heads * partial),
        rope_theta=values.get("rope_theta", like.rope_theta),
        max_len=values.get("max_position_embeddings", like.max_len),
        dropout=values.get("resid_pdrop", like.dropout),
    )


def _field(directory: Path, values: dict, name: str):
    if name not in values:
        raise UserError(f"{directory}: its JSON lacks {name!r}")
    return values[name]


def load_published(model: nn.Module, config: ModelConfig, clip: Path, llm: Path) -> None:
    """Fill the tower from `clip`, the decoder from `llm`. Raises UserError if they do not fit."""
    for flag, directory, found, wanted in (
        ("--clip", clip, published_vision(clip), config.vision),
        ("--llm", llm, published_decoder(llm, config.decoder), config.decoder),
    ):
        if found != wanted:
            raise UserError(f"{flag} {directory}: {found} is not the preset's {wanted}")
    try:
        fill(model, "vision.", read_tensors(clip), clip_table(config.vision))
        fill(model, "decoder.", read_tensors(llm), DECODERS[config.decoder.family])
    except (KeyError, ValueError) as error:
        raise UserError(f"{clip} or {llm}: {error.args[0]}") from error
