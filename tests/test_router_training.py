"""The router of phase 2: which images teach it, what it sees, and how it is trained."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import router_training as rt
from config import IGNORE, IMAGE_ID, MODALITIES, ModelConfig, TrainConfig
from data import Dataset, Sample, Text
from metrics import router_report
from model import MedMoE
from sources.images import Images
from sources.load import load_samples
from tests.conftest import shake
from tests.mini import DECODER, TOKENIZER, VISION

CPU = torch.device("cpu")
# 40 CT images of 3 samples, 20 MRI images of 2, 5 unknown images of 1.
CROWD = [
    Sample(f"{modality}-{image}-{i}", "test", "train", base + image, (("Q?", "a"),), modality)
    for modality, base, images, n in (("CT", 0, 40, 3), ("MRI", 100, 20, 2), (None, 200, 5, 1))
    for image in range(images) for i in range(n)]  # fmt: skip


def test_holding_out_splits_by_image_and_one_per_image_alternates_between_modalities():
    train, val = rt.hold_out(CROWD, 0.1, seed=0)
    assert {s.id for s in train} | {s.id for s in val} == {s.id for s in CROWD}
    assert {s.image for s in train}.isdisjoint({s.image for s in val})
    assert sorted(str(s.modality) for s in val) == ["CT"] * 12 + ["MRI"] * 4 + ["None"]
    assert (train, val) == rt.hold_out(CROWD, 0.1, seed=0)
    for n, share, held in ((1, 0.9, 0), (2, 0.1, 1), (5, 0.4, 2), (3, 1, 2)):  # something is kept
        texts = [Sample(str(i), "test", "train", None, ()) for i in range(n)]
        assert [len(part) for part in rt.hold_out(texts, share, 0)] == [n - held, held]
    text_only = Sample("t", "test", "train", None, (("Q?", "a"),), "CT")
    chosen = rt.one_per_image([text_only, *CROWD], 30, seed=0)
    assert len({s.image for s in chosen}) == len(chosen) == 30
    assert [s.modality for s in chosen] == ["CT", "MRI"] * 15
    every = rt.one_per_image(CROWD, 1000, seed=0)
    assert Counter(s.modality for s in every) == {"CT": 40, "MRI": 20}
    assert len({s.id[-1] for s in every}) == 3  # any of an image's questions
    assert chosen == rt.one_per_image(CROWD, 30, seed=0) != rt.one_per_image(CROWD, 30, seed=1)


@pytest.fixture
def phantoms():
    """A dense model, and one question about each of 70 images."""
    samples = rt.one_per_image(load_samples(("phantoms:80",), "vqa", "train"), 70, seed=0)
    model = shake(MedMoE(ModelConfig(VISION, DECODER))).eval()
    return model, samples, Text(TOKENIZER)


def batch_of(model, samples, text):
    return Dataset(samples, text, model.config, False, Images(32)).batch(range(len(samples)))


def test_a_router_sees_what_the_ffns_see(phantoms):
    model, samples, text = phantoms
    batch, seen = batch_of(model, samples[:5], text), []
    x, ffns = rt.ffn_inputs(model, batch, (0, 2)), [model.decoder.blocks[i].mlp for i in (0, 2)]
    assert not x.requires_grad and not any(f._forward_pre_hooks for f in ffns)
    for ffn in ffns:
        ffn.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model.loss(batch)
    assert torch.equal(x, torch.stack(seen))


def test_it_sees_the_mean_prompt_and_4_positions_from_the_image_on(collate, monkeypatch):
    rows = [([1, IMAGE_ID, IMAGE_ID, 2, 3, 4, 5, 6], [IGNORE] * 6 + [5, 6]),
            ([IMAGE_ID, IMAGE_ID, 2, 3, 9], [IGNORE] * 4 + [9])]  # fmt: skip
    batch = collate(rows, images=torch.zeros(2, 3, 8, 8))
    x = 100 * torch.arange(2.0)[:, None] + torch.arange(8)  # (B, T) which sample and position
    x = torch.stack([x, -x])[..., None]  # (L, B, T, D = 1)
    monkeypatch.setattr(rt, "ffn_inputs", lambda model, of, layers: x if of is batch else None)
    picked, generator = set(), torch.Generator().manual_seed(0)
    for _ in range(40):
        pooled, single = rt.router_inputs(None, batch, (0, 2), generator)  # (B, L, D)
        assert pooled.tolist() == [[[2.5], [-2.5]], [[101.5], [-101.5]]]
        assert single.shape == (2, 2, 4, 1) and torch.equal(single[:, 0], -single[:, 1])
        positions = [set(row[0].flatten().tolist()) for row in single]
        assert len(positions[0]) == 4 and positions[1] == {100, 101, 102, 103}
        picked |= positions[0]
    assert picked == {1, 2, 3, 4, 5}


def features(n, n_layers=2, seed=0):
    """(pooled, single, truth) of n samples, in which the modality is one of the dimensions."""
    generator, truth = torch.Generator().manual_seed(seed), torch.arange(n) % 4
    x = torch.randn(n, n_layers, 5, 6, generator=generator) + 2 * F.one_hot(truth, 6)[:, None, None]
    return x[:, :, 0], x[:, :, 1:], truth


@pytest.mark.parametrize("n_experts", [4, 3])
def test_every_single_decision_is_a_training_example_and_fewer_experts_share_modalities(n_experts):
    pooled, single, truth = train = features(60)
    rows = [(x, int(t) % n_experts) for p, s, t in zip(pooled, single, truth, strict=True)
            for layer in range(2) for x in (p[layer], *s[layer])]  # fmt: skip
    x, y = torch.stack([row for row, _ in rows]), torch.tensor([label for _, label in rows])
    torch.manual_seed(7)
    linear = nn.Linear(6, n_experts)
    optimizer = torch.optim.Adam(linear.parameters(), lr=3e-3)
    for _ in range(60):
        for picks in torch.randperm(600).split(512):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[picks]), y[picks]).backward()
            optimizer.step()
    weights, report = rt.train_router(train, features(20, seed=1), n_experts, seed=7)
    torch.testing.assert_close(weights, {"weight": linear.weight.data, "bias": linear.bias.data})
    assert report == rt.evaluate_router(linear, features(20, seed=1), n_experts)
    assert report["accuracy"] > 0.6


def test_a_router_is_judged_by_mean_logits_over_layers_and_by_each_single_position():
    near, far = F.one_hot(torch.tensor([[0, 1, 2, 2], [3, 3, 3, 3]]), 4).float()  # (n, D)
    pooled = torch.stack([2 * near, far], dim=1)
    single = torch.stack([near, near, far], dim=1)[:, None]  # (n, L = 1, M = 3, D)
    report = rt.evaluate_router(nn.Identity(), (pooled, single, torch.arange(4)), 4)
    assert report == router_report([0, 1, 2, 3], [0, 1, 2, 2], MODALITIES) | {
        "token_accuracy": pytest.approx(7 / 12)}  # fmt: skip


def test_phase_2_trains_it_on_one_question_an_image_of_which_a_fifth_is_held_out(phantoms):
    model, samples, text = phantoms
    flags = TrainConfig(router_images=66, router_noise=0.25, experts=0, seed=3)
    kept, held = rt.hold_out(rt.one_per_image(samples, 66, 3), 0.2, 3)
    noisy, how = rt.mislabel(kept, 0.25, 3), (CPU, torch.float32)
    n_wrong = sum(a.modality != b.modality for a, b in zip(kept, noisy, strict=True))
    assert n_wrong == round(0.25 * len(kept)) and noisy != rt.mislabel(kept, 0.25, 4)
    parts = [rt.collect(model, part, text, (0, 2), 3, *how) for part in (noisy, held)]
    generator = torch.Generator().manual_seed(3)
    by_hand = rt.router_inputs(model, batch_of(model, held, text), (0, 2), generator)
    torch.testing.assert_close(parts[1][:2], by_hand)
    assert parts[1][2].tolist() == [MODALITIES.index(s.modality) for s in held]
    found = rt.learn_router(model, samples, text, flags, (0, 2), *how)
    wanted = rt.train_router(*parts, 4, 3)
    torch.testing.assert_close(found[0], wanted[0])
    assert found[1] == wanted[1]
    unknown = [replace(s, modality=None) for s in samples]
    assert rt.learn_router(model, unknown, text, flags, (0, 2), *how) == ({}, {})
    few = replace(flags, router_images=4, router_noise=0.0)  # one of each modality: none held out
    weights, report = rt.learn_router(model, samples, text, few, (0, 2), *how)
    assert report["n"] == 0 and weights["bias"].isfinite().all()
