"""Out-of-distribution detection: distances to the training images, and their limit."""

from pathlib import Path

import pytest
import torch

import train
from checkpoint import save_checkpoint
from config import PRESETS, TrainConfig, UserError, to_dict
from data import Sample
from engine import familiar
from sources.images import Images
from sources.load import load_samples
from tests.conftest import randn
from tests.mini import TOKENIZER, mini

FLAGS = TrainConfig(data=("phantoms:120",), workers=0)
FP32 = torch.device("cpu"), torch.float32
SAMPLES = load_samples(FLAGS.data, "vqa", "train")


def test_distances_are_in_standard_deviations_and_99_of_100_held_out_are_below_the_limit():
    mix = torch.tensor([[3.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 2]]).double()
    trained, held_out = (randn(2000, 4, seed=i).double() @ mix + 7 for i in (0, 1))
    found = familiar.distance(held_out, known := familiar.fit(trained, held_out))
    assert found.pow(2).mean() == pytest.approx(4, rel=0.1)  # chi-squared with 4 degrees
    assert (found > known["limit"]).sum() == 20
    few = [randn(60, 200, seed=i).double() for i in (0, 1)]  # the other 140 directions are no 0
    assert familiar.fit(*few)["limit"] < 1000
    alike = torch.ones(60, 6).double()  # 60 times one image: no variance at all
    assert familiar.distance(alike[:1] + 1e-3, known := familiar.fit(alike, alike)) > known["limit"]


def test_training_and_held_out_images_are_chosen_once_each(monkeypatch):
    trained, held_out = familiar.choose(SAMPLES, FLAGS)
    assert [len({s.image for s in part}) for part in (trained, held_out)] == [120, 200]
    assert len(trained) == 120 and {s.split for s in held_out} == {"val"}
    failing = lambda *_, **__: (_ for _ in ()).throw(UserError("gone"))  # noqa: E731
    for name, fails in (("load_samples", failing), ("has_splits", lambda spec: False)):
        with monkeypatch.context() as patch:  # its val cannot be read; it has none
            patch.setattr(familiar, name, fails)
            parts = familiar.choose(SAMPLES, FLAGS)
        assert [len(part) for part in parts] == [80, 40]
        assert {s.image for part in parts for s in part} == {s.image for s in trained}


def test_a_phase_measures_it_when_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path))
    train.main(["--preset", "mini", "--phase", "1", "--data", "phantoms:60", "--steps", "1",
                "--no-eval", "--device", "cpu", "--out", str(tmp_path)])  # fmt: skip
    assert familiar.read(tmp_path / "phase1")["mean"].shape == (32,)


def test_a_checkpoint_knows_which_images_are_unlike_its_own(build, tmp_path, capsys):
    model, info = build(), {"phase": 3, "flags": to_dict(FLAGS)}
    found = familiar.measure(model, SAMPLES, FLAGS, *FP32)
    save_checkpoint(tmp_path / "a", model, model.config, info, TOKENIZER, found)
    known = familiar.read(tmp_path / "a")
    assert familiar.read(tmp_path) is None  # as of an older checkpoint
    images = torch.stack([Images(32).read(seed) for seed in range(2 * 10**9, 2 * 10**9 + 100)])
    patches = model.vision(familiar.normalise(images)).double().detach()
    features = familiar.image_features(model, images)
    spread = (patches**2).mean(1) - patches.mean(1) ** 2
    assert torch.allclose(features[:, :32], patches.mean(1), atol=1e-5)
    assert torch.allclose(features[:, 32:] ** 2, spread, atol=1e-4)
    assert (familiar.distance(features, known) > known["limit"]).sum() < 10
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    for image, n in ((images[0], 0), (red, 1)):
        found = familiar.unlike(model, image, known)
        assert found.count("99% of held-out ones are below") == n and bool(found) == n
    assert familiar.measure(model, SAMPLES[:40], FLAGS, *FP32) == {}  # too few images
    broken = [*SAMPLES, Sample("", "phantoms", "train", Path("no.png"), ())]
    assert familiar.measure(model, broken, FLAGS, *FP32) == {}  # what was trained is not lost
    assert "no.png" in capsys.readouterr().err
