"""The cache of the frozen tower's features: python -m pytest tests/test_features.py"""

import json
import resource

import pytest
import torch
from one_step import gradients, place

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
from engine.processes import ALONE, Processes
from model import MedMoE, autocast
from sources.images import Images
from sources.load import load_samples
from vision import VisionTower

VISION = VisionConfig(image_size=32, patch_size=16, width=32, n_layers=3, n_heads=4, d_ff=64)
DECODER = DecoderConfig("phi", 1024, 32, 2, 4, 64, rotary_dim=4, max_len=128)
CONFIG = ModelConfig(VISION, DECODER)
NBYTES = 4 * 32 * 4  # 4 patches of 32 numbers of 4 bytes
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def warn_again():
    warn_once.cache_clear()


def frozen(shake, seed=1, config=CONFIG):
    return shake(MedMoE(config), seed).requires_grad_(False)


def cached(folder, model, gb=1.0, dtype=torch.float32, processes=ALONE):
    """The model's tower with a cache -> it, and how many images pass the tower in each call."""
    flags = TrainConfig(cache_features=True, cache_gb=gb)
    cache_features(model, flags, folder, dtype, processes)
    seen = []

    def compute(new):
        seen.append(len(new))
        return VisionTower.forward(model.vision, new)

    def call(images):
        with autocast(CPU, dtype), torch.no_grad():
            return model.vision.cache(images, compute)

    return call, seen


def images(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(folder.glob("features/*/*.safetensors"))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_stored_features_come_back_bit_for_bit_and_in_their_dtype(tmp_path, shake, weights):
    model, pixels = frozen(shake).to(weights), images(5)
    pixels = pixels.to(weights)
    first, _ = cached(tmp_path, model, dtype=weights)
    found = first(pixels)
    assert found.dtype == weights and found.shape == (5, 4, 32) and len(found.unique()) > 100
    plain = frozen(shake).to(weights).vision
    with torch.no_grad(), autocast(CPU, weights):
        torch.testing.assert_close(found, plain(pixels), rtol=0, atol=0)
    second, seen = cached(tmp_path, frozen(shake).to(weights), dtype=weights)
    for features in (first, second):  # in this run, in the next
        again = features(pixels[[3, 1, 3]])
        assert again.dtype == weights and torch.equal(again, found[[3, 1, 3]])
    assert seen == []


def test_only_new_images_pass_the_tower_and_each_once(tmp_path, shake):
    model, pixels = frozen(shake), images(5)
    features, seen = cached(tmp_path, model)
    features(pixels[[0, 1, 0]])
    features(pixels[[1, 2, 0, 3]])
    features(pixels[:4])
    assert seen == [2, 2]
    again, seen = cached(tmp_path, frozen(shake))
    again(pixels)
    assert seen == [1] and len(files(tmp_path)) == 5


def test_another_tower_dtype_or_image_is_not_mistaken_for_it(tmp_path, shake):
    pixels = images(2)
    cached(tmp_path, frozen(shake))[0](pixels)
    other = frozen(shake)
    other.vision.blocks[0].fc1.bias.data[3] += 1e-6
    heads = ModelConfig(VisionConfig(32, 16, 32, 3, n_heads=2, d_ff=64), DECODER)
    for model, dtype in ((other, torch.float32), (frozen(shake, config=heads), torch.float32),
                         (frozen(shake), torch.bfloat16)):  # fmt: skip
        features, seen = cached(tmp_path, model, dtype=dtype)
        features(pixels)
        assert seen == [2]
    features, seen = cached(tmp_path, frozen(shake))
    changed = pixels.clone()
    changed[0, 2, 31, 31] += 1e-6
    found = features(changed)
    assert seen == [1]
    with torch.no_grad():
        plain = frozen(shake).vision(changed)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


def test_it_grows_no_larger_than_it_may_and_warns_once(tmp_path, shake, capsys):
    pixels = images(6)
    (tmp_path / "features" / "of-another-tower").mkdir(parents=True)
    (tmp_path / "features" / "of-another-tower" / "x").write_bytes(bytes(1000))
    with torch.no_grad():
        plain = frozen(shake).vision(pixels)
    bound = (1000 + 3.5 * (NBYTES + 100)) / 1e9  # a file has a header of some 100 bytes
    for expected in ([2, 2, 2], [1, 2]):  # of the second run three are on disk
        features, seen = cached(tmp_path, frozen(shake), gb=bound)
        found = torch.cat([features(pixels[:2]), features(pixels[2:4]), features(pixels[4:])])
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
        assert seen == expected and len(files(tmp_path)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--cache-gb" in lines[0] and "is full" in lines[0]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_file_is_never_used_and_is_written_again(tmp_path, shake, damage, capsys):
    pixels = images(3)
    found = cached(tmp_path, frozen(shake))[0](pixels)
    file = files(tmp_path)[1]
    sound = bytearray(file.read_bytes())
    if damage == "bit":
        sound[-20] ^= 64
    file.write_bytes({"cut": sound[:-7], "bit": sound, "empty": b""}[damage])
    for n_new in ([1], []):
        features, seen = cached(tmp_path, frozen(shake))
        torch.testing.assert_close(features(pixels), found, rtol=0, atol=1e-6)
        assert seen == n_new
    assert "damaged" in capsys.readouterr().err


def test_a_file_that_a_crash_left_half_written_is_not_read(tmp_path, shake):
    pixels = images(2)
    cached(tmp_path, frozen(shake))[0](pixels)
    for file in files(tmp_path):
        file.rename(file.with_suffix(".0.part"))
    features, seen = cached(tmp_path, frozen(shake))
    features(pixels)
    assert seen == [2]


def test_on_a_full_disk_it_continues_without_writing_and_warns_once(tmp_path, shake, capsys):
    pixels = images(6)
    features, seen = cached(tmp_path, frozen(shake))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NBYTES // 2, hard))
    try:
        found = torch.cat([features(pixels[:4]), features(pixels[4:])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with torch.no_grad():
        torch.testing.assert_close(found, frozen(shake).vision(pixels), rtol=0, atol=1e-6)
    assert not files(tmp_path) and not list(tmp_path.rglob("*.part"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "new images pass the tower each time" in lines[0]
    features(pixels)  # space that becomes free is left to the checkpoints
    assert seen == [4, 2, 6] and not files(tmp_path)


def test_processes_share_the_files_and_the_limit(tmp_path, shake):
    pixels = images(4)
    models = [frozen(shake) for _ in range(2)]
    both = [cached(tmp_path, m, processes=Processes(rank, 2)) for rank, m in enumerate(models)]
    found = both[0][0](pixels[:2]), both[1][0](pixels[2:])
    alone, seen = cached(tmp_path, frozen(shake))
    assert torch.equal(alone(pixels), torch.cat(found)) and seen == []
    used = sum(file.stat().st_size for file in files(tmp_path)[:2])
    assert models[1].vision.cache.room == 0.5e9 - used  # its half, less what it wrote


def test_the_loss_and_its_gradients_are_those_without_a_cache(tmp_path, shake):
    samples, found = load_samples(("phantoms:12",), "vqa", "train"), []
    data = Dataset(samples, Text(ASSETS / "phi"), CONFIG, False, Images(32))
    flags = TrainConfig(device="cpu", dtype="float32", accumulate=2)
    steps = list(range(0, len(samples), 5)), list(range(2, len(samples), 5))
    for uses_cache in (False, True):
        model = frozen(shake)
        model.projector.requires_grad_(True)
        if uses_cache:
            cached(tmp_path, model)
            assert type(model.vision) is CachedTower
        for rows in (*steps, *steps):
            loss, _ = gradients(model, data, rows, flags, place(tmp_path, flags))
            found.append([torch.tensor(loss), *(p.grad for p in model.projector.parameters())])
            model.zero_grad()
    for without, with_cache in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(with_cache, without, rtol=0, atol=1e-6)
    assert len(files(tmp_path)) == 12  # every image, once


def test_a_batch_of_texts_needs_no_features(tmp_path, shake, collate):
    model = frozen(shake)
    batch = collate([([1, 2, 3], [-100, 2, 3])])
    plain = model.loss(batch).total
    cached(tmp_path, model)
    assert torch.equal(plain, model.loss(batch).total) and not files(tmp_path)


def test_a_phase_that_trains_the_tower_caches_nothing_and_says_so(tmp_path, shake, capsys):
    model = frozen(shake)
    cache_features(model, TrainConfig(), tmp_path, torch.float32, ALONE)
    model.vision.blocks[1].fc2.bias.requires_grad_(True)
    flags = TrainConfig(phase=2, cache_features=True)
    cache_features(model, flags, tmp_path, torch.float32, ALONE)
    assert capsys.readouterr().out.count("phase 2: trains the tower") == 1
    assert type(model.vision) is VisionTower and not list(tmp_path.iterdir())


def test_images_that_vary_cannot_be_cached(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--cache-features", "--jitter"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "--no-jitter" in lines[0]
    check_cache(TrainConfig(jitter=True))
    for gb in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"--cache-gb {gb}: must be above 0"):
            check_cache(TrainConfig(cache_gb=gb))


def test_a_run_fills_the_cache_and_the_next_reads_it(tmp_path, monkeypatch):
    forward, seen, losses = VisionTower.forward, [], []
    monkeypatch.setattr(
        VisionTower, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1]
    )
    argv = ["--data", "phantoms:16", "--out", str(tmp_path), "--batch-size", "8", "--phase", "1",
            "--steps", "2", "--no-eval", "--dtype", "float32"]  # fmt: skip
    for more in ([], ["--cache-features"], ["--cache-features"]):
        train.main([*argv, *more])
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        losses.append([r["loss"] for r in map(json.loads, lines) if "loss" in r])
    assert seen == [8, 8, 8, 8]  # the third run reads all from disk
    assert losses[1] == losses[2] == pytest.approx(losses[0], abs=1e-6)
    assert len(files(tmp_path)) == 16
