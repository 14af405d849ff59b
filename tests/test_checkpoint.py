"""A checkpoint is written whole, read back bit for bit with its config, or refused by name."""

import json
import shutil
from dataclasses import replace
from functools import reduce
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint as module
from checkpoint import empty_model, load_checkpoint, load_model, read_config, read_seen
from config import UserError
from engine.durable import seal
from engine.published import router_hash
from model import MedMoE
from tests.conftest import shake
from tests.mini import MOE, SMALL_TOKENIZER, TOKENIZER, checkpoint, same, weights

INFO = {"phase": 3, "step": 7, "flags": {"seed": 0, "preset": "tiny", "data": ["phantoms"]}}
CPU = torch.device("cpu")


def save(folder, model, own=None, **extra):
    folder.parent.mkdir(exist_ok=True)
    (tokenizer := folder.parent / "tokenizer.json").write_text(SMALL_TOKENIZER)
    module.save_checkpoint(folder, model, model.config, INFO, tokenizer, extra, own)
    return folder


@pytest.fixture
def saved(phase3, tmp_path):
    return shutil.copytree(phase3, tmp_path / "copied")


@pytest.mark.parametrize(("family", "moe"), [  # residual: early TinyMed's layers
    ("phi", None), ("phi", {"residual": True}),
    ("stablelm", {"router": "topk", "top_k": 1})])  # fmt: skip
def test_a_checkpoint_is_read_back_bit_for_bit_with_its_config(build, tmp_path, family, moe):
    model, folder = build(family, moe), tmp_path / "deep" / "phase3"
    save(folder, model, own={"rng": torch.ones(1)}, router={"weight": torch.ones(4, 32)})
    parts = [f"{name}.safetensors" for name in ("model", "process0", "router")]
    files = ["checksums.json", "config.json", *parts, "tokenizer.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert load_file(folder / parts[2]).keys() == {"weight"}
    assert read_config(folder) == (model.config, INFO)
    loaded, text, info = load_model(folder, CPU)
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert not loaded.training and info["step"] == 7 and text.encode("CT?") == [1, 2]


def test_saving_over_a_checkpoint_leaves_the_new_one_or_the_old_one_whole(build, tmp_path):
    folder, model = tmp_path / "phase3", build("stablelm", seed=1)
    save(folder, build(moe={}), trainer={"step": torch.ones(1)})
    save(folder, model)
    with pytest.raises(OSError):
        module.save_checkpoint(folder, build(), model.config, INFO, tmp_path / "no tokenizer", {})
    assert same(weights(folder), dict(model.named_parameters()))
    assert not (folder / "trainer.safetensors").exists()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_widened_cast_or_kept_and_routers_are_fp32(build, tmp_path, stored, dtype):
    config, generator_state = build("llama", {}).config, torch.get_rng_state()
    model = empty_model(replace(config, decoder=replace(config.decoder, tied=True)), stored)
    assert torch.equal(torch.get_rng_state(), generator_state)
    shake(model)
    names = load_file(save(tmp_path / "x", model) / "model.safetensors").keys()
    assert "decoder.embed.weight" in names and "decoder.lm_head.weight" not in names
    before, after = model.decoder, load_model(tmp_path / "x", CPU, dtype)[0].decoder
    assert before.lm_head.weight is before.embed.weight
    assert after.lm_head.weight is after.embed.weight
    assert torch.equal(after.embed.weight.float(), before.embed.weight.float())
    q, router = after.blocks[0].attn.q.weight, after.blocks[0].mlp.router.proj.weight
    kinds = (torch.float32 if dtype == torch.float32 else stored, dtype or stored, torch.float32)
    assert (after.embed.weight.dtype, q.dtype, router.dtype) == kinds
    assert torch.equal(router, before.blocks[0].mlp.router.proj.weight)


OWN = """
import routers, torch

class Scaled(routers.TopKRouter):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.register_buffer("scale", torch.full((4,), 7.0), persistent=False)
        self.plain = torch.ones(4)
        self.keys = torch.nn.Parameter(torch.nn.init.normal_(torch.empty(4, 2)))
        assert float(self.scale.sum()) == 28.0 and self.keys.shape[1] == 2
"""


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_router_has_the_tensors_that_no_file_holds(build, tmp_path, stored):
    (tmp_path / "own.py").write_text(OWN)
    router = f"{tmp_path / 'own.py'}:Scaled"
    config = build("llama", {"router": router}).config
    folder = save(tmp_path / "x", shake(empty_model(config, stored)))
    found = load_model(folder, CPU, router=router)[0].decoder.blocks[0]
    assert found.attn.q.weight.dtype == stored
    found = found.mlp.router
    assert found.scale.tolist() == [7.0] * 4 and found.plain.tolist() == [1.0] * 4
    assert torch.equal(
        found.proj.weight, weights(folder)["decoder.blocks.0.mlp.router.proj.weight"]
    )


def test_the_router_and_its_level_can_be_replaced(phase3, build, tmp_path):
    moe = load_model(phase3, CPU)[0].config.moe
    other = load_model(phase3, CPU, router="random", level="sequence")[0]
    assert other.config.moe == replace(moe, router="random", level="sequence") != moe
    assert same(dict(other.named_parameters()), weights(phase3))
    dense = save(tmp_path / "dense", build())
    assert load_model(dense, CPU, level="sequence")[0].config.moe is None
    with pytest.raises(UserError, match=r"--router topk: .*dense is dense"):
        load_model(dense, CPU, router="topk")


def test_a_checkpoints_router_file_runs_only_if_given_again(phase3, tmp_path, capsys):
    text = "import pathlib, routers\npathlib.Path(__file__).with_name('ran').touch()\n"
    (file := tmp_path / "mine.py").write_text(text + "class Mine(routers.TopKRouter): pass\n")
    router, ran, config_file = f"{file}:Mine", tmp_path / "ran", tmp_path / "own" / "config.json"
    folder = checkpoint(tmp_path / "own", replace(MOE, router=router))
    ran.unlink()
    with pytest.raises(UserError, match=r"own: .*mine.py:Mine.* --router FILE.py:Class"):
        load_model(folder, CPU)
    assert not ran.exists()
    (values := json.loads(config_file.read_text()))["run"] = {"router_sha256": router_hash(router)}
    config_file.write_text(json.dumps(values))
    seal(folder)
    assert load_model(folder, CPU, router=router)[0].config.moe.router == router and ran.exists()
    assert load_model(folder, CPU, router="topk")[0].config.moe.router == "topk"
    assert load_model(phase3, CPU, router=router) and router_hash("topk") is None
    assert not capsys.readouterr().err
    file.write_text(file.read_text() + "\n")
    load_model(folder, CPU, router=router)
    assert f"--router {router}: changed since {folder} was trained" in capsys.readouterr().err


def test_weights_not_finite_or_too_many_and_tokens_without_a_row_are_named(saved, monkeypatch):
    name, file = "decoder.blocks.1.attn.q.bias", saved / "model.safetensors"
    tensors = weights(saved)
    for value in (float("nan"), float("-inf")):
        save_file(tensors | {name: torch.full_like(tensors[name], value)}, file)
        seal(saved)
        with pytest.raises(UserError, match=rf"model.safetensors: '{name}' .*NaN or infinite"):
            load_model(saved, CPU)
    save_file(tensors, file)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="possible model: no room"):
        patch.setattr("checkpoint.MedMoE", Mock(side_effect=RuntimeError("no room")))
        load_model(saved, CPU)
    values = json.loads(TOKENIZER.read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 1024, "content": "oedema"})
    (saved / "tokenizer.json").write_text(json.dumps(values))
    seal(saved)
    with pytest.raises(UserError, match=r"r.json: token 'oedema' has id 1024; .* 0 to 1023"):
        load_model(saved, CPU)


def test_another_models_checkpoint_a_damaged_file_or_a_runs_folder_is_refused(build, saved):
    with pytest.raises(UserError, match=r"model.safetensors: .*decoder"):
        load_checkpoint(build("stablelm", {}), saved)
    model = MedMoE(read_config(saved)[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged or edited"):
        load_checkpoint(model, saved)
    assert same(dict(model.named_parameters()), before)
    for number in (1, 3):
        (saved.parent / f"phase{number}").mkdir()
    with pytest.raises(UserError, match=f"name one of its phases, as {saved.parent / 'phase3'}"):
        read_config(saved.parent)


@pytest.mark.parametrize(("place", "value", "message"), [
    ("model.moe.colour", 1, "config.json: not a checkpoint of .*colour"),
    ("model.decoder.d_model", 32, "model.safetensors: .*shape"),
    ("model.decoder.n_layers", 4, "model.safetensors: .*not in the checkpoint"),
    ("model.decoder.vocab_size", 2**21, "config.json: a model of 69,.* parameters, but model.saf"),
    ("model.moe.n_experts", 1024, "config.json: a model of .* parameters, but model.safetensors"),
    ("flags", {}, "config.json: not a .*'seed'"), ("flags.lang", "fr", "config.json: .*lang"),
    ("run", [], "config.json: not a .*run must be"), ("flags.preset", 5, "preset must"),
    ("questions", ["Is it?", 5], "config.json: not a .*questions must be"),
    *((f"model.{place}", value, rf"config.json: model.{place} [^\n]*: must be {message}")
      for place, value, message in (
       ("system", 5, "a text"), ("vision.n_layers", "6", "a whole number from 1 to 128"),
       ("vision.width", None, "a whole"), ("vision.patch_size", 64, "at most image_size, 32"),
       ("vision.n_heads", 3, "a divisor"), ("decoder.n_heads", 0, "a whole number from 1 to"),
       ("decoder.n_heads", -2, "a whole"), ("decoder.n_heads", True, "a whole number"),
       ("decoder.n_layers", 10**9, "a whole"), ("decoder.n_heads", 3, "a divisor of d_model, 16"),
       ("decoder.n_kv_heads", 4, "a divisor of n_heads, 2"), ("decoder.rotary_dim", 3, "even"),
       ("decoder.rotary_dim", 10, "even, and at most the 8"), ("decoder.tied", 1, "one of False"),
       ("decoder.family", ["phi"], "one of phi"), ("decoder.dropout", -0.1, "a number from 0.0"),
       ("decoder.rope_theta", "1e4", "a number from 1.0"), ("moe.level", "word", "one of token"),
       ("moe.start", "warm", "one of preserving"), ("moe.top_k", 9, "at most n_experts, 4"),
       ("moe.router", 5, "a text"), *(("moe.layers", wrong, "null, or ascending numbers below 3")
                                      for wrong in (5, [], [2, 0], [0, 0], [0, 3], [0, "1"], "02"))
    ))])  # fmt: skip
def test_a_broken_config_is_refused_before_memory_is_taken(saved, place, value, message):
    values = json.loads((saved / "config.json").read_text())
    *parents, last = place.split(".")
    reduce(dict.__getitem__, parents, values)[last] = value
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config.json: .* does not match checksums"):
        read_config(saved)
    seal(saved)
    with pytest.raises(UserError, match=message):
        load_model(saved, CPU)


def test_a_routers_buffers_are_kept_as_strictly_as_parameters(build, tmp_path):
    def model_with(load):
        model = build(moe={"router": "topk"})
        router = model.decoder.blocks[2].mlp.router
        router.register_buffer("load", load)
        router.register_buffer("worst", torch.tensor(float("inf")))  # no weight: it may be
        router.register_buffer("last", torch.zeros(1), persistent=False)
        return model

    load, name = torch.tensor([1, 2**40 + 1, 3, 2]), "decoder.blocks.2.mlp.router"
    folder, found = save(tmp_path / "x", model_with(load)), model_with(torch.zeros_like(load))
    assert f"{name}.load" in weights(folder) and f"{name}.last" not in weights(folder)
    load_checkpoint(found, folder)  # more than a float can hold
    assert torch.equal(found.decoder.blocks[2].mlp.router.load, load)
    for other in (build(moe={"router": "topk"}), model_with(load.float()), model_with(load[:3])):
        with pytest.raises(UserError, match=rf"model.safetensors: .*{name}.load"):
            load_checkpoint(other, folder)


def test_what_was_seen_in_training_is_read_if_there_is_a_record_of_it(saved):
    file, rows = saved / "seen.safetensors", read_seen(saved)
    assert rows.dtype == torch.int64 and rows.shape[1:] == (6,) and len(rows) > 50
    for damage in ({"other": rows}, {"rows": rows.float()}, {"rows": rows[:, :5].contiguous()}):
        save_file(damage, file)
        with pytest.raises(UserError, match=r"seen\.safetensors: damaged or edited"):
            read_seen(saved)
        seal(saved)
        with pytest.raises(UserError, match=r"seen\.safetensors: not a record"):
            read_seen(saved)
    file.unlink()
    assert read_seen(saved) is None
