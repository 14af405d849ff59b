"""Files of weights, in each published form, damaged in each way.

python -m pytest tests/sources/test_tensorfiles.py
"""

import json
import pickle
import random
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import ModelConfig, UserError
from engine.published import load_published, published_decoder, published_vision
from lab.convert import tensor_names
from model import MedMoE
from sources.tensorfiles import open_tensors, read_tensors, weight_files

GOLDEN = Path(__file__).parents[1] / "golden"


def copy_of(family, tmp_path):
    """A golden model in a directory as its owners publish it."""
    shutil.copytree(GOLDEN / family, tmp_path / family)
    (tmp_path / family / "outputs.safetensors").unlink()
    return tmp_path / family


@pytest.fixture
def llm(tmp_path):
    return copy_of("phi", tmp_path)


def load(llm, clip=GOLDEN / "clip"):
    config = ModelConfig(published_vision(clip), published_decoder(llm))
    model = MedMoE(config)
    load_published(model, config, clip, llm)
    return dict(model.named_parameters())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_safetensors(llm):
    tensors = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    return tensors


# Every form


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_model_bin_holds_the_same(llm, legacy):
    whole = load(llm)
    tensors = without_safetensors(llm)
    torch.manual_seed(0)
    torch.save(tensors, llm / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert same(dict(read_tensors(llm)), tensors) and tensor_names(llm) == set(tensors)
    projector = [name for name in whole if name.startswith("projector.")]
    again = load(llm)
    assert all(torch.equal(again[n], whole[n]) for n in whole if n not in projector)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_are_read_as_indexed(llm, suffix):
    tensors = without_safetensors(llm)
    stem = "pytorch_model" if suffix == "bin" else "model"
    names = sorted(tensors)
    where = {n: f"{stem}-{i % 3 + 1:05}-of-00003.{suffix}" for i, n in enumerate(names)}
    for file in set(where.values()):
        part = {n: tensors[n] for n in names if where[n] == file}
        (torch.save if suffix == "bin" else save_file)(part, llm / file)
    (llm / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(dict(read_tensors(llm)), tensors) and tensor_names(llm) == set(tensors)
    assert len(weight_files(llm)) == 3
    load(llm)


def test_a_tower_without_prefix_and_one_inside_a_whole_clip_load_alike(llm, tmp_path):
    bare = load_file(GOLDEN / "clip" / "model.safetensors")
    expected = {n: p for n, p in load(llm).items() if n.startswith("vision.")}
    assert not any(name.startswith("vision_model.") for name in bare)
    clip = tmp_path / "clip"
    clip.mkdir()
    inner = json.loads((GOLDEN / "clip" / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"vision_config": inner}))
    whole = {f"vision_model.{name}": tensor for name, tensor in bare.items()}
    whole |= {"text_model.final_layer_norm.bias": torch.zeros(3), "logit_scale": torch.zeros(())}
    whole["vision_model.embeddings.position_ids"] = torch.arange(17)
    torch.save(whole, clip / "pytorch_model.bin")
    found = {n: p for n, p in load(llm, clip).items() if n.startswith("vision.")}
    assert same(found, expected)


def test_stablelm_may_come_without_the_biases_of_its_blocks_norms(tmp_path):
    llm = copy_of("stablelm", tmp_path)
    tensors = without_safetensors(llm)
    biases = [n for n in tensors if n.endswith("layernorm.bias")]
    assert len(biases) == 4
    save_file({n: t for n, t in tensors.items() if n not in biases}, llm / "model.safetensors")
    found = load(llm)
    assert not any(found[f"decoder.blocks.{i}.ln_{j}.bias"].any() for i in (0, 1) for j in (1, 2))
    assert found["decoder.ln_f.bias"].any()
    save_file({n: t for n, t in tensors.items() if n != biases[0]}, llm / "model.safetensors")
    with pytest.raises(UserError, match=r"not in the checkpoint: \['decoder.blocks.*1 in all"):
        load(llm)  # one of them alone is a mistake


def test_stablelms_first_class_named_its_fields_otherwise(tmp_path):
    llm = copy_of("stablelm", tmp_path)
    values = json.loads((llm / "config.json").read_text())
    eps, rope = values.pop("layer_norm_eps"), values.pop("rope_parameters")
    values |= {"model_type": "stablelm_epoch", "norm_eps": eps, "rope_theta": rope["rope_theta"],
               "rope_pct": rope["partial_rotary_factor"]}  # fmt: skip
    expected = published_decoder(llm)
    (llm / "config.json").write_text(json.dumps(values))
    assert published_decoder(llm) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "relu"), ("qk_layernorm", True), ("model_type", "mamba"),
     ("rope_scaling", {"type": "linear", "factor": 2.0}), ("attention_dropout", 0.1),
     ("num_hidden_layers", 0), ("num_key_value_heads", 3), ("resid_pdrop", "big"),
     ("layer_norm_eps", None), ("rope_parameters", [1]), ("max_position_embeddings", -1),
     ("hidden_size", "32"), ("vocab_size", 10**12), ("head_dim", 7)],
)  # fmt: skip
def test_what_the_code_does_not_compute_is_refused_by_name(llm, name, value):
    values = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(values | {name: value}))
    with pytest.raises(UserError, match=f"{llm}.*(?:{name}|heads of 7)"):
        load(llm)


def test_a_tied_head_that_is_stored_a_second_time_is_left_out(tmp_path):
    llm = copy_of("llama", tmp_path)
    tensors = without_safetensors(llm)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llm / "model.safetensors")
    found = load(llm)
    assert "decoder.lm_head.weight" not in found and "decoder.embed.weight" in found


# Damage


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(llm, *named):
    with pytest.raises(UserError) as error:
        load(llm)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert all(name in message for name in named), message


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(llm, tmp_path, zipped):
    tensors = without_safetensors(llm)
    bait = tmp_path / "executed"
    tensors["model.norm.weight"] = Touch(bait)
    path = llm / "pytorch_model.bin"
    if zipped:
        torch.save(tensors, path)
    else:
        path.write_bytes(pickle.dumps({"a": Touch(bait)}, protocol=2))
    refused(llm, "pytorch_model.bin", "not only tensors")
    assert not bait.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, {"a": {"b": 2}}])
def test_a_pickle_of_something_else_is_refused(llm, content):
    without_safetensors(llm)
    torch.save(content, llm / "pytorch_model.bin")
    refused(llm, "pytorch_model.bin")


def header(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def rewrite(path, entries, body):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def lie(kind, path):
    entries, body = header(path)
    name = "lm_head.weight"
    start, end = entries[name]["data_offsets"]
    if kind == "beyond the end":
        entries[name]["data_offsets"] = [start, end + 10**12]
    elif kind == "a shape of terabytes":
        entries[name]["shape"] = [10**6, 10**6]
    elif kind == "overlapping":
        entries[name]["data_offsets"] = [start + 4, end]
    elif kind == "another type":
        entries[name]["dtype"] = "F64"
    elif kind == "no such type":
        entries[name]["dtype"] = "Q4"
    elif kind == "a header longer than the file":
        path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
        return
    elif kind == "a header that is not JSON":
        rewrite(path, b"{" * 64, body)
        return
    elif kind == "a name twice":
        raw = json.dumps(entries)
        raw = raw[:-1] + f', "{name}": {json.dumps(entries[name])}}}'
        rewrite(path, raw.encode(), body)
        return
    rewrite(path, entries, body)


KINDS = ["beyond the end", "a shape of terabytes", "overlapping", "another type", "no such type",
         "a header longer than the file", "a header that is not JSON", "a name twice"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_lies_is_refused_and_takes_no_memory(llm, kind):
    lie(kind, llm / "model.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(llm, str(llm))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def stored_as(form, llm):
    """The file of the model's weights, or rewritten as pytorch_model.bin."""
    if form == "safetensors":
        return llm / "model.safetensors"
    torch.save(without_safetensors(llm), llm / "pytorch_model.bin")
    return llm / "pytorch_model.bin"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_truncated_anywhere_is_refused(llm, form):
    path = stored_as(form, llm)
    raw, rng = path.read_bytes(), random.Random(0)
    for n in [0, 1, 7, 8, 9, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(40))]:
        path.write_bytes(raw[:n])
        refused(llm, str(llm))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_flipped_bit_gives_the_shapes_that_are_wanted_or_one_line(llm, form):
    """A flipped weight cannot be seen without a checksum; any other damage must be refused."""
    path = stored_as(form, llm)
    raw, rng, n_refused = path.read_bytes(), random.Random(0), 0
    shapes = {name: p.shape for name, p in load(llm).items()}
    head = struct.unpack("<Q", raw[:8])[0] + 8 if form == "safetensors" else len(raw)
    for i in range(150):
        at = rng.randrange(head if i % 2 else len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        try:
            assert {name: p.shape for name, p in load(llm).items()} == shapes
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            n_refused += 1
    assert n_refused > 10


def test_a_tensor_of_another_name_shape_or_type_is_named(llm):
    tensors = load_file(llm / "model.safetensors")
    norm = "model.final_layernorm.weight"
    for change, named in (
        ({norm + "s": tensors[norm].clone()}, "weights"),
        ({norm: tensors[norm][:-1].clone()}, "shape (31,), expected (32,)"),
        ({norm: tensors[norm].to(torch.int64)}, "torch.int64, expected a float type"),
    ):
        save_file(tensors | change, llm / "model.safetensors")
        refused(llm, named)
    del tensors[norm]
    save_file(tensors, llm / "model.safetensors")
    refused(llm, "not in the checkpoint: ['decoder.ln_f.weight']")


def test_a_tensor_in_two_shards_is_named(llm):
    tensors = without_safetensors(llm)
    first = sorted(tensors)[0]
    save_file(tensors, llm / "model-1.safetensors")
    save_file({first: tensors[first]}, llm / "model-2.safetensors")
    where = dict.fromkeys(tensors, "model-1.safetensors") | {first: "model-2.safetensors"}
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refused(llm, first, "filled twice")


@pytest.mark.parametrize("where", [{}, [], None, {"a": "../../secret.safetensors"}, {"a": 3}])
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(llm, where):
    without_safetensors(llm)
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refused(llm, str(llm))


def test_an_empty_directory_names_both_files_it_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors: no such file, nor pytorch_model.bin"):
        weight_files(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        next(open_tensors(tmp_path / "x.bin"))
