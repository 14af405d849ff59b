"""--cache-features: the frozen tower's features of each image are computed once."""

import pytest
import torch

import train
from config import PRESETS, TrainConfig, UserError, warn_once
from engine.features import CachedTower, cache_features, check_cache
from model import autocast
from tests.conftest import randn
from tests.mini import losses, mini
from vision import VisionTower

NBYTES = 4 * 32 * 4  # of an image: 4 patches of 32 numbers of 4 bytes


@pytest.fixture
def computed(monkeypatch):
    """How many images pass the tower in each call of it."""
    hidden, counts = VisionTower.hidden, []
    monkeypatch.setattr(VisionTower, "hidden", lambda s, x: counts.append(len(x)) or hidden(s, x))
    return counts


@pytest.fixture
def model(build):
    model = build()
    model.vision.requires_grad_(False)
    return model


def cached(model, gb=1.0, n_processes=1):
    cache_features(model, TrainConfig(cache_features=True, cache_gb=gb), n_processes)
    assert type(model.vision) is CachedTower
    return model.vision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_new_images_pass_the_tower_and_each_keeps_its_features(model, computed, dtype):
    pixels = randn(5, 3, 32, 32)
    with autocast(torch.device("cpu"), dtype):
        plain, tower = model.vision(pixels), cached(model)
        assert torch.equal(tower(pixels), plain)
        assert torch.equal(tower(pixels[[3, 1, 3]]), plain[[3, 1, 3]])
        pixels[0, 2, 31, 31] += 1e-6
        tower.requires_grad_(True)
        cache_features(model, TrainConfig(cache_features=True), 1)  # trained, it keeps nothing new
        assert not tower(pixels[[0, 1, 0]]).requires_grad  # they are constants
        assert tower(pixels[:0]).shape == (0, 4, 32)  # texts alone need none
    assert computed[:3] == [5, 5, 1] and len(tower.known) == 6


@pytest.mark.parametrize("extra", [0, NBYTES - 1])
def test_it_grows_no_larger_than_it_may_and_warns_once(model, computed, capsys, extra):
    warn_once.cache_clear()
    pixels = randn(6, 3, 32, 32)
    plain, tower = model.vision(pixels), cached(model, gb=3e-9, n_processes=2)
    assert tower.room == 1.5  # each process has its part
    tower.room = 3 * NBYTES + extra
    for expected in ([6, 2, 2, 2], [1, 2]):
        found = torch.cat([tower(pixels[:2]), tower(pixels[2:4]), tower(pixels[4:])])
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
        assert computed == expected and len(tower.known) == 3 and tower.room == extra
        computed.clear()
    assert sum(kept.untyped_storage().nbytes() for kept in tower.known.values()) == 3 * NBYTES
    assert capsys.readouterr().err.count("--cache-gb") == 1


def test_a_run_computes_an_image_once_and_jitter_is_refused(tmp_path, computed, monkeypatch):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "parts"))
    found = []
    for more in ([], ["--cache-features"]):
        out = tmp_path / str(len(more))
        argv = "--preset mini --data phantoms:8 --batch-size 8 --phase 1 --steps 3 --no-eval"
        train.main([*argv.split(), "--dtype", "float32", "--out", str(out), *more])
        found.append([(r["loss"], r["grad_norm"]) for r in losses(out)])
    assert computed == [8, 8, 8, 8] and len(found[1]) == 3  # the second run's one is its first
    assert found[1] == [pytest.approx(step, abs=1e-5) for step in found[0]]
    check_cache(TrainConfig(cache_features=True, jitter=False))
    for flag, value in (("cache_gb", 0.0), ("jitter", True)):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}"):
            check_cache(TrainConfig(**{"cache_features": True, "jitter": False} | {flag: value}))
