"""--cache-features: the frozen tower's features of each image are computed once."""

import pytest
import torch

import train
from config import PRESETS, TrainConfig, UserError, warn_once
from engine.features import CachedTower, cache_features, check_cache
from model import autocast
from tests.mini import losses, mini
from vision import VisionTower

NBYTES = 4 * 32 * 4  # of an image: 4 patches of 32 numbers of 4 bytes
CPU = torch.device("cpu")


@pytest.fixture
def computed(monkeypatch):
    """How many images pass the tower in each call of it."""
    hidden, counts = VisionTower.hidden, []
    monkeypatch.setattr(
        VisionTower, "hidden", lambda self, x: (counts.append(len(x)), hidden(self, x))[1]
    )
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


def images(n):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remembered_features_are_those_that_were_computed(model, computed, dtype):
    pixels = images(5)
    with autocast(CPU, dtype):
        plain = model.vision(pixels)
        tower = cached(model)
        found = [tower(pixels), tower(pixels[[3, 1, 3]])]
        tower.requires_grad_(True)
        assert not tower(-pixels[:1]).requires_grad  # they are constants
    assert found[0].dtype == plain.dtype and len(plain.unique()) > 100
    assert torch.equal(found[0], plain) and torch.equal(found[1], plain[[3, 1, 3]])
    assert computed == [5, 5, 1]


def test_only_new_images_pass_the_tower_and_each_once(model, computed):
    pixels = images(5)
    plain, tower = model.vision(pixels), cached(model)
    for rows in ([0, 1, 0], [1, 2, 0, 3], [0, 1, 2, 3]):
        torch.testing.assert_close(tower(pixels[rows]), plain[rows], rtol=0, atol=1e-5)
    assert computed == [5, 2, 2]
    pixels[0, 2, 31, 31] += 1e-6
    tower(pixels[:2])
    assert computed == [5, 2, 2, 1]


@pytest.mark.parametrize("extra", [0, NBYTES - 1])
def test_it_grows_no_larger_than_it_may_and_warns_once(model, computed, capsys, extra):
    warn_once.cache_clear()
    pixels, plain = images(6), model.vision(images(6))
    tower = cached(model, gb=3e-9, n_processes=2)
    assert tower.room == 1.5 and not tower.known  # each process has its part
    tower.room = 3 * NBYTES + extra
    for expected in ([2, 2, 2], [1, 2]):
        computed.clear()
        found = torch.cat([tower(pixels[:2]), tower(pixels[2:4]), tower(pixels[4:])])
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
        assert computed == expected and len(tower.known) == 3 and tower.room == extra
    assert sum(t.untyped_storage().nbytes() for t in tower.known.values()) == 3 * NBYTES
    assert capsys.readouterr().err.count("--cache-gb") == 1


def test_a_batch_of_texts_needs_no_features(model, collate):
    batch = collate([([1, 2, 3], [-100, 2, 3])])
    plain = model.loss(batch).total
    tower = cached(model)
    assert torch.equal(plain, model.loss(batch).total) and not tower.known
    assert tower(images(0)).shape == (0, 4, 32)


def test_a_tower_that_is_trained_is_not_cached_and_one_line_says_so(model, capsys):
    cache_features(model, TrainConfig(), 1)
    assert type(model.vision) is VisionTower and not capsys.readouterr().out
    model.vision.blocks[1].fc2.bias.requires_grad_(True)
    cache_features(model, TrainConfig(phase=2, cache_features=True), 1)
    assert capsys.readouterr().out.count("phase 2: trains the tower") == 1
    assert type(model.vision) is VisionTower


def test_images_that_vary_and_a_cache_of_no_size_are_refused():
    for fine in ({"jitter": True}, {"cache_features": True}, {"cache_gb": 1e-9}):
        check_cache(TrainConfig(**fine))
    wrong = [({"jitter": True, "cache_features": True}, "--no-jitter")]
    wrong += [({"cache_gb": gb}, f"--cache-gb {gb}") for gb in (0.0, -1.0, float("nan"))]
    for flags, named in wrong:
        with pytest.raises(UserError, match=named):
            check_cache(TrainConfig(**flags))


def test_a_run_computes_every_image_once_and_its_losses_stay(tmp_path, computed, monkeypatch):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "parts"))
    found = []
    for more in ([], ["--cache-features"]):
        out = tmp_path / str(len(more))
        train.main(["--preset", "mini", "--data", "phantoms:8", "--batch-size", "8", "--phase", "1",
                    "--steps", "3", "--no-eval", "--dtype", "float32", "--out",
                    str(out), *more])  # fmt: skip
        found.append([(r["loss"], r["grad_norm"]) for r in losses(out)])
    assert computed == [8, 8, 8, 8] and len(found[1]) == 3  # the second run's one is its first
    assert found[1] == [pytest.approx(step, abs=1e-5) for step in found[0]]
