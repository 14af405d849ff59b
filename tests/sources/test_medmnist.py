"""MedMNIST's files as published, or broken in each way; its scores by their definitions."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from sources.medmnist import SETS, accuracy, auc, read_split, which
from tests.sources import written

IMAGES, LABELS = "test_images.npy", "test_labels.npy"
GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(256, size=(6, 28, 28), dtype=np.uint8)
GOOD = {IMAGES: PIXELS, LABELS: np.zeros((6, 1), np.uint8)}


def write(file, members, **claims):
    """A zip of arrays. `claims` are what the zip's directory then claims about the images."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            with archive.open(name, "w") as member:
                np.lib.format.write_array(member, content, allow_pickle=True)
        for field, value in claims.items():
            setattr(archive.getinfo(IMAGES), field, value)
    read_split.cache_clear()
    return file


def refused(file, *parts):
    """Reading ends in one short line that begins with the file and has all the parts."""
    message = written.refused(rf"^{file}: [^\n]{{,250}}$", read_split, file, "test")
    assert all(part in message for part in parts), message


FACTS = {
    "pathmnist": (9, 89996, 10004, 7180), "chestmnist": (14, 78468, 11219, 22433),
    "dermamnist": (7, 7007, 1003, 2005), "octmnist": (4, 97477, 10832, 1000),
    "pneumoniamnist": (2, 4708, 524, 624), "retinamnist": (5, 1080, 120, 400),
    "breastmnist": (2, 546, 78, 156), "bloodmnist": (8, 11959, 1712, 3421),
    "tissuemnist": (8, 165466, 23640, 47280), "organamnist": (11, 34561, 6491, 17778),
    "organcmnist": (11, 12975, 2392, 8216), "organsmnist": (11, 13932, 2452, 8827)}  # fmt: skip


def test_the_sets_are_their_owners_and_known_by_their_files_names():
    assert {name: (len(set(s.classes)), *s.counts) for name, s in SETS.items()} == FACTS
    for ending in (".npz", "_64.npz"):
        assert which(Path("mnist") / f"organsmnist{ending}") is SETS["organsmnist"]
    for name in ("mnist.npz", "octmnist3d.npz"):
        sets = ".*".join(SETS)
        written.refused(f"^pathmnist/{name}: .*{sets}", which, Path("pathmnist") / name)


@pytest.mark.parametrize(("name", "highest", "columns", "dtype", "shape"), [
    ("bloodmnist", 7, 1, "u1", (1, 1, 3)), ("chestmnist", 1, 14, ">i4", (1024, 1024))])  # fmt: skip
def test_a_split_is_read_as_written_and_once(tmp_path, name, highest, columns, dtype, shape):
    file, made = tmp_path / f"{name}.npz", {}
    for split in ("train", "val", "test"):
        made[f"{split}_images"] = GENERATOR.integers(256, size=(3, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = GENERATOR.integers(highest + 1, size=(3, columns)).astype(dtype)
        made[f"{split}_labels"][0] = highest
    (np.savez_compressed if columns > 1 else np.savez)(file, **made)
    for split in ("train", "val", "test"):
        images, labels = read_split(file, split)
        wanted = made[f"{split}_labels"].astype(np.int64)
        np.testing.assert_array_equal(images, made[f"{split}_images"], strict=True)  # dtype too
        np.testing.assert_array_equal(labels, wanted if columns > 1 else wanted[:, 0], strict=True)
        assert read_split(file, split)[0] is images
        assert not images.flags.writeable and not labels.flags.writeable


def test_what_is_no_sound_zip_is_refused(tmp_path):
    file = tmp_path / "octmnist.npz"
    refused(write(file, GOOD, file_size=20_000_000_001), f"{IMAGES}: claims 20000000001 bytes")
    refused(write(file, GOOD, file_size=20_000_000_000), "no image compresses so well")
    refused(write(file, {LABELS: GOOD[LABELS]}), f"{IMAGES}: is missing")
    file.write_bytes(b"")
    refused(file, "not a zip")


@pytest.mark.parametrize(("member", "content", "reason"), [
    (IMAGES, np.zeros((6, 28, 29), np.uint8), "is uint8 (6, 28, 29), must be uint8"),
    (IMAGES, np.zeros((6, 1025, 1025), np.uint8), "S from 1 to 1024"),
    (IMAGES, np.array([{"a": 1}], dtype=object), "its npy header"),  # a pickle
    (LABELS, np.zeros((6, 1)), "is float64"),
    (LABELS, np.zeros((5, 1), int), "must be integers (6, 1) for 6 images"),
    (LABELS, np.array([[0], [1], [3], [4], [-1], [0]]), "row 3 (from 0) is 4, must be 0 to 3"),
])  # fmt: skip
def test_an_array_that_is_a_pickle_or_does_not_fit_is_refused(tmp_path, member, content, reason):
    refused(write(tmp_path / "octmnist.npz", GOOD | {member: content}), member, reason)


def naive(truth, scores, task):
    """AUC by counting pairs, accuracy by counting answers."""
    labels = truth if task == "multi-label" else np.eye(scores.shape[1])[truth]
    columns = list(zip(labels.T == 1, scores.T, strict=True))[task == "binary-class" :]
    areas = [np.mean([(a > b) + (a == b) / 2 for a in column[hits] for b in column[~hits]])
             for hits, column in columns]  # fmt: skip
    right = [np.mean((column > 0.5) == hits) for hits, column in columns]
    if task in ("multi-class", "ordinal"):  # the first of equal scores is the answer
        right = [list(s).index(max(s)) == t for s, t in zip(scores, truth, strict=True)]
    return np.mean(areas), np.mean(right)


@pytest.mark.parametrize("task", ["multi-class", "ordinal", "binary-class", "multi-label"])
def test_auc_counts_pairs_and_accuracy_what_is_right(task):
    n_classes = 2 if task == "binary-class" else 4
    for _ in range(4):
        truth = GENERATOR.permutation(np.arange(40) % n_classes)
        truth = GENERATOR.integers(2, size=(40, 4)) if task == "multi-label" else truth
        scores = GENERATOR.integers(0, 9, (40, n_classes)) / 8  # with many ties
        found = auc(truth, scores, task), accuracy(truth, scores, task)
        assert found == pytest.approx(naive(truth, scores, task), abs=1e-12)
    assert auc(np.zeros_like(truth), scores, task) is None
    scores[1, 1] = np.nan
    for score in (auc, accuracy):
        with pytest.raises(ValueError, match=f"{task}: a score is not finite"):
            score(truth, scores, task)
