"""The cache of the frozen tower's features: python -m pytest tests/test_features.py"""

import json
import resource
from types import SimpleNamespace

import pytest
import torch

import train
from config import ASSETS, DecoderConfig, ModelConfig, UserError, VisionConfig
from data import Dataset, Text
from engine import step
from engine.features import KEY, check_cache, open_features
from engine.processes import ALONE, Processes
from flags import TrainConfig
from model import MedMoE
from records import warn_once
from sources import load_samples
from vision import VisionTower

VISION = VisionConfig(image_size=32, patch_size=16, width=32, n_layers=3, n_heads=4, d_ff=64)
DECODER = DecoderConfig("phi", 1024, 32, 2, 4, 64, rotary_dim=4, max_len=128)
CONFIG = ModelConfig(VISION, DECODER)
RECORD = KEY + 4 + 4 * 32 * 4  # key, crc, 4 patches of 32 numbers of 4 bytes


@pytest.fixture(autouse=True)
def warn_again():
    warn_once.cache_clear()


def tower(shake, seed=1, config=CONFIG):
    return shake(MedMoE(config), seed).requires_grad_(False)


def cache(folder, model, gb=1.0, dtype=torch.float32, processes=ALONE):
    """A cache as a run opens it; `seen` has the number of pictures of each call of its tower."""
    run = SimpleNamespace(folder=folder, device=torch.device("cpu"), dtype=dtype, title="phase 3",
                          processes=processes)  # fmt: skip
    features = open_features(model, TrainConfig(cache_features=True, cache_gb=gb), run)
    features.seen = []
    features.hook = model.vision.register_forward_pre_hook(
        lambda _, images: features.seen.append(len(images[0]))
    )
    return features


def pictures(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def file_of(folder):
    (file,) = (folder / "features").iterdir()
    return file


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_what_is_kept_comes_back_bit_for_bit_and_in_its_dtype(tmp_path, shake, weights):
    model, pixels = tower(shake).to(weights), pictures(5)
    first = cache(tmp_path, model, dtype=weights)
    said = first(pixels)
    assert said.dtype == weights and said.shape == (5, 4, 32) and len(said.unique()) > 100
    torch.testing.assert_close(said, first.compute(pixels), rtol=0, atol=0)
    for features in (first, cache(tmp_path, model, dtype=weights)):  # in this run, in the next
        again = features(pixels[[3, 1, 3]])
        assert again.dtype == weights and torch.equal(again, said[[3, 1, 3]])


def test_only_new_pictures_pass_the_tower_and_each_once(tmp_path, shake):
    model, pixels = tower(shake), pictures(5)
    features = cache(tmp_path, model)
    features(pixels[[0, 1, 0]])
    assert features(pixels[:0]).shape == (0, 4, 32)  # a batch of texts
    features(pixels[[1, 2, 0, 3]])
    features(pixels[:4])
    assert features.seen == [2, 2]
    features.hook.remove()
    again = cache(tmp_path, model)
    again(pixels)
    assert again.seen == [1] and file_of(tmp_path).stat().st_size == 5 * RECORD


def test_another_tower_dtype_or_picture_is_not_mistaken_for_it(tmp_path, shake):
    pixels = pictures(2)
    cache(tmp_path, tower(shake))(pixels)
    other = tower(shake)
    other.vision.blocks[0].fc1.bias.data[3] += 1e-6
    heads = ModelConfig(VisionConfig(32, 16, 32, 3, n_heads=2, d_ff=64), DECODER)
    for model, dtype in ((other, torch.float32), (tower(shake, config=heads), torch.float32),
                         (tower(shake), torch.bfloat16)):  # fmt: skip
        features = cache(tmp_path, model, dtype=dtype)
        assert torch.equal(features(pixels), features.compute(pixels)) and features.seen == [2, 2]
    features = cache(tmp_path, tower(shake))
    changed = pixels.clone()
    changed[0, 2, 31, 31] ^= 1
    said = features(changed)
    assert features.seen == [1]
    torch.testing.assert_close(said, features.compute(changed), rtol=0, atol=1e-6)


def test_it_grows_no_larger_than_it_may_and_says_so_once(tmp_path, shake, capsys):
    model, pixels = tower(shake), pictures(6)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "of-another-tower-0").write_bytes(bytes(RECORD))
    bound = 4.5 * RECORD / 1e9  # of which the other tower's record takes one
    for _ in range(2):
        features = cache(tmp_path, model, gb=bound)
        said = torch.cat([features(pixels[:2]), features(pixels[2:4]), features(pixels[4:])])
        torch.testing.assert_close(said, features.compute(pixels), rtol=0, atol=1e-6)
        features.hook.remove()
        sizes = [file.stat().st_size for file in (tmp_path / "features").iterdir()]
        assert sorted(sizes) == [RECORD, 3 * RECORD]
    assert features.seen == [1, 2, 6]  # the three that are there did not pass again
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "--cache-gb" in told[0] and "is full" in told[0]


@pytest.mark.parametrize("left", [1, KEY, KEY + 3, KEY + 4, RECORD - 1])
def test_a_record_half_written_is_dropped_and_written_anew(tmp_path, shake, left, capsys):
    model, pixels = tower(shake), pictures(3)
    said = cache(tmp_path, model)(pixels)
    file = file_of(tmp_path)
    with file.open("r+b") as half:
        half.truncate(2 * RECORD + left)
    for n_new in ([1], []):
        features = cache(tmp_path, model)
        torch.testing.assert_close(features(pixels), said, rtol=0, atol=1e-6)
        assert features.seen == n_new and file.stat().st_size == 3 * RECORD
        features.hook.remove()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("where", [0, KEY - 1, KEY, KEY + 3, KEY + 4, RECORD - 1])
def test_a_damaged_record_is_never_used(tmp_path, shake, where, capsys):
    model, pixels = tower(shake), pictures(3)
    said = cache(tmp_path, model)(pixels)
    file = file_of(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[RECORD + where] ^= 64
    file.write_bytes(damaged)
    for n_new in ([1], []):
        features = cache(tmp_path, model)
        torch.testing.assert_close(features(pixels), said, rtol=0, atol=1e-6)
        assert features.seen == n_new
        features.hook.remove()
    assert ("damaged" in capsys.readouterr().err) == (where >= KEY)  # else nobody looks for it


def test_values_under_a_wrong_key_are_never_used(tmp_path, shake):
    """As after a crash that kept another part of the file than was written last."""
    model, pixels = tower(shake), pictures(2)
    said = cache(tmp_path, model)(pixels)
    file = file_of(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:KEY] + whole[RECORD + KEY :])  # the first's key, the second's values
    features = cache(tmp_path, model)
    torch.testing.assert_close(features(pixels), said, rtol=0, atol=1e-6)
    assert features.seen == [2]


@pytest.mark.parametrize("room", [2.0, 2.5])
def test_on_a_full_disk_it_goes_on_without_adding_and_says_so_once(tmp_path, shake, room, capsys):
    model, pixels = tower(shake), pictures(6)
    features = cache(tmp_path, model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * RECORD), hard))
    try:
        said = torch.cat([features(pixels[:4]), features(pixels[4:])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.testing.assert_close(said, features.compute(pixels), rtol=0, atol=1e-6)
    assert file_of(tmp_path).stat().st_size == 2 * RECORD
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "new pictures pass the tower each time" in told[0]
    features.seen.clear()
    features(pixels)  # room that comes free is left to the checkpoints
    assert features.seen == [4] and file_of(tmp_path).stat().st_size == 2 * RECORD


def test_each_process_writes_a_file_of_its_own_and_reads_all(tmp_path, shake):
    model, pixels = tower(shake), pictures(4)
    first, second = (cache(tmp_path, model, processes=Processes(rank, 2)) for rank in range(2))
    said = first(pixels[:2]), second(pixels[2:])
    assert len(list((tmp_path / "features").iterdir())) == 2
    first.hook.remove(), second.hook.remove()
    alone = cache(tmp_path, model)
    assert torch.equal(alone(pixels), torch.cat(said)) and alone.seen == []
    assert second.room == 0.5e9 - 2 * RECORD  # its half of what was free


def test_the_loss_and_its_gradients_are_those_without_a_cache(tmp_path, shake):
    model, samples = tower(shake), load_samples(("phantoms:12",), "vqa", "train")
    data = Dataset(samples, Text(ASSETS / "phi"), CONFIG, plain=False)
    model.projector.requires_grad_(True)
    where = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, processes=ALONE,
                            title="phase 3")  # fmt: skip
    steps = list(range(0, len(samples), 5)), list(range(2, len(samples), 5))
    kept, found = cache(tmp_path, model), []
    for data.features in (None, kept):
        kept.seen.clear()
        for rows in steps:
            loss, *_ = step.forward_backward(model, data, rows, TrainConfig(accumulate=2), where)
            grads = [p.grad.clone() for p in model.projector.parameters()]
            found.append([torch.tensor(loss), *grads])
            model.zero_grad()
    for without, cached in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(cached, without, rtol=0, atol=1e-6)
    assert sum(kept.seen) == 12  # all pictures, and each once
    batch = data.batch([0, 1])
    assert batch.images.shape == (0, 3, 32, 32) and batch.features.shape == (2, 4, 32)
    kept.seen.clear()
    step.forward_backward(model, data, steps[0], TrainConfig(), where)
    assert kept.seen == []


def test_a_batch_of_texts_has_no_features(tmp_path, shake, collate):
    model = tower(shake)
    features = cache(tmp_path, model)
    batch = collate([([1, 2, 3], [-100, 2, 3])])
    plain = model.loss(batch).total
    cached = model.loss(batch._replace(features=features(pictures(0)))).total
    assert torch.equal(plain, cached) and features.seen == []


def test_a_phase_that_trains_the_tower_keeps_nothing_and_says_so(tmp_path, shake, capsys):
    model = tower(shake)
    run = SimpleNamespace(folder=tmp_path, title="phase 2")
    assert open_features(model, TrainConfig(), run) is None
    model.vision.blocks[1].fc2.bias.requires_grad_(True)
    assert open_features(model, TrainConfig(cache_features=True), run) is None
    assert capsys.readouterr().out.count("phase 2: trains the tower") == 1
    assert not list(tmp_path.iterdir())


def test_pictures_that_vary_cannot_be_kept(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--cache-features", "--jitter"])
    told = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(told) == 1 and "--no-jitter" in told[0]
    check_cache(TrainConfig(jitter=True))
    for gb in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"--cache-gb {gb}: must be above 0"):
            check_cache(TrainConfig(cache_gb=gb))


def test_a_run_fills_the_cache_and_the_next_finds_it(tmp_path, monkeypatch):
    hidden, seen, losses = VisionTower.hidden, [], []
    monkeypatch.setattr(
        VisionTower, "hidden", lambda self, x: (seen.append(len(x)), hidden(self, x))[1]
    )
    argv = ["--data", "phantoms:16", "--out", str(tmp_path), "--batch-size", "8", "--phase", "1",
            "--steps", "2", "--no-eval", "--dtype", "float32"]  # fmt: skip
    for cached in ([], ["--cache-features"], ["--cache-features"]):
        train.main([*argv, *cached])
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        losses.append([r["loss"] for r in map(json.loads, lines) if "loss" in r])
    assert seen == [8, 8, 1, 8, 8, 1]  # the 1 asks what shape and dtype the tower gives
    assert losses[1] == losses[2] == pytest.approx(losses[0], abs=1e-6)
    assert file_of(tmp_path).stat().st_size == 16 * (KEY + 4 + 49 * 128 * 4)
