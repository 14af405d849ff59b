"""MedMNIST's files as published, or broken in each way; its scores by their definitions."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from sources import medmnist
from sources.medmnist import SETS, SPLITS, accuracy, auc, read_split, which

REAL = Path(__file__).parents[3] / "shared" / "data" / "pneumoniamnist"
IMAGES, LABELS = "test_images.npy", "test_labels.npy"
# As the owners' info.py has them: the number of classes, and of images in each split.
FACTS = {
    "pathmnist": (9, 89996, 10004, 7180), "chestmnist": (14, 78468, 11219, 22433),
    "dermamnist": (7, 7007, 1003, 2005), "octmnist": (4, 97477, 10832, 1000),
    "pneumoniamnist": (2, 4708, 524, 624), "retinamnist": (5, 1080, 120, 400),
    "breastmnist": (2, 546, 78, 156), "bloodmnist": (8, 11959, 1712, 3421),
    "tissuemnist": (8, 165466, 23640, 47280), "organamnist": (11, 34561, 6491, 17778),
    "organcmnist": (11, 12975, 2392, 8216), "organsmnist": (11, 13932, 2452, 8827),
}  # fmt: skip


def test_a_set_is_known_by_its_files_name_and_described_as_its_owners_do():
    assert {name: (len(set(s.classes)), *s.counts) for name, s in SETS.items()} == FACTS
    for ending in (".npz", "_64.npz", "_rebuilt.npz"):
        assert which(Path("mnist") / f"organsmnist{ending}") is SETS["organsmnist"]
    assert SETS["octmnist"].classes[3] == "normal" and SETS["organsmnist"].classes[10] == "spleen"
    assert (SETS["chestmnist"].task, SETS["chestmnist"].modality) == ("multi-label", "X-ray")


def test_another_name_is_refused_with_the_twelve():
    for name in ("mnist.npz", "octmnist3d.npz", "xpathmnist.npz", "a"):
        with pytest.raises(UserError, match=f"^pathmnist/{name}: .*{'.*'.join(FACTS)}"):
            which(Path("pathmnist") / name)


def npy(array, version=(1, 0)):
    """The bytes of an array in NumPy's format."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version, allow_pickle=True)
    return file.getvalue()


def claiming(shape, n):
    """A .npy that claims a shape and has n bytes."""
    text = str({"descr": "|u1", "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(n)


def write(file, members, method=zipfile.ZIP_DEFLATED, twice="", **claims):
    """A zip of named bytes. `claims` are what the zip's directory then claims about the images."""
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in [*members, twice] if twice else members:
            archive.writestr(name, members[name])
        for field, value in claims.items():
            setattr(archive.getinfo(IMAGES), field, value)
    read_split.cache_clear()
    return file


GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(256, size=(6, 28, 28), dtype=np.uint8)
ZEROS = npy(np.zeros((6, 1), np.uint8))
GOOD = {IMAGES: npy(PIXELS), LABELS: ZEROS}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "octmnist.npz"


def refused(file, *parts, split="test"):
    """Reading ends in one short line that begins with the file and has all the parts."""
    with pytest.raises(UserError, match=rf"^{file}: [^\n]{{,250}}$") as error:
        read_split(file, split)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no PneumoniaMNIST in {REAL}")
def test_the_real_file_has_the_published_counts():
    for split, n in zip(SPLITS, SETS["pneumoniamnist"].counts, strict=True):
        images, labels = read_split(REAL / "pneumoniamnist_rebuilt.npz", split)
        assert images.shape == (n, 28, 28) and labels.shape == (n,)
    assert np.bincount(labels).tolist() == [234, 390]


@pytest.mark.parametrize(
    ("name", "highest", "columns", "dtype", "shape"),
    [("bloodmnist", 7, 1, "u1", (1, 1, 3)), ("chestmnist", 1, 14, "|i1", (28, 28)),
     ("octmnist", 3, 1, ">i4", (1024, 1024)), ("breastmnist", 1, 1, "<u8", (64, 64, 3))],
)  # fmt: skip
def test_a_split_is_read_as_it_was_written_once_and_cannot_be_changed(
    tmp_path, name, highest, columns, dtype, shape
):
    file, made = tmp_path / f"{name}.npz", {}
    for split in SPLITS:
        made[f"{split}_images"] = GENERATOR.integers(256, size=(3, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = GENERATOR.integers(highest + 1, size=(3, columns)).astype(dtype)
        made[f"{split}_labels"][0] = highest
    (np.savez_compressed if columns > 1 else np.savez)(file, **made)
    for split in SPLITS:
        images, labels = read_split(file, split)
        wanted = made[f"{split}_labels"]
        assert np.array_equal(images, made[f"{split}_images"]) and images.dtype == np.uint8
        assert np.array_equal(labels, wanted if columns > 1 else wanted[:, 0])
        assert labels.dtype == np.int64 and read_split(file, split)[0] is images
        for array in (images, labels):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_arrays_may_be_in_fortran_order_and_other_splits_need_not_be_there(file):
    write(file, GOOD | {IMAGES: npy(np.asfortranarray(PIXELS), (2, 0))})
    assert np.array_equal(read_split(file, "test")[0], PIXELS)
    refused(file, "train_images.npy", "is missing", split="train")
    refused(file, "'Test'", "train, val, test", split="Test")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda file: file.write_bytes(b""), "not a zip"),
        (lambda file: None, "no such file"),
        (Path.mkdir, "is a directory"),
        (os.mkfifo, "no such file"),  # which is not waited for
        (lambda file: write(file, GOOD, twice=LABELS), f"{LABELS}: is in the file twice"),
        (lambda file: write(file, GOOD, flag_bits=1), f"{IMAGES}: is encrypted"),
        (lambda file: write(file, GOOD, zipfile.ZIP_LZMA), "packed otherwise"),
        (lambda file: write(file, GOOD, CRC=1), f"{IMAGES}: Bad CRC"),
        (lambda file: write(file, GOOD, file_size=20_000_000_001), "claims 20000000001 bytes"),
        (lambda file: write(file, GOOD, file_size=20_000_000_000), "no image compresses so well"),
    ],
)
def test_what_is_no_sound_zip_of_arrays_is_refused(file, make, reason):
    make(file)
    refused(file, reason)


def is_not_uint8(dtype, *shape):
    return IMAGES, np.zeros(shape, dtype), f"is {np.dtype(dtype)} {shape}, must be uint8"


@pytest.mark.parametrize(
    ("member", "content", "reason"),
    [
        *(is_not_uint8("u1", *shape) for shape in (
            (), (6, 28), (6, 28, 29), (6, 28, 28, 1), (6, 3, 28, 28), (6, 28, 28, 28, 3),
            (0, 28, 28), (6, 0, 0), (6, 1025, 1025))),
        is_not_uint8("i1", 6, 28, 28),
        (LABELS, np.zeros((6, 1)), "is float64"),
        (LABELS, np.zeros((6, 1), bool), "is bool"),
        (LABELS, np.zeros(6, int), "must be integers (6, 1) for 6 images"),
        (LABELS, np.zeros((5, 1), int), "must be integers (6, 1)"),
        (LABELS, np.array([[0], [1], [3], [4], [0], [0]]), "row 3 (from 0) is 4, must be 0 to 3"),
        (LABELS, np.array([[0]] * 5 + [[-1]]), "row 5 (from 0) is -1, must be 0 to 3"),
        *((member, content, "its npy header") for member in (IMAGES, LABELS) for content in (
            b"", b"PK\x03\x04" + bytes(200), np.array([{"a": 1}], dtype=object),
            claiming((6, 28, 28), 4703), claiming((6, 28, 28), 4705))),
    ],
)  # fmt: skip
def test_arrays_that_are_pickles_or_malformed_or_do_not_fit_are_refused(
    file, member, content, reason
):
    content = content if isinstance(content, bytes) else npy(content)
    refused(write(file, GOOD | {member: content}), member, reason)
    file = file.with_name("chestmnist.npz")  # of 14 labels, 0 or 1 each
    refused(write(file, GOOD), LABELS, "must be integers (6, 14)")
    write(file, GOOD | {LABELS: npy(2 * np.eye(6, 14, -2, int))})
    refused(file, LABELS, "row 2 (from 0) is 2, must be 0 to 1")


def zeros(n):
    """n images of a million zeros, with labels to fit; zeros compress 1000 to one."""
    return {IMAGES: npy(np.zeros((n, 1000, 1000), "u1")), LABELS: npy(np.zeros((n, 1), "u1"))}


def test_what_compresses_too_well_is_refused_unless_it_is_small(file):
    members = zeros(12)
    refused(write(file, members), IMAGES, "no image compresses so well")
    refused(write(file, members, compress_size=1_000_000), IMAGES, "no image compresses so well")
    noise = GENERATOR.bytes(100_000)
    members[IMAGES] = members[IMAGES][: -len(noise)] + noise  # 120 to one
    assert read_split(write(file, members), "test")[0].shape == (12, 1000, 1000)
    assert read_split(write(file, zeros(9)), "test")[0].shape == (9, 1000, 1000)


def test_too_little_memory_is_reported(file, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(medmnist.np.lib.format, "read_array", fail)
    refused(write(file, GOOD), f"{IMAGES}: MemoryError")


def naive(truth, scores, task):
    """AUC by counting pairs, accuracy by counting answers."""
    labels = truth if task == "multi-label" else np.eye(scores.shape[1])[truth]
    columns = [
        (with_label == 1, column) for with_label, column in zip(labels.T, scores.T, strict=True)
    ]
    areas, right = [], []
    for with_label, column in columns[task == "binary-class" :]:
        pairs = [(a, b) for a in column[with_label] for b in column[~with_label]]
        areas.append(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
        right.append(np.mean((column > 0.5) == with_label))
    if task in ("multi-class", "ordinal"):  # the first of equal scores is the answer
        right = [list(s).index(max(s)) == t for s, t in zip(scores, truth, strict=True)]
    return np.mean(areas), np.mean(right)


@pytest.mark.parametrize("task", ["multi-class", "ordinal", "binary-class", "multi-label"])
def test_auc_counts_pairs_and_accuracy_what_is_right(task):
    for _ in range(4):
        n_classes = 2 if task == "binary-class" else 4
        truth = GENERATOR.permutation(np.arange(40) % n_classes)
        truth = GENERATOR.integers(2, size=(40, 4)) if task == "multi-label" else truth
        scores = GENERATOR.integers(0, 9, (40, n_classes)) / 8  # with many ties
        found = auc(truth, scores, task), accuracy(truth, scores, task)
        assert found == pytest.approx(naive(truth, scores, task), abs=1e-12)


def test_auc_of_more_pairs_than_32_bits_count_is_exact():
    truth = np.arange(200_000) % 2
    assert auc(truth, np.stack([truth, truth], 1), "binary-class") == 1.0


@pytest.mark.parametrize(
    ("task", "truth"),
    [("multi-class", [0, 1, 1]), ("ordinal", [2, 1, 1]), ("binary-class", [0, 0, 0]),
     ("binary-class", [1, 1, 1]), ("multi-label", [[0, 1, 1], [0, 0, 0], [0, 0, 1]])],
)  # fmt: skip
def test_auc_is_undefined_where_a_class_is_missing_or_all_are_alike(task, truth):
    scores = GENERATOR.random((3, 2 if task == "binary-class" else 3))
    assert auc(np.array(truth), scores, task) is None
    scores[1, 1] = np.nan
    for score in (auc, accuracy):
        with pytest.raises(ValueError, match=f"{task}: a score is not finite"):
            score(np.array(truth), scores, task)
