"""Published Med-MoE checkpoints become ours, bit by bit, and a GGUF file a decoder.

The published layouts are synthesised here, with their names spelled out by hand.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import load_model
from config import LLAVA_SYSTEM
from data import Text
from engine.older import ResidualMoE
from engine.published import load_published
from lab import convert
from tests.mini import SMALL_TOKENIZER, error_line, same
from tests.published import decoder_fields, write_published

LAYOUTS = {  # what each published layer has
    "med-moe": {"meta": True, "top_k": 2}, "med-moe, top-1": {"meta": True, "top_k": 1},
    "moe-llava": {"meta": False, "top_k": 2}, "dense": None,
    "tinymed": {"meta": False, "residual": True, "top_k": 2},
    "odd layers": {"meta": True, "layers": (1, 2), "top_k": 2}}  # fmt: skip


def their_name(name, family):
    """decoder.blocks.2.mlp.experts.fc1.weight -> the published name, {} for the expert."""
    is_phi = family == "phi"
    for old, new in (
        ("projector.fc1", "model.mm_projector.image_spatial_proj.0"),
        ("projector.fc2", "model.mm_projector.image_spatial_proj.2"),
        ("decoder.lm_head", "lm_head"), ("decoder.embed", "model.embed_tokens"),
        ("decoder.ln_f", "model.final_layernorm" if is_phi else "model.norm"),
        ("decoder.blocks", "model.layers"), (".ln.", ".input_layernorm."),
        (".ln_1.", ".input_layernorm."), (".ln_2.", ".post_attention_layernorm."),
        (".attn.o.", ".self_attn.dense." if is_phi else ".self_attn.o_proj."),
        *((f".attn.{x}.", f".self_attn.{x}_proj.") for x in "qkv"),
        (".mlp.router.proj.", ".mlp.deepspeed_moe.gate.wg."),
        (".mlp.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts.{}."),
        (".mlp.meta.", ".mlp.meta_moe."), (".mlp.dense.", ".mlp.mlp."),
        *((f".{x}.weight", f".{x}_proj.weight") for x in ("gate", "up", "down") if ".mlp." in name),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


@pytest.fixture
def make(build, tmp_path):
    """A function: family, layout -> our model, the tower's folder, their checkpoint."""

    def write(family, layout):
        moe, tensors, stage = LAYOUTS[layout], {}, tmp_path / "stage"
        model = build(family, moe)
        older = moe is not None and not moe["meta"]  # without a bias in the gate
        for name, param in model.named_parameters():
            if name == "decoder.lm_head.bias" or (older and name.endswith("router.proj.bias")):
                param.data.zero_()
            elif not name.startswith("vision."):
                theirs = their_name(name, family)
                each = enumerate(param.detach()) if "{}" in theirs else [(0, param.detach())]
                tensors |= {theirs.format(e): p.clone() for e, p in each}
        clip, _ = write_published(model, tmp_path)
        stage.mkdir()
        values = decoder_fields(model.config.decoder) | {
            "model_type": f"moe_llava_{family}" if moe else f"llava_{family}",
            "mm_image_tower": "/data/somebody/clip", "mm_hidden_size": 32,
            "mm_vision_select_layer": -2, "image_projector_type": "mlp2x_gelu"}  # fmt: skip
        if family == "stablelm":
            values["rope_pct"] = values.pop("partial_rotary_factor")
        if moe:
            layers = list(moe.get("layers", (0, 2)))
            values["moe"] = {"moe_layers_idx": layers, "num_experts": [4] * len(layers),
                             "top_k_experts": moe["top_k"], "capacity_factor": 1.5}  # fmt: skip
        (stage / "config.json").write_text(json.dumps(values))
        (stage / "tokenizer.json").write_text(SMALL_TOKENIZER)
        ignored = {"model.image_tower.image_tower.vision_model.post_layernorm.bias": torch.zeros(3)}
        save_file(tensors | ignored, stage / "model.safetensors")
        return model, clip, stage

    return write


def run(*argv):
    convert.main([str(a) for a in argv])


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_becomes_ours_bit_for_bit(make, tmp_path, family, layout):
    model, clip, stage = make(family, layout)
    run(stage, "--clip", clip, "--out", tmp_path / "ours", "--dtype", "float32")
    loaded, _, info = load_model(tmp_path / "ours", torch.device("cpu"))
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert info["phase"] == (3 if LAYOUTS[layout] else 2)
    moe, wanted = loaded.config.moe, model.config.moe
    assert loaded.config.decoder == model.config.decoder and loaded.config.system == LLAVA_SYSTEM
    if moe:
        assert (moe.top_k, moe.meta, moe.layers) == (wanted.top_k, wanted.meta, wanted.layers)
        is_residual = [type(b.mlp) is ResidualMoE for b in loaded.decoder.blocks if b.is_sparse]
        assert is_residual == [layout == "tinymed"] * 2  # found by the names of its tensors


def test_in_bf16_all_is_narrow_but_the_routers(make, tmp_path):
    _, clip, stage = make("stablelm", "med-moe")
    run(stage, "--clip", clip, "--out", tmp_path / "ours")
    model, _, _ = load_model(tmp_path / "ours", torch.device("cpu"), None)
    dtypes = {(".router." in name, param.dtype) for name, param in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def moe(layers, n_experts, top_k=2):
    return {"moe_layers_idx": layers, "num_experts": n_experts, "top_k_experts": top_k}


@pytest.mark.parametrize(("key", "value", "named"), [
    ("model_type", "llava_mistral", "llava_mistral"),
    ("mm_vision_select_layer", -1, "mm_vision_select_layer -1"), ("mm_hidden_size", 1024, "1024"),
    ("moe", 1, "'moe'"), ("moe", moe([0, 9], [4]), "[0, 9]"), ("moe", moe([0], [4]), "experts[0]"),
    ("moe", moe([0, 2], [4, 2]), "[4, 2]"), ("moe", moe([0, 2], [4], 9), "top_k 9")])  # fmt: skip
def test_what_we_do_not_compute_is_refused_by_name(make, capsys, tmp_path, key, value, named):
    _, clip, stage = make("phi", "med-moe")
    values = json.loads((stage / "config.json").read_text())
    (stage / "config.json").write_text(json.dumps(values | {key: value}))
    argv = stage, "--clip", clip, "--out", tmp_path / "ours"
    assert named in error_line(capsys, convert.main, *argv)
    assert not (tmp_path / "ours").exists()


def test_a_config_that_is_no_object_is_refused(make, capsys, tmp_path):
    _, clip, stage = make("phi", "med-moe")
    (stage / "config.json").write_text("[]")
    argv = stage, "--clip", clip, "--out", tmp_path / "ours"
    assert "must be a JSON object" in error_line(capsys, convert.main, *argv)


def entry(name, weight):
    return SimpleNamespace(name=name, data=weight.detach().numpy(), tensor_type="F32")


@pytest.fixture
def gguf(build, monkeypatch, tmp_path):
    """A model, and its GGUF file behind a stand-in for the package: fields and tensors to edit."""
    model = build("llama")
    c, tensors = model.config.decoder, []
    names = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
             "mlp.down": "ffn_down", "attn.o": "attn_output", "attn.v": "attn_v"}  # fmt: skip
    for i, block in enumerate(model.decoder.blocks):
        for ours, theirs in names.items():
            tensors.append(entry(f"blk.{i}.{theirs}.weight", block.get_submodule(ours).weight))
        for name, n in (("q", c.n_heads), ("k", c.n_kv_heads)):
            halves = block.get_submodule(f"attn.{name}").weight.view(n, 2, -1, c.d_model)
            pairs = halves.transpose(1, 2).flatten(0, 2)  # channels i and i + K / 2 are neighbours
            tensors.append(entry(f"blk.{i}.attn_{name}.weight", pairs))
    for ours, theirs in (("embed", "token_embd"), ("ln_f", "output_norm"), ("lm_head", "output")):
        tensors.append(entry(f"{theirs}.weight", model.decoder.get_submodule(ours).weight))
    tensors.append(entry("rope_freqs.weight", torch.ones(4)))
    fields = {
        "general.architecture": "llama", "llama.attention.head_count": c.n_heads,
        "llama.attention.head_count_kv": c.n_kv_heads, "llama.embedding_length": c.d_model,
        "llama.feed_forward_length": c.d_ff, "llama.block_count": c.n_layers,
        "llama.context_length": c.max_len, "llama.rope.freq_base": c.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": float(torch.tensor(1e-5)),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "ab", "1", *map(str, range(20, 79))],
        "tokenizer.ggml.token_type": [3] + [1] * 63, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0}  # fmt: skip

    def reader(file):
        contents = {k: SimpleNamespace(contents=lambda v=v: v) for k, v in fields.items()}
        return SimpleNamespace(fields=contents, tensors=tensors)

    quants = SimpleNamespace(dequantize=lambda data, kind: data)
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFReader=reader, quants=quants))
    monkeypatch.setitem(sys.modules, "gguf.quants", quants)
    (file := tmp_path / "model.gguf").touch()
    return model, file, fields


def test_a_gguf_file_becomes_a_directory_for_llm_bit_for_bit(build, gguf, capsys, tmp_path):
    model, file, fields = gguf
    out, other = tmp_path / "llm", build("llama", seed=1)
    run(file, "--out", out, "--dtype", "float32")
    clip, _ = write_published(model, tmp_path / "parts")
    load_published(other, model.config, clip, out)
    assert same(dict(other.decoder.named_parameters()), dict(model.decoder.named_parameters()))
    text = Text(out)
    assert text.encode("ab11") == [3, 4, 4] and text.decode([3, 4]) == "ab1" and text.eos_id == 0
    fields["tokenizer.ggml.pre"] = "llama-bpe"
    assert "llama-bpe" in error_line(capsys, convert.main, file, "--out", tmp_path / "other")
