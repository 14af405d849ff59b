"""Published weights fill our model strictly; config.json is read, or refused by its field."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import CLIP_TINY, PRESETS, DecoderConfig, UserError, preset
from engine import published as parts
from engine.published import DECODERS, clip_table, load_published, rename
from lab.convert import publish
from model import MedMoE
from tests.conftest import DECODERS as CONFIGS
from tests.conftest import VISION, shake
from tests.mini import same
from tests.published import decoder_fields, vision_fields, write_published

PHI2 = Path(__file__).parents[3] / "shared" / "data" / "phi2"


def names(text, layer="model.layers.1."):
    """Names at spaces: an L is this layer, * is weight and bias."""
    each = (n.replace("L.", layer) for n in text.split())
    return [n.replace("*", x) for n in each for x in (["weight", "bias"] if "*" in n else [""])]


# What the published files hold: the layer with index 1, and what is beside the layers.
QKV = "L.self_attn.q_proj.* L.self_attn.k_proj.* L.self_attn.v_proj.*"
NAMES = {
    "clip": names(f"""{QKV} L.self_attn.out_proj.* L.layer_norm1.* L.layer_norm2.* L.mlp.fc1.*
        L.mlp.fc2.* vision_model.pre_layrnorm.* vision_model.embeddings.class_embedding
        vision_model.embeddings.patch_embedding.weight
        vision_model.embeddings.position_embedding.weight""", "vision_model.encoder.layers.1."),
    "phi": names(f"""{QKV} L.self_attn.dense.* L.input_layernorm.* L.mlp.fc1.* L.mlp.fc2.*
        model.embed_tokens.weight model.final_layernorm.* lm_head.*"""),
    "stablelm": names(f"""{QKV} L.self_attn.o_proj.weight L.input_layernorm.*
        L.post_attention_layernorm.* L.mlp.gate_proj.weight L.mlp.up_proj.weight
        L.mlp.down_proj.weight model.embed_tokens.weight model.norm.* lm_head.weight"""),
}  # fmt: skip
LEFT_OUT = names("""L.mlp.fc1.weight vision_model.embeddings.position_ids logit_scale
    vision_model.post_layernorm.weight visual_projection.weight text_model.encoder.weight""",
    "vision_model.encoder.layers.2.")  # fmt: skip  # the last of three layers


def part(model, prefix):
    return {n: p.detach() for n, p in model.named_parameters() if n.startswith(prefix)}


def config_of(directory, fields, **change):
    """A directory with this config.json; a field that is changed to ... is missing."""
    values = {k: v for k, v in (fields | change).items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("which", NAMES)
def test_every_parameter_has_its_published_name(build, which):
    table = clip_table(VISION) if which == "clip" else DECODERS[which]
    prefix = "vision." if which == "clip" else "decoder."
    ours = part(build("phi" if which == "clip" else which), prefix)
    theirs = publish(ours, table)
    assert {k for k in theirs if ".layers.1." in k or ".layers." not in k} == {*NAMES[which]}
    assert {rename(key, table) for key in theirs} == {*ours}


@pytest.mark.parametrize(("form", "family"), [
    ("", "phi"), ("", "stablelm"), ("", "llama"), ("bare", "phi"), ("whole clip", "phi"),
    ("no biases", "stablelm"), ("tied", "llama")])  # fmt: skip
def test_publishing_and_loading_again_is_bitwise_in_every_form(build, tmp_path, form, family):
    """transformers 5's towers and openai/clip's; StableLM-2's norms; a head stored twice."""
    config = replace(build(family).config, decoder=replace(CONFIGS[family], tied=form == "tied"))
    model, other = shake(MedMoE(config)), shake(MedMoE(config), seed=1)
    untouched = {n: p.clone() for n, p in part(other, "projector.").items()}
    clip, llm = write_published(model, tmp_path)
    file = (llm if form in ("tied", "no biases") else clip) / "model.safetensors"
    tensors = load_file(file)
    if form == "tied":
        tensors["lm_head.weight"] = torch.zeros(64, 32)
    if form == "bare":
        tensors = {key.removeprefix("vision_model."): t for key, t in tensors.items()}
    if form == "whole clip":
        tensors |= {key: torch.zeros(3) for key in LEFT_OUT}
        config_of(clip, {"vision_config": vision_fields(VISION)}, hidden_size=7)
    if form == "no biases":
        tensors = {key: t for key, t in tensors.items() if "layernorm.bias" not in key}
        for block in model.decoder.blocks:
            block.ln_1.bias.data.zero_(), block.ln_2.bias.data.zero_()
    save_file(tensors, file)
    load_published(other, config, clip, llm)
    for prefix in ("vision.", "decoder."):
        assert same(part(other, prefix), part(model, prefix))
    assert len(untouched) == 4 and same(part(other, "projector."), untouched)


@pytest.mark.parametrize(("family", "change", "message"), [
    ("phi", {"model.layers.1.mlp.fc1.weight": None}, "decoder.blocks.1.mlp.fc1.weight"),
    ("stablelm", {"model.layers.0.input_layernorm.bias": None}, r"ln_1.bias'\] \(1 in all"),
    ("llama", {"more": torch.zeros(1)}, "'more' is in the checkpoint but in no row"),
    ("phi", {"lm_head.weight": torch.zeros(65, 32)}, r"\(65, 32\), expected \(64, 32\)"),
    ("phi", {"lm_head.bias": torch.zeros(64).long()}, "lm_head.bias.*int64, expected a float"),
    ("phi", {"lm_head.bias": torch.full((64,), -torch.inf)}, "lm_head.bias.*NaN or infinite"),
    ("phi", {"model.layers.3.input_layernorm.bias": torch.zeros(32)}, "3.*not a parameter"),
])  # fmt: skip
def test_a_file_or_size_that_does_not_fit_is_named(build, tmp_path, family, change, message):
    clip, llm = write_published(model := build(family), tmp_path)
    tensors = load_file(llm / "model.safetensors") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, llm / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_published(model, model.config, clip, llm)
    config_of(llm, decoder_fields(model.config.decoder), num_hidden_layers=4)
    with pytest.raises(UserError, match=f"^--llm {llm}: .* is not the preset's"):
        load_published(model, model.config, clip, llm)


PHI = DecoderConfig("phi", 64, 32, 3, 4, 48, rotary_dim=4)
FIELDS = decoder_fields(PHI)
TOWER = vision_fields(VISION)
LLAMA = {"model_type": "llama", "hidden_act": "silu"}


@pytest.mark.parametrize(("change", "ours"), [
    ({"num_key_value_heads": 4, "head_dim": 8, "hidden_act": "gelu_new"}, {}),
    ({"max_position_embeddings": ..., "num_key_value_heads": ..., "tie_word_embeddings": ...}, {}),
    ({"rope_theta": 0.5, "resid_pdrop": 0.25, "layer_norm_eps": 0.125},
     {"rope_theta": 0.5, "dropout": 0.25, "norm_eps": 0.125}),
    ({"max_position_embeddings": 1, "num_key_value_heads": 2, "tie_word_embeddings": True},
     {"max_len": 1, "n_kv_heads": 2, "tied": True}), ({"partial_rotary_factor": 0.3},
     {"rotary_dim": 2}), ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
     {"rope_theta": 5.0}),
    (LLAMA | {"partial_rotary_factor": ..., "rms_norm_eps": 1e-6, "layer_norm_eps": 1.0},
     {"family": "llama", "rotary_dim": 8, "norm_eps": 1e-6}),
    ({"model_type": "stablelm_epoch", "partial_rotary_factor": ..., "rope_pct": 0.25,
      "norm_eps": 1e-6}, {"family": "stablelm", "rotary_dim": 2, "norm_eps": 1e-6})])  # fmt: skip
def test_a_decoders_config_is_read(tmp_path, change, ours):
    assert parts.published_decoder(config_of(tmp_path, FIELDS, **change)) == replace(PHI, **ours)
    other = config_of(tmp_path, FIELDS, model_type="llava")
    assert parts.published_decoder(other, "stablelm") == replace(PHI, family="stablelm")


@pytest.mark.parametrize(("base", "name", "value"), [
    ({}, "hidden_act", "relu"), ({}, "qk_layernorm", True), ({}, "attention_dropout", 0.1),
    ({}, "model_type", "mamba"), ({}, "rope_scaling", {"type": "linear"}),
    ({}, "rope_parameters", [1]), ({}, "rope_parameters", {"rope_type": "yarn"}),
    ({}, "num_hidden_layers", 0), ({}, "num_hidden_layers", True), ({}, "hidden_size", 32.0),
    ({}, "num_key_value_heads", 3), ({}, "num_attention_heads", 5), ({}, "head_dim", 7),
    ({}, "resid_pdrop", "big"), ({}, "resid_pdrop", -0.1), ({}, "vocab_size", ...),
    (LLAMA, "attention_bias", True), (LLAMA, "mlp_bias", True), ({}, "embd_pdrop", 0.1),
    ({"model_type": "stablelm", "hidden_act": "silu"}, "use_parallel_residual", True),
    (TOWER, "hidden_act", "gelu"), (TOWER, "patch_size", 0), (TOWER, "image_size", ...),
    (TOWER, "vision_config", 3),
])  # fmt: skip
def test_what_the_code_does_not_compute_is_refused_by_name(tmp_path, base, name, value):
    read = parts.published_vision if base is TOWER else parts.published_decoder
    read(config_of(tmp_path, FIELDS, **base))
    named = {"rope_parameters": "rope_", "num_attention_heads": "5 heads", "head_dim": "heads of 7"}
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{named.get(name, name)}"):
        read(config_of(tmp_path, FIELDS, **base | {name: value}))


# As transformers writes it today, and what differs in the file of CLIP-L/14-336 (but for its 336).
NEW = json.loads((preset("tiny").clip / "preprocessor_config.json").read_text())
OLD = {"size": 112, "crop_size": 112, "do_rescale": None, "rescale_factor": None}


@pytest.mark.parametrize(("change", "named"), [
    ({}, ""), (OLD, ""), (dict.fromkeys(NEW), ""), ({"image_std": (0.2686295, 0.2613026,
     0.2757771)}, ""), ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean [0.5"),
    ({"image_std": [1.0]}, "image_std"), ({"image_mean": "clip"}, "image_mean"),
    ({"size": 224}, "size {'shortest_edge': 224}"), ({"size": {"longest_edge": 112}}, "size"),
    ({"size": {"height": 112, "width": 112}}, "size"), ({"crop_size": 30}, "crop_size"),
    ({"resample": 2}, "resample 2"), ({"do_center_crop": False}, "do_center_crop False"),
    ({"do_rescale": False}, "do_rescale"), ({"rescale_factor": 1.0}, "rescale_factor"),
])  # fmt: skip
def test_other_preprocessing_than_ours_is_refused_by_name(tmp_path, change, named):
    config_of(tmp_path, vision_fields(CLIP_TINY))
    for name, values in (("preprocessor_config", NEW | change),
                         ("processor_config", {"image_processor": NEW | change})):  # fmt: skip
        (file := tmp_path / f"{name}.json").write_text(json.dumps(values))
        if named:
            with pytest.raises(UserError, match=re.escape(f"{file}: {named}")):
                parts.published_vision(tmp_path)
            file.unlink()
        else:
            assert parts.published_vision(tmp_path) == CLIP_TINY


@pytest.mark.skipif(not PHI2.is_dir(), reason=f"{PHI2} is not there")
def test_phi_2s_config_is_the_preset_and_its_453_tensors_are_ours_one_to_one():
    assert parts.published_decoder(PHI2) == PRESETS["phi2"].model.decoder
    index = json.loads((PHI2 / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        ours = part(MedMoE(preset("phi2").model), "decoder.")
    assert sorted(rename(key, DECODERS["phi"]) for key in index["weight_map"]) == sorted(ours)
    assert len(ours) == 453
