"""Sparse blocks other than the paper's, and what phase 3 then trains: for lab.ablate's rows."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from checkpoint import load_model, read_config
from config import IMAGE_ID, MODALITIES, PRESETS, named_layers
from data import Sample
from lab.controls import Everyone, Hash, Wrong
from moe import MLP, GatedMLP, upcycle
from router_training import mislabel
from routers import Hints, TopKRouter
from tests.mini import mini, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Phases 1 and 2 once; phase 3 from there with other flags -> its checkpoint."""
    folder = tmp_path_factory.mktemp("variants")
    PRESETS["mini"] = mini(folder / "parts")

    def go(name: str, *argv: str):
        train.main(["--preset", "mini", "--data", "phantoms:12", "--steps", "2", "--batch-size",
                    "4", "--no-eval", "--router-images", "8", "--dtype", "float32", "--out",
                    str(folder / name), *argv])  # fmt: skip
        return folder / name

    before = go("dense", "--phase", "2") / "phase2"
    yield lambda name, *argv: go(name, "--init", str(before), *argv) / "phase3"
    del PRESETS["mini"]


def changed(path, before):
    a, b = weights(before), weights(path)
    return {name for name in b if name not in a or not torch.equal(a[name], b[name])}


def test_without_experts_phase_3_trains_the_ffns_of_the_same_blocks(run):
    path = run("no-experts", "--experts", "0")
    config, meta = read_config(path)
    assert config.moe is None and meta["flags"]["experts"] == 0
    before = path.parent.with_name("dense") / "phase2"
    parts = [f"fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert changed(path, before) == {f"decoder.blocks.{i}.mlp.{p}" for i in (0, 2) for p in parts}


def test_without_a_meta_expert_there_is_none(run):
    path = run("no-meta", "--no-meta")
    assert read_config(path)[0].moe.meta is False
    assert not any(".meta." in name for name in weights(path))
    model, _, _ = load_model(path, CPU)
    assert model.decoder.blocks[0].mlp.meta is None


@pytest.mark.parametrize(("name", "layers"), [("all", (0, 1, 2)), ("second-half", (1, 2)),
                                              ("first-half", (0,)), ("2,0", (0, 2))])  # fmt: skip
def test_the_sparse_blocks_are_those_named(run, name, layers):
    path = run(f"layers-{name}", "--moe-layers", name)
    model, _, _ = load_model(path, CPU)
    assert tuple(i for i, b in enumerate(model.decoder.blocks) if b.is_sparse) == layers
    assert model.config.moe.layers == layers


def test_names_of_layers():
    assert named_layers("every-second", 5) is None
    assert named_layers("first-half", 5) == (0, 1)
    assert named_layers("second-half", 5) == (2, 3, 4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--moe-layers", "3"), "numbers below 3"),
        (("--moe-layers", "odd"), "every-second, first-half"),
        (("--experts", "0", "--lora-rank", "2"), "trains its FFNs whole"),
        (("--experts", "0", "--trains", "released"), "trains its FFNs whole"),
        (("--start", "fresh", "--no-meta"), "--no-meta"),
        (("--trains", "released", "--moe-layers", "all"), "leaves none"),
        (("--router-noise", "1.5"), "from 0 to 1"),
        (("--experts", "-1"), "at least 0"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_is_trained(run, capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        run("refused", *argv)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("family", [MLP, GatedMLP])
@pytest.mark.parametrize("router_class", [TopKRouter, Everyone])
def test_a_fresh_start_computes_the_dense_ffn_with_experts_that_differ(shake, family, router_class):
    dense = shake(family(16, 24))
    x, mask = torch.randn(3, 9, 16), torch.ones(3, 9, dtype=torch.bool)
    before = copy.deepcopy(dense)
    sparse = upcycle(dense, shake(router_class(16, 4)), 4, "fresh")
    y, _ = sparse(x, mask, Hints())
    assert torch.equal(y, before(x))
    first = next(iter(sparse.experts.children())).weight  # (E, F, D)
    assert not any(torch.equal(first[0], first[e]) for e in (1, 2, 3))
    expected = nn.Linear(16, 24).weight.std()
    assert first.std().item() == pytest.approx(expected.item(), rel=0.2)
    y.square().sum().backward()
    *_, last = sparse.experts.children()
    assert (last.weight.grad.flatten(1).abs().amax(dim=1) > 0).any()


def test_everyone_is_one_wide_dense_ffn(shake):
    """meta and two experts with gate 1: their hidden units side by side in one FFN."""
    sparse = upcycle(shake(MLP(16, 24)), Everyone(16, 2, top_k=2), 2, "fresh")
    for i, param in enumerate(sparse.parameters()):
        param.data = torch.randn(param.shape, generator=torch.Generator().manual_seed(i))
    wide, parts = MLP(16, 72), [sparse.meta.fc1, sparse.meta.fc2]
    experts = sparse.experts
    wide.fc1.weight.data = torch.cat([parts[0].weight, *experts.fc1.weight])
    wide.fc1.bias.data = torch.cat([parts[0].bias, *experts.fc1.bias])
    wide.fc2.weight.data = torch.cat([parts[1].weight, *experts.fc2.weight], dim=1)
    wide.fc2.bias.data = parts[1].bias + experts.fc2.bias.sum(dim=0)
    x, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    y, routing = sparse(x, mask, Hints())
    assert routing.gates.eq(1).all()
    torch.testing.assert_close(y, wide(x), atol=1e-4, rtol=1e-5)


def test_hash_depends_on_the_token_and_on_a_patchs_place_alone():
    router = Hash(8, 4, top_k=2)
    ids = torch.tensor([[5, IMAGE_ID, IMAGE_ID, 7, 5]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    gates = [router(torch.randn(1, 5, 8), mask, Hints(ids=ids)).gates for _ in range(2)]
    assert torch.equal(*gates)
    assert torch.equal(gates[0][0, 0], gates[0][0, 4])  # the same token
    assert gates[0].sum(dim=-1).eq(1).all() and (gates[0] != 0).sum(dim=-1).eq(2).all()
    many = torch.arange(1024)[None]
    routing = router(torch.zeros(1, 1024, 8), torch.ones_like(many, dtype=torch.bool),
                     Hints(ids=many))  # fmt: skip
    share = (routing.gates != 0).float().mean(dim=(0, 1))  # of 2 in 4
    assert share.min() > 0.4 and share.max() < 0.6
    places = Hints(ids=torch.full((1, 49), IMAGE_ID))
    spread = router(torch.zeros(1, 49, 8), torch.ones(1, 49, dtype=torch.bool), places).gates
    assert (spread != 0).any(dim=1).all()


def test_wrong_routes_no_token_to_the_true_expert():
    router = Wrong(8, 4)
    mask = torch.ones(5, 3, dtype=torch.bool)
    modality = torch.tensor([0, 1, 2, 3, -1])
    gates = router(torch.randn(5, 3, 8), mask, Hints(modality=modality)).gates
    assert gates.argmax(dim=-1)[:4].tolist() == [[1] * 3, [2] * 3, [3] * 3, [0] * 3]
    assert gates[4].eq(0.25).all()  # unknown: all alike


def test_exactly_the_share_of_the_flag_gets_wrong_labels():
    samples = [Sample(str(i), "x", "train", i, (), MODALITIES[i % 4]) for i in range(200)]
    noisy = mislabel(samples, 0.3, seed=1)
    wrong = [(a, b) for a, b in zip(samples, noisy, strict=True) if a.modality != b.modality]
    assert len(wrong) == 60 and {b.modality for _, b in wrong} == set(MODALITIES)
    assert all(replace(b, modality=a.modality) == a for a, b in zip(samples, noisy, strict=True))
    assert noisy == mislabel(samples, 0.3, seed=1) != mislabel(samples, 0.3, seed=2)
    assert mislabel(samples, 0.0, seed=1) == samples


def test_only_the_training_labels_are_made_wrong(run, monkeypatch):
    import router_training

    seen = []

    def collect(model, some, *rest):
        seen.append(torch.tensor([MODALITIES.index(s.modality) for s in some]))
        return None, None, seen[-1]

    monkeypatch.setattr(router_training, "collect", collect)
    monkeypatch.setattr(router_training, "train_router", lambda *parts, **more: ({}, {
        "n": 1, "accuracy": 1.0, "token_accuracy": 1.0}))  # fmt: skip
    monkeypatch.setattr(router_training, "format_confusion", lambda report: "")
    model, text, _ = load_model(run("labels", "--experts", "0"), CPU)
    picks = random.Random(0).choices(MODALITIES, k=40)
    samples = [Sample(str(i), "phantoms", "train", i, (("What?", "It."),), m)
               for i, m in enumerate(picks)]  # fmt: skip
    for noise in (0.0, 1.0):
        flags = SimpleNamespace(router_images=40, seed=0, router_noise=noise, experts=4)
        router_training.learn_router(model, samples, text, flags, CPU, torch.float32, (0, 2))
    clean, val, noisy, val_again = seen
    assert (clean != noisy).all() and torch.equal(val, val_again)
