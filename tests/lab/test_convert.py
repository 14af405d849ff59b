"""Published Med-MoE checkpoints become ours and ours theirs, bit by bit.

    python -m pytest tests/lab/test_convert.py

The published layouts are synthesised here, with their names spelled out by hand.
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import data
from checkpoint import empty_model, load_model
from config import MoEConfig
from engine.durable import seal
from engine.inference import prepare
from engine.older import ResidualMoE
from engine.published import clip_table
from lab import convert
from lab.convert import publish
from model import MedMoE, autocast, generate
from routers import Hints

LAYOUTS = {  # what each published layer has
    "med-moe": {"meta": True, "top_k": 2},
    "med-moe, top-1": {"meta": True, "top_k": 1},
    "moe-llava": {"meta": False, "top_k": 2},
    "tinymed": {"meta": False, "residual": True, "top_k": 2},
    "odd layers": {"meta": True, "layers": (1, 2), "top_k": 2},
    "dense": None,
}
CASES = pytest.mark.parametrize(
    ("family", "layout"), [(f, name) for f in ("phi", "stablelm") for name in LAYOUTS]
)
FFN = {"phi": {"fc1": "fc1", "fc2": "fc2"},
       "stablelm": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}}  # fmt: skip


def their_name(name, family):
    """decoder.blocks.2.mlp.experts.fc1.weight -> the published name, {} for the expert."""
    for old, new in (
        ("projector.fc1", "model.mm_projector.image_spatial_proj.0"),
        ("projector.fc2", "model.mm_projector.image_spatial_proj.2"),
        ("decoder.lm_head", "lm_head"),
        ("decoder.embed", "model.embed_tokens"),
        ("decoder.ln_f", "model.final_layernorm" if family == "phi" else "model.norm"),
        ("decoder.blocks", "model.layers"),
        (".ln.", ".input_layernorm."),
        (".ln_1.", ".input_layernorm."),
        (".ln_2.", ".post_attention_layernorm."),
        (".attn.o.", ".self_attn.dense." if family == "phi" else ".self_attn.o_proj."),
        *((f".attn.{x}.", f".self_attn.{x}_proj.") for x in "qkv"),
        (".mlp.router.proj.", ".mlp.deepspeed_moe.gate.wg."),
        (".mlp.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts.{}."),
        (".mlp.meta.", ".mlp.meta_moe."),
        (".mlp.dense.", ".mlp.mlp."),
        *((f".{ours}.weight", f".{theirs}.weight") for ours, theirs in FFN[family].items()
          if ".mlp." in name),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def synthesise(model, family, older):
    """All tensors as a published stage 2 or 3 stores them; the older layout has no gate bias."""
    tensors = {"model.image_tower.image_tower.vision_model.post_layernorm.bias": torch.zeros(3)}
    for name, param in model.named_parameters():
        if name.startswith("vision.") or name == "decoder.lm_head.bias":
            continue
        if older and name.endswith("router.proj.bias"):
            continue
        theirs = their_name(name, family)
        if "{}" in theirs:
            tensors |= {theirs.format(k): p.detach().clone() for k, p in enumerate(param)}
        else:
            tensors[theirs] = param.detach().clone()
    return tensors


@pytest.fixture
def make(build, tmp_path):
    """A function: family, layout -> our model, their tensors, and directories of both."""

    def write(family, layout):
        moe = LAYOUTS[layout]
        model = build(family, moe)
        older = moe is not None and not moe["meta"]
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name == "decoder.lm_head.bias" or (older and name.endswith("router.proj.bias")):
                    param.zero_()
        clip, stage = tmp_path / "clip", tmp_path / "stage"
        clip.mkdir()
        stage.mkdir()
        vision, decoder = model.config.vision, model.config.decoder
        tower = {n: p for n, p in model.named_parameters() if n.startswith("vision.")}
        table = clip_table(vision)
        save_file(publish(tower, table, torch.float32), clip / "model.safetensors")
        (clip / "config.json").write_text(json.dumps({
            "image_size": vision.image_size, "patch_size": vision.patch_size,
            "hidden_size": vision.width, "num_hidden_layers": vision.n_layers,
            "num_attention_heads": vision.n_heads, "intermediate_size": vision.d_ff,
        }))  # fmt: skip
        values = {
            "model_type": f"moe_llava_{family}" if moe else f"llava_{family}",
            "vocab_size": decoder.vocab_size, "hidden_size": decoder.d_model,
            "num_hidden_layers": decoder.n_layers, "num_attention_heads": decoder.n_heads,
            "intermediate_size": decoder.d_ff, "max_position_embeddings": decoder.max_len,
            "mm_image_tower": "/data/somebody/clip", "mm_hidden_size": vision.width,
            "mm_vision_select_layer": -2, "image_projector_type": "mlp2x_gelu",
        }  # fmt: skip
        share = decoder.rotary_dim * decoder.n_heads / decoder.d_model
        values["partial_rotary_factor" if family == "phi" else "rope_pct"] = share
        if moe:
            layers = list(moe.get("layers", (0, 2)))
            values["moe"] = {"moe_layers_idx": layers, "num_experts": [4] * len(layers),
                             "top_k_experts": moe["top_k"], "capacity_factor": 1.5}  # fmt: skip
        (stage / "config.json").write_text(json.dumps(values))
        tensors = synthesise(model, family, older)
        save_file(tensors, stage / "model.safetensors")
        of = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        of.add_special_tokens([data.EOS])
        of.save(str(stage / "tokenizer.json"))
        return model, tensors, clip, stage

    return write


def run(*argv):
    convert.main([str(a) for a in argv])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@CASES
def test_each_published_layout_loads_bitwise_and_answers(make, collate, tmp_path, family, layout):
    model, _, clip, stage = make(family, layout)
    run(stage, "--clip", clip, "--out", tmp_path / "ours", "--dtype", "float32")
    loaded, _, meta = load_model(tmp_path / "ours", torch.device("cpu"))
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert torch.equal(theirs[name], param), name
    assert meta["phase"] == (3 if LAYOUTS[layout] else 2)
    batch = collate([([1, *[-200] * 4, 5, 6], [-100] * 7)])
    prepare(model, torch.device("cpu"), None)
    with torch.no_grad():
        ours, loaded = (m(batch.ids, batch.mask, batch.images, Hints())[0] for m in (model, loaded))
    torch.testing.assert_close(ours, loaded, atol=0, rtol=0)


def logits(model, collate):
    batch = collate([([1, *[-200] * 4, 5, 6], [-100] * 7)])
    with torch.no_grad():
        return model.decoder.lm_head(model(batch.ids, batch.mask, batch.images, Hints())[0])


def test_early_tinymed_becomes_layers_that_give_the_same_logits(make, collate, tmp_path):
    """ResidualMoE, found by the names of the tensors: nothing in config.json mentions it."""
    model, _, clip, stage = make("phi", "tinymed")
    run(stage, "--clip", clip, "--out", tmp_path / "ours", "--dtype", "float32")
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert values["model"]["moe"].keys() == asdict(MoEConfig()).keys()
    loaded, _, _ = load_model(tmp_path / "ours", torch.device("cpu"))
    sparse = [block.mlp for block in loaded.decoder.blocks if block.is_sparse]
    assert len(sparse) == 2 and all(type(mlp) is ResidualMoE for mlp in sparse)
    expected = logits(model, collate)
    torch.testing.assert_close(logits(loaded, collate), expected, atol=1e-4, rtol=1e-4)
    without = empty_model(loaded.config)  # the coefficients and dense FFNs do matter
    without.load_state_dict(loaded.state_dict(), strict=False)
    assert not torch.allclose(logits(without, collate), expected, atol=0.1)


@pytest.mark.parametrize("layout", ["tinymed", "moe-llava", "med-moe", "odd layers"])
def test_the_config_of_an_older_checkpoint_loads(make, collate, tmp_path, layout):
    """Its "moe" has two more fields: "every", always 2, and "residual", true for early TinyMed."""
    _, _, clip, stage = make("phi", layout)
    folder = tmp_path / "ours"
    run(stage, "--clip", clip, "--out", folder, "--dtype", "float32")
    before, _, _ = load_model(folder, torch.device("cpu"))
    values = json.loads((folder / "config.json").read_text())
    assert not {"every", "residual"} & values["model"]["moe"].keys()
    values["model"]["moe"] |= {"every": 2, "residual": layout == "tinymed"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "checksums.json").unlink()
    seal(folder)
    after, _, _ = load_model(folder, torch.device("cpu"))
    assert after.config == before.config
    assert torch.equal(logits(after, collate), logits(before, collate))
    is_residual = [isinstance(b.mlp, ResidualMoE) for b in after.decoder.blocks if b.is_sparse]
    assert is_residual == [layout == "tinymed"] * 2


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_checkpoint_in_bf16_stays_so_and_answers(make, collate, tmp_path, family, dtype):
    _, _, clip, stage = make(family, "med-moe")
    run(stage, "--clip", clip, "--out", tmp_path / "ours")
    model, _, _ = load_model(tmp_path / "ours", torch.device("cpu"), dtype)
    for name, param in model.named_parameters():
        narrow = dtype is None and ".router." not in name
        assert param.dtype == (torch.bfloat16 if narrow else torch.float32), name
    batch = collate([([1, *[-200] * 4, 5, 6], [-100] * 7)], side="left")
    wanted = torch.bfloat16 if dtype is None else torch.float32
    with autocast(torch.device("cpu"), wanted):
        steps = list(generate(model, batch, eos_id=-1, max_new=3))
    assert len(steps) == 3 and all(r.gates.isfinite().all() for r in steps[0].routings)


@CASES
def test_exported_and_read_again_every_tensor_is_the_same(make, tmp_path, family, layout):
    _, tensors, clip, stage = make(family, layout)
    run(stage, "--clip", clip, "--out", tmp_path / "ours", "--dtype", "float32")
    run(tmp_path / "ours", "--to", "med-moe", "--out", tmp_path / "back", "--dtype", "float32")
    back = load_file(tmp_path / "back" / "model.safetensors")
    del tensors["model.image_tower.image_tower.vision_model.post_layernorm.bias"]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    run(tmp_path / "back", "--clip", clip, "--out", tmp_path / "again", "--dtype", "float32")
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("ours", "again")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "again")]
    assert configs[0]["model"] == configs[1]["model"]


def ffn(x, tensors, place, family):
    def linear(x, name):
        weight, bias = (tensors.get(f"{place}{name}.{kind}") for kind in ("weight", "bias"))
        return F.linear(x, weight, bias)

    if family == "phi":
        return linear(F.gelu(linear(x, "fc1"), approximate="tanh"), "fc2")
    return linear(F.silu(linear(x, "gate_proj")) * linear(x, "up_proj"), "down_proj")


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("layout", ["med-moe", "med-moe, top-1", "moe-llava", "tinymed"])
def test_a_sparse_layer_computes_by_their_tensors_what_is_computed_by_hand(make, family, layout):
    _, tensors, clip, stage = make(family, layout)
    model = convert.read_medmoe(stage, clip, torch.float32)
    at = "model.layers.2.mlp."
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    gate = f"{at}deepspeed_moe.gate.wg."
    probs = F.linear(x, tensors[f"{gate}weight"], tensors.get(f"{gate}bias")).softmax(-1)
    expected = torch.zeros(5, 32)
    for t in range(5):
        order = probs[t].argsort(descending=True).tolist()[: LAYOUTS[layout]["top_k"]]
        total = sum(probs[t, e] for e in order) if len(order) > 1 else 1.0
        for e in order:
            place = f"{at}deepspeed_moe.experts.deepspeed_experts.{e}."
            expected[t] += probs[t, e] / total * ffn(x[t], tensors, place, family)
    if layout == "tinymed":
        names = (f"{at}coefficient.weight", f"{at}coefficient.bias")
        share = F.linear(x, *(tensors[name] for name in names)).softmax(-1)
        expected = share[:, :1] * expected + share[:, 1:] * ffn(x, tensors, f"{at}mlp.", family)
    if layout.startswith("med-moe"):
        expected = expected + ffn(x, tensors, f"{at}meta_moe.", family)
    mask = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        y, _ = model.decoder.blocks[2].mlp(x[None], mask, Hints())
    torch.testing.assert_close(y[0], expected, atol=1e-5, rtol=0)


def test_a_stage_1_projector_is_read_with_its_decoder(make, capsys, tmp_path):
    model, tensors, clip, stage = make("phi", "dense")
    llm = tmp_path / "llm"
    llm.mkdir()
    values = json.loads((stage / "config.json").read_text()) | {"model_type": "phi"}
    (llm / "config.json").write_text(json.dumps(values))
    (llm / "tokenizer.json").write_bytes((stage / "tokenizer.json").read_bytes())
    own = {n: t for n, t in tensors.items() if "mm_projector" not in n and "tower" not in n}
    save_file(own | {"lm_head.bias": model.decoder.lm_head.bias.detach()},
              llm / "model.safetensors")  # fmt: skip
    one = tmp_path / "stage1"
    one.mkdir()
    alone = {n: t for n, t in tensors.items() if "mm_projector" in n}
    torch.save(alone, one / "mm_projector.bin")
    run(one, "--clip", clip, "--llm", llm, "--out", tmp_path / "ours", "--dtype", "float32")
    loaded, _, meta = load_model(tmp_path / "ours", torch.device("cpu"))
    assert meta["phase"] == 1
    torch.save(alone | {"model.mm_projector.more": torch.zeros(1)}, one / "mm_projector.bin")
    line = refused(capsys, one, "--clip", clip, "--llm", llm, "--out", tmp_path / "other")
    assert "mm_projector.bin" in line and "'model.mm_projector.more'" in line
    for (name, param), (_, other) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(param, other), name


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("partial_rotary_factor", "x", "partial_rotary_factor 'x'"),
        ("moe", {"moe_layers_idx": 5, "num_experts": [4], "top_k_experts": 2}, "moe_layers_idx 5"),
        ("moe", {"moe_layers_idx": [0], "num_experts": ["4"], "top_k_experts": 2}, "['4']"),
        ("model_type", "llava_mistral", "llava_mistral"),
        ("model_type", "phi", "'phi'"),
        ("mm_vision_select_layer", -1, "mm_vision_select_layer -1"),
        ("image_projector_type", "linear", "image_projector_type 'linear'"),
        ("mm_hidden_size", 1024, "width 32, the checkpoint wants 1024"),
        ("moe", {"moe_layers_idx": [0, 2]}, "num_experts"),
        ("moe", {"moe_layers_idx": [0, 2], "num_experts": [4, 2], "top_k_experts": 2}, "[4, 2]"),
        ("moe", {"moe_layers_idx": [0, 9], "num_experts": [4], "top_k_experts": 2}, "[0, 9]"),
        ("moe", {"moe_layers_idx": [0], "num_experts": [4], "top_k_experts": 2}, "experts[0]"),
        ("moe", {"moe_layers_idx": [0, 2], "num_experts": [4], "top_k_experts": 9}, "top-k 9"),
        ("moe", {"moe_layers_idx": [0, 2], "num_experts": [3], "top_k_experts": 2}, "experts"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(make, capsys, tmp_path, key, value, named):
    _, _, clip, stage = make("phi", "med-moe")
    values = json.loads((stage / "config.json").read_text())
    (stage / "config.json").write_text(json.dumps(values | {key: value}))
    line = refused(capsys, stage, "--clip", clip, "--out", tmp_path / "ours")
    assert named in line
    assert not (tmp_path / "ours").exists()


def test_mistakes_on_the_command_line_are_named(make, capsys, tmp_path):
    _, _, clip, stage = make("phi", "med-moe")
    assert "--clip" in refused(capsys, stage, "--out", tmp_path / "ours")
    assert "--out" in refused(capsys, stage, "--clip", clip)
    assert "--out" in refused(capsys, stage, "--clip", clip, "--out", stage)
    (stage / "tokenizer.json").unlink()
    line = refused(capsys, stage, "--clip", clip, "--out", tmp_path / "ours")
    assert "tokenizer.json" in line


def test_an_empty_model_has_every_parameter_and_keeps_a_tied_head_tied(build):
    config = build("llama", {"router": "topk"}).config
    empty = empty_model(config, torch.bfloat16)
    for (name, param), (other, p) in zip(
        empty.named_parameters(), MedMoE(config).named_parameters(), strict=True
    ):
        assert (name, param.shape) == (other, p.shape)
        assert param.dtype == (torch.float32 if ".router." in name else torch.bfloat16)
    tied = replace(config, decoder=replace(config.decoder, tied=True))
    decoder = empty_model(tied).decoder
    assert decoder.lm_head.weight is decoder.embed.weight
    assert "decoder.lm_head.weight" not in dict(empty_model(tied).named_parameters())
