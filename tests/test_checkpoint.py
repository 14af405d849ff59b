"""A checkpoint is written whole, read back bit for bit with its config, or refused by name."""

import json
import shutil
from dataclasses import replace
from functools import reduce

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import empty_model, load_checkpoint, load_model, read_config, read_seen

from checkpoint import save_checkpoint  # isort: skip
from config import UserError
from data import Text
from engine.durable import seal
from model import MedMoE
from tests.conftest import shake
from tests.mini import TOKENIZER, checkpoint, same, weights

INFO = {"phase": 3, "step": 7, "flags": {"seed": 0, "data": ["phantoms"], "lang": "en"}}
CPU = torch.device("cpu")


def save(folder, model, own=None, **extra):
    save_checkpoint(folder, model, model.config, INFO, TOKENIZER, extra, own)
    return folder


@pytest.fixture(scope="module")
def mini_checkpoint(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("mini") / "phase3")


@pytest.fixture
def saved(mini_checkpoint, tmp_path):
    return shutil.copytree(mini_checkpoint, tmp_path / "copied")


@pytest.mark.parametrize(
    ("family", "moe"),
    [("phi", None), ("stablelm", {"router": "topk", "top_k": 1}), ("llama", {}),
     ("phi", {"residual": True})],  # early TinyMed's layers
)  # fmt: skip
def test_a_checkpoint_is_read_back_bit_for_bit_with_its_config(build, tmp_path, family, moe):
    model = build(family, moe)
    folder = tmp_path / "deep" / "phase3"
    save(folder, model, own={"rng": torch.ones(1)}, router={"weight": torch.ones(4, 32)})
    parts = [f"{name}.safetensors" for name in ("model", "process0", "router")]
    files = ["checksums.json", "config.json", *parts, "tokenizer.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert [p.name for p in folder.parent.iterdir()] == ["phase3"]
    assert load_file(folder / parts[2]).keys() == {"weight"}
    assert read_config(folder) == (model.config, INFO)
    loaded, text, info = load_model(folder, CPU)
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert not loaded.training and info["step"] == 7
    assert text.encode("CT?") == Text(TOKENIZER).encode("CT?")


def test_saving_over_a_checkpoint_leaves_the_new_one_or_the_old_one_whole(build, tmp_path):
    folder, model = tmp_path / "phase3", build("stablelm", seed=1)
    save(folder, build(moe={}), trainer={"step": torch.ones(1)})
    save(folder, model)
    with pytest.raises(OSError):
        save_checkpoint(folder, build(), model.config, INFO, tmp_path / "no tokenizer", {})
    assert same(weights(folder), dict(model.named_parameters()))
    assert not (folder / "trainer.safetensors").exists()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_widened_cast_or_kept_as_stored_and_routers_are_fp32(
    build, tmp_path, stored, dtype
):
    config = build("llama", {}).config
    model = empty_model(replace(config, decoder=replace(config.decoder, tied=True)), stored)
    shake(model)
    for n, p in model.named_parameters():
        assert p.dtype == (torch.float32 if ".router." in n else stored)
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


def test_nothing_is_initialised_in_an_empty_model(build):
    config, before = build("phi", {}).config, torch.get_rng_state()
    model = empty_model(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert {(p.dtype, p.device) for p in model.parameters()} == {(torch.float32, CPU)}


def test_the_router_and_its_level_can_be_replaced(mini_checkpoint, build, tmp_path):
    moe = load_model(mini_checkpoint, CPU)[0].config.moe
    assert (moe.router, moe.level) == ("modality", "token")
    other = load_model(mini_checkpoint, CPU, router="random", level="sequence")[0]
    assert other.config.moe == replace(moe, router="random", level="sequence")
    assert same(dict(other.named_parameters()), weights(mini_checkpoint))
    dense = save(tmp_path / "dense", build())
    assert load_model(dense, CPU, level="sequence")[0].config.moe is None
    with pytest.raises(UserError, match=r"--router topk: .*dense is dense"):
        load_model(dense, CPU, router="topk")
    with pytest.raises(UserError, match=r"--router gone\.py:Mine"):
        load_model(mini_checkpoint, CPU, router="gone.py:Mine")


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_filled(build, saved):
    for other in (build("stablelm", {}), build("phi"), build("phi", {"n_experts": 2})):
        with pytest.raises(UserError, match=r"model.safetensors: .*(decoder|vision)"):
            load_checkpoint(other, saved)
    model = MedMoE(read_config(saved)[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged or edited"):
        load_checkpoint(model, saved)
    assert same(dict(model.named_parameters()), before)


@pytest.mark.parametrize(
    ("name", "keep"),
    [*((name, None) for name in ("model.safetensors", "config.json", "tokenizer.json")),
     *(("model.safetensors", n) for n in (0, 4, 100, -1))],
)  # fmt: skip
def test_a_missing_or_truncated_file_is_named(saved, name, keep):
    content = (saved / name).read_bytes()
    (saved / name).unlink()
    if keep is not None:
        (saved / name).write_bytes(content[:keep])
    with pytest.raises(UserError, match=rf"{name}: ([Nn]o such file|damaged)"):
        load_model(saved, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [(b"{", "not JSON"), (b"[]", "must be a JSON object"), (b"{}", "not a checkpoint .*: 'model'"),
     (b'{"model": 3}', "not a checkpoint of this project"),
     ({"model.colour": 1, "model.vision": None}, "not a checkpoint of this project"),
     ({"model.moe.colour": 1}, "not a checkpoint of .*colour"),
     ({"model.moe.top_k": 9}, "--top-k 9"),
     ({"model.moe.router": "gone.py:Mine"}, "--router gone.py:Mine"),
     ({"model.decoder.n_heads": 0}, "config.json: not a possible model"),
     ({"model.decoder.d_model": 32}, "model.safetensors: .*shape"),
     ({"model.decoder.n_layers": 4}, "not in the checkpoint"),
     ({"model.moe": None}, "not a parameter"), ({"flags": None}, "not a checkpoint of this"),
     ({"flags": {}}, "not a checkpoint of this project: 'seed'"),
     ({"phase": "x"}, "phase and seed must be numbers"),
     ({"flags.seed": "x"}, "phase and seed must be numbers"),
     ({"flags.data": [1]}, '"data" .* is of the wrong kind'),
     ({"flags.lang": "fr"}, '"lang" must be one of en, zh, all')],
)  # fmt: skip
def test_a_broken_config_is_refused(saved, change, message):
    path = saved / "config.json"
    if isinstance(change, dict):
        values = json.loads(path.read_text())
        for place, value in change.items():
            *parents, last = place.split(".")
            reduce(dict.__getitem__, parents, values)[last] = value
        change = json.dumps(values).encode()
    path.write_bytes(change)
    with pytest.raises(UserError, match=r"config.json: .* does not match checksums"):
        read_config(saved)
    seal(saved)
    with pytest.raises(UserError, match=message):
        load_model(saved, CPU)


ROUTER = """
import torch
from routers import TopKRouter

class Balanced(TopKRouter):
    def __init__(self, d_model, n_experts, **how):
        super().__init__(d_model, n_experts, **how)
        self.register_buffer("load", torch.zeros(n_experts, dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1), persistent=False)
"""


def test_a_routers_buffers_are_kept_as_strictly_as_parameters(build, tmp_path):
    (tmp_path / "balanced.py").write_text(ROUTER)
    model = build(moe={"router": f"{tmp_path / 'balanced.py'}:Balanced"})
    load_2 = model.decoder.blocks[2].mlp.router.load
    load_2.copy_(torch.tensor([1, 2**40 + 1, 3, 2]))  # more than a float can hold
    folder = save(tmp_path / "x", model)
    assert torch.equal(load_model(folder, CPU)[0].decoder.blocks[2].mlp.router.load, load_2)
    stored, name = load_file(folder / "model.safetensors"), "decoder.blocks.2.mlp.router."
    assert f"{name}load" in stored and f"{name}last" not in stored
    for change, message in (
        ({}, r"not in the checkpoint: \['decoder.blocks.2.mlp.router.load'\]"),
        ({f"{name}load": torch.zeros(4)}, r"load': torch.float32, expected torch.int64"),
        ({f"{name}load": torch.zeros(3, dtype=torch.int64)}, r"load': shape"),
    ):
        kept = {n: t for n, t in stored.items() if n != f"{name}load"}
        save_file(kept | change, folder / "model.safetensors")
        seal(folder)
        with pytest.raises(UserError, match=message):
            load_model(folder, CPU)


def test_what_was_seen_in_training_is_read_if_there_is_a_record_of_it(saved):
    file, rows = saved / "seen.safetensors", read_seen(saved)
    assert rows.dtype == torch.int64 and rows.shape[1:] == (6,) and len(rows) > 50
    short = rows[:, :5].contiguous()
    for damage in ({}, {"other": rows}, {"rows": rows.float()}, {"rows": short},
                   {"rows": rows.flatten()}):  # fmt: skip
        save_file(damage, file)
        with pytest.raises(UserError, match=r"seen\.safetensors: damaged or edited"):
            read_seen(saved)
        seal(saved)
        with pytest.raises(UserError, match=r"seen\.safetensors: not a record"):
            read_seen(saved)
    save_file({"pairs": rows}, file)  # of an older version
    seal(saved)
    assert read_seen(saved) is None
    file.unlink()
    assert read_seen(saved) is None
