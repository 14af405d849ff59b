"""Published weights fill our model strictly; config.json is read, or refused by the field's name.

What needs the published files themselves skips where the folder of development data is absent.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from config import PRESETS, DecoderConfig, MoEConfig, UserError, VisionConfig, preset
from data import EOS, Text
from engine import published
from engine.published import DECODERS, clip_table, decoder_table, fill, load_published, rename
from lab.convert import publish
from model import MedMoE, make_sparse
from sources.tensorfiles import open_tensors
from tests.conftest import DECODERS as CONFIGS
from tests.conftest import VISION, shake
from tests.mini import same
from tests.published import decoder_fields, vision_fields, write_published

FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
DATA = Path(__file__).parents[3] / "shared" / "data"
PHI2 = DATA / "phi2"
needs_phi2 = pytest.mark.skipif(not PHI2.is_dir(), reason=f"{PHI2} is not there")


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


def tied(seed=0):
    config = replace(CONFIGS["llama"], tied=True)
    return shake(MedMoE(replace(preset("tiny").model, vision=VISION, decoder=config)), seed)


def changed(directory, fields, change):
    """A directory with this config.json; a field that is changed to ... is missing."""
    values = {k: v for k, v in (fields | change).items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("which", NAMES)
def test_every_parameter_has_its_published_name_and_every_row_of_the_table_is_one(build, which):
    table = clip_table(VISION) if which == "clip" else DECODERS[which]
    ours = part(build("phi" if which == "clip" else which),
                "vision." if which == "clip" else "decoder.")  # fmt: skip
    theirs = publish(ours, table)
    assert {k for k in theirs if ".layers.1." in k or ".layers." not in k} == {*NAMES[which]}
    assert {rename(key, table) for key in theirs} == {*ours}
    for row in filter(table.get, table):
        with pytest.raises(KeyError, match="in no row"):  # of a table without this one
            publish(ours, {key: name for key, name in table.items() if key != row})


def test_what_is_left_out_is_named_and_the_last_layer_is_part_of_it():
    assert [rename(key, clip_table(VISION)) for key in LEFT_OUT] == [None] * 6
    of_24 = clip_table(replace(VISION, n_layers=24))
    assert rename("vision_model.encoder.layers.23.mlp.fc1.bias", of_24) is None
    assert rename("vision_model.encoder.layers.2.mlp.fc1.bias", of_24) == "vision.blocks.2.fc1.bias"


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.rotary_emb.inv_freq", "",
                                 "model.layers.x.mlp.fc1.weight", "model.layers.0.mlp.fc1.weights",
                                 "xmodel.embed_tokens.weight", "model_embed_tokens.weight",
                                 "model.embed_tokens.weight\n"])  # fmt: skip
def test_a_name_that_no_row_knows_is_refused(key):
    with pytest.raises(KeyError, match="in no row of the table"):
        rename(key, DECODERS["phi"])


def test_stored_are_parameters_and_persistent_buffers_and_a_tied_weight_once():
    module = nn.BatchNorm1d(2)
    module.register_buffer("passing", torch.zeros(1), persistent=False)
    assert {*published.stored(module)} == {*module.state_dict()} and len(module.state_dict()) == 5
    assert "decoder.lm_head.weight" not in published.stored(tied())


def test_a_stacked_parameter_can_be_filled_expert_by_expert(build):
    model, place = build("phi", {"n_experts": 3}), "decoder.blocks.2.mlp.experts"
    found = published.slots(model, ("decoder.", "projector."), by_expert=True)
    for e, share in enumerate(model.get_parameter(f"{place}.fc1.weight")):
        assert found[f"{place}[{e}].fc1.weight"].data_ptr() == share.data_ptr()
    assert not [n for n in found if "experts." in n or n.startswith("vision.")]
    assert f"{place}.fc1.weight" in published.slots(model, "decoder.")


def layers():
    module = nn.ModuleDict({"fc1": nn.Linear(3, 5), "fc2": nn.Linear(5, 2)})
    module.register_buffer("n", torch.tensor(7))
    return module


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fc1.bias": None, "fc2.bias": None}, KeyError, r"'fc1.bias', 'fc2.bias'.*2 in all"),
        ({"extra": torch.zeros(1)}, KeyError, "'extra': not a parameter"),
        ({"fc1.bias": torch.zeros(1)}, ValueError, r"fc1.bias.*\(1,\), expected \(5,\)"),
        ({"fc1.bias": torch.zeros(5).long()}, ValueError, "int64, expected a float type"),
        ({"n": torch.tensor(7.0)}, ValueError, "float32, expected torch.int64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, error, message):
    tensors = {n: t for n, t in (layers().state_dict() | change).items() if t is not None}
    with pytest.raises(error, match=message):
        fill(layers(), "", tensors.items(), None)


def test_a_float_of_another_width_is_cast_and_what_comes_twice_or_is_elsewhere_refused():
    module, tensors = layers(), layers().state_dict()
    fill(module, "", (tensors | {"fc1.bias": torch.ones(5).half()}).items(), None)
    assert same(module.state_dict(), tensors | {"fc1.bias": torch.ones(5)})
    with pytest.raises(KeyError, match=r"fc2.bias.*filled twice"):
        fill(module, "", [*tensors.items(), ("fc2.bias", torch.zeros(2))], None)
    with pytest.raises(KeyError, match="'n': not a parameter"):
        fill(module, "fc", tensors.items(), None)


@FAMILIES
def test_publishing_and_loading_again_is_bitwise(build, tmp_path, family):
    model, other = build(family), build(family, seed=1)
    untouched = {n: p.clone() for n, p in part(other, "projector.").items()}
    load_published(other, other.config, *write_published(model, tmp_path))
    for prefix in ("vision.", "decoder."):
        assert same(part(other, prefix), part(model, prefix))
    assert len(untouched) == 4 and same(part(other, "projector."), untouched)
    with pytest.raises(KeyError, match=r"mlp\.router\.proj\.weight"):  # a sparse one has no name
        publish(part(build(family, {}), "decoder."), DECODERS[family])


@pytest.mark.parametrize("form", ["bare", "whole clip", "no biases", "tied"])
def test_other_forms_of_a_file_are_read(build, tmp_path, form):
    """transformers 5's towers and openai/clip's; StableLM-2's norms; a head stored twice."""
    family = {"tied": "llama", "no biases": "stablelm"}.get(form, "phi")
    model, other = (tied(i) if form == "tied" else build(family, seed=i) for i in (0, 1))
    clip, llm = write_published(model, tmp_path)
    file = (clip if family == "phi" else llm) / "model.safetensors"
    tensors = load_file(file)
    if form == "tied":
        tensors["lm_head.weight"] = torch.zeros(64, 32)
    if form == "bare":
        tensors = {key.removeprefix("vision_model."): t for key, t in tensors.items()}
    if form == "whole clip":
        tensors |= {key: torch.zeros(3) for key in LEFT_OUT}
        changed(clip, {"vision_config": vision_fields(VISION)}, {"hidden_size": 7})
    if form == "no biases":
        tensors = {key: t for key, t in tensors.items() if "layernorm.bias" not in key}
        for block in model.decoder.blocks:
            block.ln_1.bias.data.zero_(), block.ln_2.bias.data.zero_()
    save_file(tensors, file)
    load_published(other, other.config, clip, llm)
    for prefix in ("vision.", "decoder."):
        assert same(part(other, prefix), part(model, prefix))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("phi", {"model.layers.1.mlp.fc1.weight": None}, "decoder.blocks.1.mlp.fc1.weight"),
        ("stablelm", {"model.layers.0.input_layernorm.bias": None}, r"ln_1.bias'\] \(1 in all"),
        ("llama", {"more": torch.zeros(1)}, "'more' is in the checkpoint but in no row"),
        ("phi", {"lm_head.weight": torch.zeros(65, 32)}, r"\(65, 32\), expected \(64, 32\)"),
        ("phi", {"model.layers.01.input_layernorm.bias": torch.zeros(32)}, "01.*not a parameter"),
        ("phi", {"model.layers.3.input_layernorm.bias": torch.zeros(32)}, "3.*not a parameter"),
    ],
)
def test_a_published_file_that_does_not_fit_is_a_user_error(
    build, tmp_path, family, change, message
):
    clip, llm = write_published(model := build(family), tmp_path)
    tensors = load_file(llm / "model.safetensors") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, llm / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_published(model, model.config, clip, llm)


# config.json

PHI = DecoderConfig("phi", 64, 32, 3, 4, 48, rotary_dim=4)
FIELDS = decoder_fields(PHI)
LLAMA = {"model_type": "llama", "hidden_act": "silu"}
STABLELM = {"model_type": "stablelm", "hidden_act": "silu"}


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        ({}, {}), ({"num_key_value_heads": 4, "head_dim": 8}, {}),
        (dict.fromkeys(("max_position_embeddings", "num_key_value_heads", "tie_word_embeddings"),
                       ...), {}),  # the defaults
        ({"rope_theta": 0.5, "resid_pdrop": 0.25, "layer_norm_eps": 0.125},
         {"rope_theta": 0.5, "dropout": 0.25, "norm_eps": 0.125}),
        ({"max_position_embeddings": 1, "vocab_size": 10**12 - 1},
         {"max_len": 1, "vocab_size": 10**12 - 1}),
        ({"num_key_value_heads": 2}, {"n_kv_heads": 2}),
        ({"tie_word_embeddings": True, "hidden_act": "gelu_new"}, {"tied": True}),
        ({"partial_rotary_factor": 0.3}, {"rotary_dim": 2}),
        ({"partial_rotary_factor": 0}, {"rotary_dim": 0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {"rope_theta": 5.0}),
        (LLAMA | {"partial_rotary_factor": ..., "rms_norm_eps": 1e-6, "layer_norm_eps": 1.0},
         {"family": "llama", "rotary_dim": 8, "norm_eps": 1e-6}),
        ({"model_type": "stablelm_epoch", "partial_rotary_factor": ..., "rope_pct": 0.25,
          "norm_eps": 1e-6}, {"family": "stablelm", "rotary_dim": 2, "norm_eps": 1e-6}),
    ],
)  # fmt: skip
def test_a_decoders_config_is_read(tmp_path, change, ours):
    assert published.published_decoder(changed(tmp_path, FIELDS, change)) == replace(PHI, **ours)
    other = changed(tmp_path, FIELDS, {"model_type": "llava"})
    assert published.published_decoder(other, "stablelm") == replace(PHI, family="stablelm")


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        ({}, "hidden_act", "relu"), ({}, "qk_layernorm", True), ({}, "embd_pdrop", 0.1),
        ({}, "attention_dropout", 0.1), ({}, "model_type", "mamba"), ({}, "model_type", ...),
        ({}, "rope_scaling", {"type": "linear"}), ({}, "rope_parameters", [1]),
        ({}, "num_hidden_layers", 0), ({}, "num_hidden_layers", True),
        ({}, "num_key_value_heads", 3), ({}, "max_position_embeddings", -1),
        ({}, "resid_pdrop", "big"), ({}, "resid_pdrop", -0.1), ({}, "layer_norm_eps", None),
        ({}, "hidden_size", "32"), ({}, "hidden_size", 32.0), ({}, "vocab_size", 10**12),
        ({}, "vocab_size", ...), ({}, "partial_rotary_factor", ...),
        (LLAMA, "attention_bias", True), (LLAMA, "mlp_bias", True),
        (STABLELM, "use_qkv_bias", False), (STABLELM, "use_parallel_residual", True),
        (STABLELM, "qk_layernorm", True), (STABLELM, "hidden_act", "gelu_new"),
    ],
)  # fmt: skip
def test_what_the_code_does_not_compute_is_refused_by_name(tmp_path, base, name, value):
    published.published_decoder(changed(tmp_path, FIELDS, base))
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{name}"):
        published.published_decoder(changed(tmp_path, FIELDS, base | {name: value}))


@pytest.mark.parametrize(("change", "message"), [
    ({"head_dim": 7}, "4 heads of 7 in 32"), ({"num_attention_heads": 5}, "5 heads of None in 32"),
    ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_scaling .*yarn"),
])  # fmt: skip
def test_heads_that_do_not_fill_the_width_and_scaled_rope_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        published.published_decoder(changed(tmp_path, FIELDS, change))


@pytest.mark.parametrize(("name", "value"), [("hidden_act", "gelu"), ("layer_norm_eps", 1e-6),
                                             ("attention_dropout", 0.1), ("num_channels", 1),
                                             ("patch_size", 0), ("image_size", ...)])  # fmt: skip
def test_a_towers_config_is_read_or_refused_by_name(tmp_path, name, value):
    ours = {"num_channels": 3, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
    for change in ({}, ours):
        assert (
            published.published_vision(changed(tmp_path, vision_fields(VISION), change)) == VISION
        )
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{name}"):
        published.published_vision(changed(tmp_path, vision_fields(VISION), {name: value}))


def test_another_size_than_the_presets_is_refused_with_the_flag(build, tmp_path):
    clip, llm = write_published(model := build(), tmp_path)
    changed(llm, decoder_fields(model.config.decoder), {"num_hidden_layers": 4})
    with pytest.raises(UserError, match=f"^--llm {llm}: .* is not the preset's"):
        load_published(model, model.config, clip, llm)
    changed(clip, vision_fields(VISION), {"patch_size": 8})
    with pytest.raises(UserError, match=f"^--clip {clip}: .* is not the preset's"):
        load_published(model, model.config, clip, llm)


# Full sizes


def on_meta(name, moe=None):
    with torch.device("meta"):
        model = MedMoE(preset(name).model)
        if moe:
            make_sparse(model, moe)
    return model


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "n"), [("phi2", 2_779_683_840), ("stablelm2", 1_644_515_328), ("smollm2", 134_515_008)]
)
def test_full_sizes_have_the_published_number_of_parameters_under_published_names(name, n):
    model = on_meta(name)
    vision, decoder = model.config.vision, model.config.decoder
    assert vision == VisionConfig(336, 14, 1024, 24, 16, 4096)
    unused = count(model.vision.blocks[0]) + 2 * vision.width  # the last layer, post_layernorm
    assert count(model.decoder) == n and count(model.vision) + unused == 303_507_456
    for prefix, table in (("vision.", clip_table(vision)), ("decoder.", decoder_table(decoder))):
        ours = part(model, prefix)
        assert len(publish(ours, table)) == len(ours)


@needs_phi2
def test_phi_2s_config_is_the_preset_and_its_453_tensors_are_ours_one_to_one():
    assert published.published_decoder(PHI2) == PRESETS["phi2"].model.decoder
    index = json.loads((PHI2 / "model.safetensors.index.json").read_text())
    ours = part(on_meta("phi2"), "decoder.")
    assert sorted(rename(key, DECODERS["phi"]) for key in index["weight_map"]) == sorted(ours)
    assert len(ours) == 453
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in ours.values())


@needs_phi2
@pytest.mark.parametrize(("name", "big"), [("phi", "phi2"), ("stablelm", "stablelm2")])
def test_med_moes_published_routers_fit(name, big):
    tensors = dict(open_tensors(DATA / "routers" / f"{name}_router.pth"))
    proj = on_meta(big, MoEConfig()).decoder.blocks[0].mlp.router.proj
    shapes = {f"fc1.{n}": p.shape for n, p in proj.named_parameters()}
    assert {n: t.shape for n, t in tensors.items()} == shapes


@needs_phi2
def test_phi_2s_tokenizer_is_its_vocab_and_merges_and_a_rule_for_white_space():
    ours, rng = Text(PHI2), random.Random(0)
    merges = [tuple(x.split()) for x in (PHI2 / "merges.txt").read_text().splitlines()[1:] if x]
    theirs = Tokenizer(models.BPE(json.loads((PHI2 / "vocab.json").read_text()), merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    spaces = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    theirs.add_tokens([AddedToken(s, normalized=True) for s in spaces])
    pieces = [*" \t\n\r.,?!'-0123456789abcXYZé肺🫁½", *spaces, "\n\n", "<image>", EOS, "<|", "|>",
              "USER:", " ASSISTANT:", "n't", "'s", "\u200d", "\u00a0"]  # fmt: skip
    for _ in range(3_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 30)))
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids and ours.decode(ids) == text
        assert ours.eos_id == 50256 and 50256 not in ids  # what a user types is text
