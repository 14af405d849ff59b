"""Weights are loaded strictly, and a checkpoint is written whole, read back bitwise, or refused.

python -m pytest tests/test_weights.py
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import data
from checkpoint import load_checkpoint, load_model, read_config, save_checkpoint
from config import MoEConfig, UserError, model_config, to_dict
from engine.durable import seal
from engine.published import CLIP, DECODERS, clip_table, fill, load_published, rename
from lab.convert import publish
from model import MedMoE
from sources.tensorfiles import read_tensors

FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])


def both(*names, under=""):
    return [f"{under}{name}.{kind}" for name in names for kind in ("weight", "bias")]


# What the published files hold, written out: the layer with index 1, and what is beside layers.
CLIP_LAYER, LAYER = "vision_model.encoder.layers.1.", "model.layers.1."
PUBLISHED = {
    "clip": [
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        *both("vision_model.pre_layrnorm"),
        *both("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", under=CLIP_LAYER),
        *both("q_proj", "k_proj", "v_proj", "out_proj", under=f"{CLIP_LAYER}self_attn."),
    ],
    "phi": [
        "model.embed_tokens.weight",
        *both("model.final_layernorm", "lm_head"),
        *both("input_layernorm", "mlp.fc1", "mlp.fc2", under=LAYER),
        *both("q_proj", "k_proj", "v_proj", "dense", under=f"{LAYER}self_attn."),
    ],
    "stablelm": [
        "model.embed_tokens.weight",
        "lm_head.weight",
        *both("model.norm"),
        *both("input_layernorm", "post_attention_layernorm", under=LAYER),
        *both("q_proj", "k_proj", "v_proj", under=f"{LAYER}self_attn."),
        f"{LAYER}self_attn.o_proj.weight",
        *(f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    ],
}
LEFT_OUT = [
    "vision_model.embeddings.position_ids",
    "vision_model.encoder.layers.2.mlp.fc1.weight",  # the last of three
    "vision_model.encoder.layers.2.layer_norm2.bias",
    "vision_model.post_layernorm.weight",
    "visual_projection.weight",
    "text_model.encoder.layers.0.mlp.fc1.weight",
    "text_projection.weight",
    "logit_scale",
]


def part(model, prefix):
    """Its parameters under a prefix, in values that fp16 holds exactly."""
    return {n: p.detach().half() for n, p in model.named_parameters() if n.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def tensors_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def published(build, tmp_path):
    """A function: family -> a model in fp16's values, and CLIP and LLM directories that hold it."""

    def write(family):
        model = build(family)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.half())
        vision, decoder = model.config.vision, model.config.decoder
        clip, llm = tmp_path / "clip", tmp_path / family
        clip.mkdir()
        llm.mkdir()
        save_file(publish(part(model, "vision."), clip_table(vision)), clip / "model.safetensors")
        save_file(publish(part(model, "decoder."), DECODERS[family]), llm / "model.safetensors")
        fields = {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.n_layers,
            "num_attention_heads": vision.n_heads,
            "intermediate_size": vision.d_ff,
        }
        (clip / "config.json").write_text(json.dumps({"vision_config": fields}))
        fields = {
            "model_type": family,
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.d_model,
            "num_hidden_layers": decoder.n_layers,
            "num_attention_heads": decoder.n_heads,
            "intermediate_size": decoder.d_ff,
            "max_position_embeddings": decoder.max_len,
            "partial_rotary_factor": decoder.rotary_dim * decoder.n_heads / decoder.d_model,
            "num_key_value_heads": decoder.n_kv_heads or decoder.n_heads,
        }
        (llm / "config.json").write_text(json.dumps(fields))
        return model, clip, llm

    return write


# The tables


@pytest.mark.parametrize(("table", "family"), [("clip", "phi"), ("phi", "phi"), ("stablelm",) * 2])
def test_every_row_is_used_and_names_what_is_published(build, table, family):
    model = build(family)
    rows = clip_table(model.config.vision) if table == "clip" else DECODERS[family]
    prefix = "vision." if table == "clip" else "decoder."
    tensors = part(model, prefix)
    named = publish(tensors, rows)
    layer_1 = {key for key in named if ".layers.1." in key or ".layers." not in key}
    assert layer_1 == set(PUBLISHED[table])
    ours = {rename(key, rows) for key in named}
    assert ours == set(tensors)
    keys = [*named, *(LEFT_OUT if table == "clip" else [])]
    for row, target in rows.items():
        hits = [key for key in keys if hits_row(key, row, target)]
        assert hits, f"row {row} matches nothing"


def hits_row(key, row, target):
    try:
        rename(key, {row: target})
    except KeyError:
        return False
    return True


def test_what_is_left_out_is_named_and_nothing_else_is(build):
    rows = clip_table(build().config.vision)
    assert [rename(key, rows) for key in LEFT_OUT] == [None] * len(LEFT_OUT)
    assert all(rename(key, rows) for key in PUBLISHED["clip"])
    of_24 = clip_table(replace(build().config.vision, n_layers=24))
    assert rename("vision_model.encoder.layers.23.mlp.fc1.bias", of_24) is None
    assert rename("vision_model.encoder.layers.2.mlp.fc1.bias", of_24) == "vision.blocks.2.fc1.bias"


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.x.mlp.fc1.weight",
        "model.layers.0.mlp.fc1.weights",
        "xmodel.embed_tokens.weight",
        "model_embed_tokens.weight",  # a dot is a dot, not any character
        "model.embed_tokens.weight\n",
        "",
    ],
)
def test_a_name_that_no_row_knows_is_refused(key):
    with pytest.raises(KeyError, match="in no row of the table"):
        rename(key, DECODERS["phi"])


@FAMILIES
def test_publishing_and_loading_again_is_bitwise(build, published, family):
    model, clip, llm = published(family)
    other = build(family, seed=1)
    assert not same(part(other, "vision."), part(model, "vision."))
    load_published(other, other.config, clip, llm)
    for prefix in ("vision.", "decoder."):
        ours = {n: p for n, p in other.named_parameters() if n.startswith(prefix)}
        assert same(ours, {n: p for n, p in model.named_parameters() if n.startswith(prefix)})
    projector = [p for n, p in tensors_of(other).items() if n.startswith("projector.")]
    untouched = [p for n, p in build(family, seed=1).named_parameters() if "projector" in n]
    assert all(torch.equal(a, b) for a, b in zip(projector, untouched, strict=True))


def test_publishing_what_has_no_published_name_is_refused(build):
    sparse = build("phi", {})
    with pytest.raises(KeyError, match=r"mlp\.router\.proj\.weight"):
        publish(part(sparse, "decoder."), DECODERS["phi"])


@FAMILIES
def test_shards_listed_in_an_index_are_all_read(build, published, family):
    model, clip, llm = published(family)
    tensors = load_file(llm / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, llm / file)
    (llm / "model.safetensors").unlink()
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(dict(read_tensors(llm)), tensors)
    other = build(family, seed=1)
    load_published(other, other.config, clip, llm)
    assert same(part(other, "decoder."), part(model, "decoder."))
    (llm / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2-of-2\.safetensors: no such file"):
        load_published(other, other.config, clip, llm)


# Strictness


def test_a_missing_tensor_is_named(build):
    model = build()
    tensors = tensors_of(model)
    del tensors["projector.fc1.bias"], tensors["decoder.ln_f.weight"]
    with pytest.raises(KeyError, match=r"decoder.ln_f.weight', 'projector.fc1.bias'.*2 in all"):
        fill(model, "", iter(tensors.items()), None)


def test_an_unknown_tensor_is_named(build):
    model = build()
    tensors = tensors_of(model) | {"decoder.extra": torch.zeros(1)}
    with pytest.raises(KeyError, match=r"decoder.extra.*not a parameter, or filled twice"):
        fill(model, "", iter(tensors.items()), None)


def test_a_doubled_tensor_is_named(build):
    model = build()
    tensors = [*tensors_of(model).items(), ("projector.fc1.bias", torch.zeros(32))]
    with pytest.raises(KeyError, match=r"projector.fc1.bias.*not a parameter, or filled twice"):
        fill(model, "", iter(tensors), None)


def test_a_misshapen_tensor_is_named_with_both_shapes(build):
    model = build()
    for wrong in (torch.zeros(33), torch.zeros(1), torch.zeros(32, 1), torch.zeros(())):
        tensors = tensors_of(model) | {"projector.fc1.bias": wrong}
        with pytest.raises(ValueError) as error:
            fill(model, "", iter(tensors.items()), None)
        assert "projector.fc1.bias" in str(error.value)
        assert f"{tuple(wrong.shape)}, expected (32,)" in str(error.value)


def test_a_tensor_of_another_part_is_refused(build):
    model = build()
    tensors = {n: p for n, p in tensors_of(model).items() if not n.startswith("vision.")}
    with pytest.raises(KeyError, match=r"projector.fc1.weight.*not a parameter"):
        fill(model, "decoder.", iter(tensors.items()), None)


@FAMILIES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
            "decoder.blocks.1.attn.q.weight",
        ),
        (lambda t: t.update(more=torch.zeros(1)), "'more' is in the checkpoint but in no row"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(65, 32)}), r"\(65, 32\), expected"),
        (
            lambda t: t.update({"model.layers.01.input_layernorm.bias": torch.zeros(32)}),
            "layers.01.input_layernorm.bias.*not a parameter",
        ),
        (
            lambda t: t.update({"model.layers.3.input_layernorm.bias": torch.zeros(32)}),
            "layers.3.input_layernorm.bias.*not a parameter",
        ),
    ],
)
def test_a_published_file_that_does_not_fit_is_a_user_error(
    build, published, family, change, message
):
    _, clip, llm = published(family)
    tensors = load_file(llm / "model.safetensors")
    change(tensors)
    save_file(tensors, llm / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_published(build(family), build(family).config, clip, llm)


@FAMILIES
def test_a_published_config_of_another_size_is_a_user_error_that_names_the_flag(
    build, published, family
):
    _, clip, llm = published(family)
    config = build(family).config
    both_heads = ("num_key_value_heads", 4)
    for flag, directory, key, value in (
        ("--llm", llm, "num_hidden_layers", 4),
        ("--llm", llm, "num_attention_heads", 8),
        ("--llm", llm, *(("partial_rotary_factor", 1.0) if family != "llama" else both_heads)),
        ("--llm", llm, "rope_theta", 5000.0),
        ("--llm", llm, "model_type", "stablelm" if family == "llama" else "llama"),
        ("--clip", clip, "patch_size", 8),
    ):
        path = directory / "config.json"
        before = path.read_text()
        fields = json.loads(before)
        fields.get("vision_config", fields)[key] = value
        path.write_text(json.dumps(fields))
        with pytest.raises(UserError, match=f"^{flag} {directory}: .* is not the preset's"):
            load_published(build(family), config, clip, llm)
        path.write_text(before)
    load_published(build(family), config, clip, llm)


def test_published_directories_that_lack_something_are_user_errors(build, published):
    model, clip, llm = published("phi")

    def load():
        load_published(model, model.config, clip, llm)

    whole = (llm / "config.json").read_text()
    (llm / "config.json").write_text(whole.replace("hidden_size", "n_embd"))
    with pytest.raises(UserError, match="its JSON lacks 'hidden_size'"):
        load()
    (llm / "config.json").write_text(whole[:-9])
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        load()
    (llm / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: No such file"):
        load()
    (llm / "config.json").write_text(whole)
    path = llm / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        load()
    path.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: no such file"):
        load()


# Checkpoints of our own

META = {"phase": 3, "step": 7, "flags": {"seed": 0, "data": ["phantoms"], "lang": "en"}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    of = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    of.add_special_tokens([data.EOS])
    of.save(str(path))
    return path


def save(directory, model, tokenizer, **extra):
    save_checkpoint(directory, model, model.config, META, tokenizer, extra)


MODELS = pytest.mark.parametrize(
    ("family", "moe"), [("phi", None), ("stablelm", {"router": "topk", "top_k": 1}), ("phi", {})]
)


@MODELS
def test_a_checkpoint_is_read_back_bitwise_with_its_config(build, tmp_path, tokenizer, family, moe):
    model = build(family, moe)
    folder = tmp_path / "deep" / "phase3"
    save(folder, model, tokenizer, router={"weight": torch.ones(4, 32)})
    files = ["checksums.json", "config.json", "model.safetensors", "router.safetensors"]
    files.append("tokenizer.json")
    assert sorted(p.name for p in folder.iterdir()) == files
    assert [p.name for p in folder.parent.iterdir()] == ["phase3"]
    config, meta = read_config(folder)
    assert config == model.config
    assert meta == META
    other = MedMoE(config)
    load_checkpoint(other, folder)
    assert same(tensors_of(other), tensors_of(model))
    whole, text, meta = load_model(folder, torch.device("cpu"))
    assert same(tensors_of(whole), tensors_of(model))
    assert not whole.training and meta["step"] == 7 and text.eos_id == 2
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_saving_over_a_checkpoint_leaves_the_new_one_whole(build, tmp_path, tokenizer):
    folder = tmp_path / "phase3"
    save(folder, build(moe={}), tokenizer, trainer={"step": torch.ones(1)})
    model = build("stablelm", seed=1)
    save(folder, model, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["phase3"]
    assert not (folder / "trainer.safetensors").exists()
    whole, _, _ = load_model(folder, torch.device("cpu"))
    assert whole.config == model.config
    assert same(tensors_of(whole), tensors_of(model))


def test_what_an_interrupted_save_left_is_ignored_and_cleared(build, tmp_path, tokenizer):
    for left in (".phase3.part", ".phase3.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
        (tmp_path / left / "junk").write_bytes(b"half")
    folder, model = tmp_path / "phase3", build()
    with pytest.raises(UserError, match="no such directory"):
        read_config(folder)
    for _ in range(2):
        save(folder, model, tokenizer)
        assert [p.name for p in tmp_path.iterdir()] == ["phase3"]
        assert not (folder / "junk").exists()
        load_model(folder, torch.device("cpu"))


def test_a_save_that_fails_leaves_the_checkpoint_before_it(build, tmp_path, tokenizer):
    folder, model = tmp_path / "phase3", build()
    save(folder, model, tokenizer)
    with pytest.raises(OSError):
        save(folder, build(seed=1), tmp_path / "no tokenizer")
    whole, _, _ = load_model(folder, torch.device("cpu"))
    assert same(tensors_of(whole), tensors_of(model))


@pytest.fixture
def saved(build, tmp_path, tokenizer):
    folder = tmp_path / "phase3"
    save(folder, build(moe={}), tokenizer)
    return folder


def load(folder):
    return load_model(folder, torch.device("cpu"))


def test_a_checkpoint_of_another_model_is_refused(build, saved):
    for other in (build("stablelm", {}), build("phi"), build("phi", {"n_experts": 2})):
        with pytest.raises(UserError, match=r"model.safetensors: .*decoder"):
            load_checkpoint(other, saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: [Nn]o such file"):
        load(saved)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint .*nowhere: no such directory"):
        load(tmp_path / "nowhere")


def broken(change):
    """config.json's text with its "model" changed by a function."""

    def write(text):
        values = json.loads(text)
        change(values["model"])
        return json.dumps(values)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda text: text[:-20], "not JSON"),
        (lambda text: "", "not JSON"),
        (lambda text: "[]", "must be a JSON object"),
        (lambda text: "3", "must be a JSON object"),
        (lambda text: "{}", "not a checkpoint of this project: 'model'"),
        (lambda text: '{"model": 3}', "not a checkpoint of this project"),
        (broken(lambda m: m.pop("vision")), "not a checkpoint of this project: 'vision'"),
        (broken(lambda m: m["moe"].update(colour=1)), "not a checkpoint of this project: .*colour"),
        (broken(lambda m: m["decoder"].pop("d_ff")), "not a checkpoint of this project: .*d_ff"),
        (broken(lambda m: m["moe"].update(top_k=9)), "--top-k 9"),
        (broken(lambda m: m["moe"].update(router="gone.py:Mine")), "--router gone.py:Mine"),
        (broken(lambda m: m["decoder"].update(d_model=64)), "shape"),
        (broken(lambda m: m["decoder"].update(n_layers=4)), "not in the checkpoint"),
        (broken(lambda m: m.update(moe=None)), "not a parameter"),
    ],
)
def test_a_broken_config_is_a_user_error(saved, write, message):
    path = saved / "config.json"
    path.write_text(write(path.read_text()))
    with pytest.raises(UserError, match=r"config.json: .* does not match checksums"):
        load(saved)
    seal(saved)
    with pytest.raises(UserError, match=message):
        load(saved)


def test_a_config_that_is_not_text_is_a_user_error(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    seal(saved)
    with pytest.raises(UserError, match="not JSON"):
        load(saved)


def test_a_config_survives_its_way_through_json(build):
    config = replace(build(moe={}).config, moe=MoEConfig(top_k=1, level="sequence"), system="Hi.")
    assert model_config(json.loads(json.dumps(to_dict(config)))) == config


def test_all_tables_keep_our_names_apart():
    for table in (CLIP, *DECODERS.values()):
        ours = [name for name in table.values() if name]
        assert len(ours) == len(set(ours))


ROUTER = """
import torch
from routers import TopKRouter

class Balanced(TopKRouter):
    def __init__(self, d_model, n_experts, **how):
        super().__init__(d_model, n_experts, **how)
        self.register_buffer("bias", torch.zeros(n_experts))
        self.register_buffer("load", torch.zeros(n_experts, dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1), persistent=False)
"""


def with_buffers(build, folder):
    (folder / "balanced.py").write_text(ROUTER)
    model = build(moe={"router": f"{folder / 'balanced.py'}:Balanced"})
    for i in (0, 2):
        router = model.decoder.blocks[i].mlp.router
        router.bias.copy_(torch.randn(4))
        router.load.copy_(torch.tensor([1, 2**40 + 1, 3, i]))  # more than a float can hold
        router.last.fill_(7)
    return model


def test_a_routers_buffers_are_kept_as_strictly_as_parameters(build, tmp_path, tokenizer):
    model = with_buffers(build, tmp_path)
    save(tmp_path / "x", model, tokenizer)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    name = "decoder.blocks.2.mlp.router."
    assert {f"{name}bias", f"{name}load"} < stored.keys() and f"{name}last" not in stored
    other = load(tmp_path / "x")[0]
    buffers = dict(other.named_buffers())
    assert all(torch.equal(buffers[n], b) == (not n.endswith("last"))
               for n, b in model.named_buffers())  # fmt: skip
    for change, message in (
        ({}, r"not in the checkpoint: \['decoder.blocks.2.mlp.router.load'\]"),
        ({f"{name}load": torch.zeros(4)}, r"load': torch.float32, expected torch.int64"),
        ({f"{name}load": torch.zeros(3, dtype=torch.int64)}, r"load': shape"),
    ):
        kept = {n: t for n, t in stored.items() if n != f"{name}load"}
        save_file(kept | change, tmp_path / "x" / "model.safetensors")
        seal(tmp_path / "x")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "x")


def test_a_tied_head_is_stored_once(build, tmp_path, tokenizer):
    model = build("llama")
    model = MedMoE(replace(model.config, decoder=replace(model.config.decoder, tied=True)))
    save(tmp_path / "x", model, tokenizer)
    names = [n for n in load_file(tmp_path / "x" / "model.safetensors") if "vision" not in n]
    assert "decoder.embed.weight" in names and "decoder.lm_head.weight" not in names
    decoder = load(tmp_path / "x")[0].decoder
    assert decoder.lm_head.weight is decoder.embed.weight
    assert torch.equal(decoder.embed.weight, model.decoder.embed.weight)


def test_a_copied_checkpoint_needs_nothing_beside_it(saved, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(saved, copied)
    shutil.rmtree(saved)
    load(copied)
