"""A model of ours written as its parts are published."""

import json

import torch
from safetensors.torch import save_file

from engine.published import clip_table, decoder_table, slots
from lab.convert import publish


def vision_fields(c):
    return {"image_size": c.image_size, "patch_size": c.patch_size, "hidden_size": c.width,
            "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
            "intermediate_size": c.d_ff}  # fmt: skip


def decoder_fields(c):
    return {"model_type": c.family, "vocab_size": c.vocab_size, "hidden_size": c.d_model,
            "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_kv_heads, "intermediate_size": c.d_ff,
            "partial_rotary_factor": c.rotary_dim * c.n_heads / c.d_model,
            "max_position_embeddings": c.max_len, "tie_word_embeddings": c.tied}  # fmt: skip


def write_published(model, folder):
    """Its tower in folder/clip and, if it is dense, its decoder in folder/llm -> both."""
    vision, decoder = model.config.vision, model.config.decoder
    parts = [("clip", "vision.", clip_table(vision), vision_fields(vision))]
    if model.config.moe is None:
        parts.append(("llm", "decoder.", decoder_table(decoder), decoder_fields(decoder)))
    for name, prefix, table, fields in parts:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(fields))
        tensors = publish(slots(model, prefix), table, torch.float32)
        save_file(tensors, folder / name / "model.safetensors")
    return folder / "clip", folder / "llm"
