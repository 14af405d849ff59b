"""The cache of the frozen tower's features: python -m pytest tests/engine/test_features.py"""

import json

import pytest
import torch

import train
from config import (
    ASSETS,
    DecoderConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    VisionConfig,
    warn_once,
)
from data import Dataset, Text
from engine.features import CachedTower, cache_features, check_cache
from model import MedMoE, autocast
from sources.images import Images
from sources.load import load_samples
from tests.one_step import gradients, place
from vision import VisionTower

VISION = VisionConfig(image_size=32, patch_size=16, width=32, n_layers=3, n_heads=4, d_ff=64)
DECODER = DecoderConfig("phi", 1024, 32, 2, 4, 64, rotary_dim=4, max_len=128)
CONFIG = ModelConfig(VISION, DECODER)
NBYTES = 4 * 32 * 4  # 4 patches of 32 numbers of 4 bytes
CPU = torch.device("cpu")


@pytest.fixture
def computed(monkeypatch):
    """How many images pass the tower in each call of it."""
    forward, counts = VisionTower.hidden, []
    monkeypatch.setattr(
        VisionTower, "hidden", lambda self, x: (counts.append(len(x)), forward(self, x))[1]
    )
    return counts


def frozen(shake):
    return shake(MedMoE(CONFIG), 1).requires_grad_(False)


def cached(model, gb=1.0, n_processes=1):
    cache_features(model, TrainConfig(cache_features=True, cache_gb=gb), n_processes)
    return model.vision


def images(n):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remembered_features_are_those_that_were_computed(shake, computed, dtype):
    pixels = images(5)
    with torch.no_grad(), autocast(CPU, dtype):
        plain = frozen(shake).vision(pixels)
        tower = cached(frozen(shake))
        assert type(tower) is CachedTower
        first, again = tower(pixels), tower(pixels[[3, 1, 3]])
    assert len(plain.unique()) > 100
    for found, expected in ((first, plain), (again, plain[[3, 1, 3]])):
        assert found.dtype == plain.dtype and torch.equal(found, expected)
    assert computed == [5, 5]


def test_only_new_images_pass_the_tower_and_each_once(shake, computed):
    tower, pixels = cached(frozen(shake)), images(5)
    tower(pixels[[0, 1, 0]])
    tower(pixels[[1, 2, 0, 3]])
    tower(pixels[:4])
    assert computed == [2, 2]
    changed = pixels[:2].clone()
    changed[0, 2, 31, 31] += 1e-6
    found = tower(changed)
    assert computed == [2, 2, 1]
    torch.testing.assert_close(found, frozen(shake).vision(changed), rtol=0, atol=1e-6)


def test_it_grows_no_larger_than_it_may_and_warns_once(shake, computed, capsys):
    warn_once.cache_clear()
    pixels, plain = images(6), frozen(shake).vision(images(6))
    computed.clear()
    tower = cached(frozen(shake), gb=7 * NBYTES / 1e9, n_processes=2)  # each may keep 3.5 images
    for expected in ([2, 2, 2], [1, 2]):
        found = torch.cat([tower(pixels[:2]), tower(pixels[2:4]), tower(pixels[4:])])
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
        assert computed == expected and len(tower.known) == 3
        computed.clear()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--cache-gb" in lines[0]
    assert sum(t.untyped_storage().nbytes() for t in tower.known.values()) == 3 * NBYTES


def test_the_loss_and_its_gradients_are_those_without_a_cache(tmp_path, shake, computed):
    samples, found = load_samples(("phantoms:12",), "vqa", "train"), []
    data = Dataset(samples, Text(ASSETS / "phi"), CONFIG, False, Images(32))
    flags = TrainConfig(device="cpu", dtype="float32", accumulate=2)
    steps = list(range(0, len(samples), 5)), list(range(2, len(samples), 5))
    for uses_cache in (False, True):
        model = frozen(shake)
        model.projector.requires_grad_(True)
        if uses_cache:
            cached(model)
            computed.clear()
        for rows in (*steps, *steps):
            loss, _ = gradients(model, data, rows, flags, place(tmp_path, flags))
            found.append([torch.tensor(loss), *(p.grad for p in model.projector.parameters())])
            model.zero_grad()
    for without, with_cache in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(with_cache, without, rtol=0, atol=1e-6)
    assert sum(computed) == 12  # every image, once


def test_a_batch_of_texts_needs_no_features(shake, collate):
    model = frozen(shake)
    batch = collate([([1, 2, 3], [-100, 2, 3])])
    plain = model.loss(batch).total
    cached(model)
    assert torch.equal(plain, model.loss(batch).total) and not model.vision.known


def test_a_phase_that_trains_the_tower_caches_nothing_and_says_so(shake, capsys):
    model = frozen(shake)
    cache_features(model, TrainConfig(), 1)
    model.vision.blocks[1].fc2.bias.requires_grad_(True)
    cache_features(model, TrainConfig(phase=2, cache_features=True), 1)
    assert capsys.readouterr().out.count("phase 2: trains the tower") == 1
    assert type(model.vision) is VisionTower


def test_images_that_vary_cannot_be_cached(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--cache-features", "--jitter"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "--no-jitter" in lines[0]
    check_cache(TrainConfig(jitter=True))
    for gb in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"--cache-gb {gb}: must be above 0"):
            check_cache(TrainConfig(cache_gb=gb))


def test_a_run_computes_every_image_once(tmp_path, computed):
    argv = ["--data", "phantoms:8", "--batch-size", "8", "--phase", "1", "--steps", "3",
            "--no-eval", "--dtype", "float32"]  # fmt: skip
    losses = []
    for number, more in enumerate(([], ["--cache-features"])):
        train.main([*argv, "--out", str(tmp_path / str(number)), *more])
        lines = (tmp_path / str(number) / "log.jsonl").read_text().splitlines()
        losses.append([r["loss"] for r in map(json.loads, lines) if "loss" in r])
    assert computed == [8, 8, 8, 8]  # the second run's one is its first
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
