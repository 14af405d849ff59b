"""The loop, what each phase trains, and the command: python -m pytest tests/test_train.py"""

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

import train
from checkpoint import read_config
from config import ASSETS, PHASES, MoEConfig, Recipe, TrainConfig, UserError, preset, to_dict
from data import Dataset, Text
from engine.cli import parse
from engine.run import Run
from model import MedMoE, freeze_all_but, make_sparse
from sources.images import Images
from sources.load import load_samples
from sources.tensorfiles import open_tensors
from tests.one_step import gradients, place

PRESETS = ("tiny", "tiny-stablelm")
FFN = {"tiny": ("fc1", "fc2"), "tiny-stablelm": ("gate", "up", "down")}


def trained(name: str, number: int, **flags) -> set[str]:
    flags = TrainConfig(preset=name, **flags)
    model = MedMoE(preset(name).model)
    if number == 3:
        make_sparse(model, MoEConfig(router=flags.router))
    freeze_all_but(model, train.trained_patterns(flags, number, model.config))
    return {name for name, param in model.named_parameters() if param.requires_grad}


def ffn(name: str, layers, *, prefix="", experts=True) -> set[str]:
    """FFN parameter names as this test spells them out, for these blocks."""
    keys = ("weight", "bias") if name == "tiny" else ("weight",)
    places = [f"decoder.blocks.{i}.mlp.{prefix}" for i in layers]
    return {f"{place}{part}.{key}" for place in places for part in FFN[name] for key in keys}


PROJECTOR = {f"projector.{fc}.{key}" for fc in ("fc1", "fc2") for key in ("weight", "bias")}


@pytest.mark.parametrize("name", PRESETS)
def test_phase_1_trains_the_projector_and_nothing_else(name):
    assert trained(name, 1) == PROJECTOR


@pytest.mark.parametrize("name", PRESETS)
def test_phase_2_trains_all_but_the_tower(name):
    every = {n for n, _ in MedMoE(preset(name).model).named_parameters()}
    tower = {n for n in every if n.startswith("vision.")}
    assert tower and trained(name, 2) == every - tower
    assert trained(name, 2, tune_vision=True) == every


@pytest.mark.parametrize("name", PRESETS)
def test_phase_3_trains_experts_and_meta_of_every_second_block(name):
    sparse, dense = (0, 2), (1, 3)
    paper = ffn(name, sparse, prefix="meta.") | ffn(name, sparse, prefix="experts.")
    assert trained(name, 3) == paper
    assert trained(name, 3, tune_vision=True) == paper  # phase 3 never trains the tower
    released = paper | PROJECTOR | ffn(name, dense)
    assert trained(name, 3, trains="released") == released
    routers = {
        f"decoder.blocks.{i}.mlp.router.proj.{k}" for i in sparse for k in ("weight", "bias")
    }
    assert trained(name, 3, router="topk") == paper | routers
    assert trained(name, 3, router="random") == trained(name, 3, router="oracle") == paper


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"projectr\.\*"):
        freeze_all_but(MedMoE(preset("tiny").model), ("projectr.*",))


def test_the_learning_rate_warms_up_and_falls_to_zero():
    scale = [train.lr_scale(i, 100) for i in range(100)]
    assert scale[:3] == [1 / 3, 2 / 3, 1.0]
    assert scale[3] == 1.0 and scale[-1] < 0.001
    assert scale[3:] == sorted(scale[3:], reverse=True)
    assert train.lr_scale(0, 1) == 1.0


def run(out, *argv: str) -> None:
    train.main(["--data", "phantoms:48", "--out", str(out), "--batch-size", "8", "--no-eval",
                "--router-images", "40", "--dtype", "float32", *argv])  # fmt: skip


def weights_of(path) -> dict:
    return dict(open_tensors(path / "model.safetensors"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", PRESETS)
def test_one_command_runs_the_missing_phases_and_each_changes_only_its_own(name, tmp_path, capsys):
    run(tmp_path, "--preset", name, "--steps", "2", "--save-every", "1")
    printed = capsys.readouterr().out
    assert [f"phase {n}: saved" in printed for n in (1, 2, 3)] == [True] * 3
    assert not list(tmp_path.glob("*step*"))
    assert [p.name for p in tmp_path.glob(".*")] == [".lock"]
    one, two, three = (weights_of(tmp_path / f"phase{n}") for n in (1, 2, 3))
    assert {k for k in one if not torch.equal(one[k], two[k])} == trained(name, 2)
    kept = set(two) & set(three)
    assert all(torch.equal(two[k], three[k]) for k in kept)  # attention, norms, dense FFNs
    config, meta = read_config(tmp_path / "phase3")
    assert config.moe == MoEConfig() and meta["phase"] == 3
    router = dict(open_tensors(tmp_path / "phase2" / "router.safetensors"))
    for layer in (0, 2):
        for key in ("weight", "bias"):
            assert torch.equal(three[f"decoder.blocks.{layer}.mlp.router.proj.{key}"], router[key])
    report = read_config(tmp_path / "phase2")[1]["router"]
    assert 4 <= report["n"] <= 12 and sum(map(sum, report["confusion"])) == report["n"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["step"]) for r in records if "loss" in r] == [
        (n, i) for n in (1, 2, 3) for i in (0, 1)
    ]
    run(tmp_path, "--preset", name, "--steps", "1")
    assert "phase 2: done before" in capsys.readouterr().out


def prepared(**flags) -> tuple:
    flags = train.resolve(TrainConfig(data=("phantoms:24",), dtype="float32", **flags))
    torch.manual_seed(3)
    model, tokenizer, _ = train.initial_model(flags, None)
    freeze_all_but(model, PHASES[2].trains)
    samples = load_samples(flags.data, "instructions", "train")
    images = Images(model.config.vision.image_size)
    return flags, model, Dataset(samples, Text(tokenizer), model.config, False, images)


def test_accumulation_weighs_the_router_losses_too(tmp_path):
    """The same two samples twice: two micro-batches are alike, so their mean is either's."""
    found = []
    for accumulate in (1, 2):
        flags, model, data = prepared(accumulate=accumulate, z_loss=0.5, router="topk")
        torch.manual_seed(4)
        make_sparse(model, MoEConfig(router="topk"))
        for block in model.decoder.blocks[::2]:
            torch.nn.init.normal_(block.mlp.router.proj.weight)  # far from logits of 0
        freeze_all_but(model, PHASES[2].trains)
        gradients(model, data, [0, 1, 0, 1], flags, place(tmp_path, flags))
        found.append(model.decoder.blocks[0].mlp.router.proj.weight.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert found[0].abs().max() > 1e-2


@pytest.mark.parametrize(("flag", "limit"), [(0.3, 0.3), (0.0, float("inf"))])
def test_gradients_are_clipped_to_the_norm_of_the_flag(tmp_path, monkeypatch, flag, limit):
    flags, model, data = prepared(out=str(tmp_path), clip_grad=flag)
    clip, seen = Run.clip_gradients, []

    def watch(run, largest):
        norm = clip(run, largest)
        after = torch.stack([p.grad.norm() for p in run.params.values() if p.grad is not None])
        seen.append((largest, norm, after.norm().item()))
        return norm

    monkeypatch.setattr(Run, "clip_gradients", watch)
    where = Run(2, flags, tmp_path / "tokenizer.json")
    train.train(model, data, replace(flags, steps=2), Recipe(1e-3, 1, 8), where)
    assert len(seen) == 2
    for largest, before, after in seen:
        assert largest == flag and before > 0.3
        assert after == pytest.approx(min(before, limit), rel=1e-3)


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_batch(
    where, tmp_path, monkeypatch
):
    flags, model, data = prepared(out=str(tmp_path))
    if where == "weight":
        model.projector.fc1.weight.data[0, 0] = float("nan")
    else:
        model.projector.fc1.weight.register_hook(lambda grad: grad * float("inf"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    place = Run(2, flags, tmp_path / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"phase 2, step 0: loss .* nothing was updated.*batch: \d+"
    ):
        train.train(model, data, replace(flags, steps=2), Recipe(1e-3, 1, 8), place)
    for name, param in model.named_parameters():
        assert torch.equal(param.isnan(), before[name].isnan()), name
        assert torch.equal(param.nan_to_num(), before[name].nan_to_num()), name


def test_the_loss_falls(tmp_path):
    flags, model, data = prepared(out=str(tmp_path))
    place = Run(2, flags, tmp_path / "tokenizer.json")
    train.train(model, data, replace(flags, steps=30), Recipe(2e-3, 1, 8), place)
    records = [json.loads(line) for line in place.path.read_text().splitlines()]
    records = [r for r in records if "loss" in r]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    expected = [2e-3 * train.lr_scale(r["step"], 30) for r in records]
    assert [r["lr"] for r in records] == pytest.approx(expected) and len(set(expected)) > 2


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    flags, model, data = prepared(out=str(tmp_path))
    batch, shown = Dataset.batch, []
    monkeypatch.setattr(Dataset, "batch", lambda *a: shown.append(a[1]) or batch(*a))
    place = Run(2, flags, tmp_path / "tokenizer.json")
    train.train(model, data, flags, Recipe(1e-3, 2, 8), place)
    epochs = shown[:3], shown[3:]
    assert all(sorted(chain.from_iterable(rows)) == list(range(24)) for rows in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("known", "data", "tunes"),
    [(["phantoms:9"], "slake:x", True), (["phantoms:9"], "phantoms", False),
     (["slake:x"], "slake:y", False), (None, "slake:x", False)],
)  # fmt: skip
def test_a_tower_is_trained_only_on_what_it_says_it_has_not_seen(tmp_path, known, data, tunes):
    values = json.loads((ASSETS / "clip" / "config.json").read_text())
    del values["pretrained_on"]
    values |= {} if known is None else {"pretrained_on": known}
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = train.resolve(TrainConfig(phase=1, data=(data,), clip=str(tmp_path)))
    assert flags.tune_vision is flags.jitter is tunes
    assert train.resolve(replace(flags, tune_vision=not tunes)).tune_vision is not tunes


def test_a_run_does_not_mix_phases_of_different_data(tmp_path):
    run(tmp_path, "--phase", "1", "--steps", "1")
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", "phantoms:49", "--out", str(tmp_path), "--no-eval"])
    assert stop.value.code == 2


def test_a_router_of_modalities_needs_two_of_them(tmp_path, capsys):
    pixels = np.zeros((4, 28, 28), np.uint8)
    labels = np.array([[0], [1], [0], [1]], np.uint8)
    parts = {f"{split}_{name}": values for split in ("train", "val", "test")
             for name, values in (("images", pixels), ("labels", labels))}  # fmt: skip
    np.savez(tmp_path / "pneumoniamnist.npz", **parts)
    with pytest.raises(SystemExit):
        train.main(
            ["--data", f"medmnist:{tmp_path / 'pneumoniamnist.npz'}", "--out", str(tmp_path)]
        )
    assert "--router modality: fewer than two in medmnist:" in capsys.readouterr().err


def test_an_earlier_phase_is_reused_only_if_it_was_trained_alike(tmp_path):
    flags = train.resolve(parse(TrainConfig, ["--out", str(tmp_path)], "train.py"))
    file = tmp_path / "phase1" / "config.json"
    file.parent.mkdir()

    def reused(**changed):
        before = {k: v for k, v in (to_dict(flags) | changed).items() if v != "missing"}
        values = {"model": to_dict(preset("tiny").model), "phase": 1, "flags": before}
        file.write_text(json.dumps(values))
        return train.earlier_phase(1, flags)

    assert reused() == reused(seed=7) == file.parent
    assert reused(image_folder="missing") == file.parent  # an older one
    for name, other in (("preset", "phi2"), ("data", ["slake:x"]), ("lang", "zh"), ("llm", "x"),
                        ("tune_vision", True), ("image_folder", "x"),
                        ("router_labels", "x.json")):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*: choose another --out"):
            reused(**{name: other})


COUNTING = """
import torch
from routers import TopKRouter

class Counting(TopKRouter):
    price = PRICE

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(4))

    def penalty(self, gates, logits, mask, x):
        return torch.tensor(self.price)

    def update(self, load):
        self.seen += load
"""


def test_a_routers_penalty_is_in_the_loss_and_its_load_arrives_once_a_step(tmp_path):
    found = {}
    for price in ("0.0", "1.5"):
        file = tmp_path / "counting.py"
        file.write_text(COUNTING.replace("PRICE", price))
        out = tmp_path / price
        run(out, "--steps", "2", "--accumulate", "2", "--router", f"{file}:Counting",
            "--dtype", "float32")  # fmt: skip
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        stored = dict(open_tensors(out / "phase3" / "model.safetensors"))
        seen = [t for n, t in stored.items() if n.endswith("router.seen")]
        found[price] = [r["loss"] for r in log if r["phase"] == 3 and "loss" in r]
        assert len(seen) == 2 and all(t.sum() == pytest.approx(2 * 2) for t in seen)  # k, steps
        assert all((t > 0).sum() > 1 for t in seen)
    assert found["1.5"] == pytest.approx([loss + 1.5 for loss in found["0.0"]], abs=1e-5)


def test_evaluation_with_another_router_uses_that(tmp_path, capsys):
    import eval as evaluation

    run(tmp_path, "--steps", "1", "--router", "topk")
    argv = [str(tmp_path / "phase3"), "--limit", "4", "--max-new", "1"]
    evaluation.main([*argv, "--router", "random"])  # the same parameters, another name
    for where, router, message in (
        ("phase3", "nowhere.py:Router", "--router nowhere.py:Router: "),
        ("phase2", "topk", "--router topk: "),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([str(tmp_path / where), *argv[1:], "--router", router])
        assert stop.value.code == 2 and message in capsys.readouterr().err
