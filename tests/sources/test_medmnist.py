"""MedMNIST's files, as published and broken in each way, and its two scores.

python -m pytest tests/sources/test_medmnist.py
"""

import io
import itertools
import os
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from config import MODALITIES, UserError
from sources import medmnist
from sources.medmnist import SETS, accuracy, auc, read_split, which

REAL = Path(__file__).parents[3] / "shared" / "data" / "pneumoniamnist"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no PneumoniaMNIST in {REAL}")
FACTS = {  # medmnist/info.py @805b742: classes, train, val, test
    "pathmnist": (9, 89996, 10004, 7180),
    "chestmnist": (14, 78468, 11219, 22433),
    "dermamnist": (7, 7007, 1003, 2005),
    "octmnist": (4, 97477, 10832, 1000),
    "pneumoniamnist": (2, 4708, 524, 624),
    "retinamnist": (5, 1080, 120, 400),
    "breastmnist": (2, 546, 78, 156),
    "bloodmnist": (8, 11959, 1712, 3421),
    "tissuemnist": (8, 165466, 23640, 47280),
    "organamnist": (11, 34561, 6491, 17778),
    "organcmnist": (11, 12975, 2392, 8216),
    "organsmnist": (11, 13932, 2452, 8827),
}
IMAGES, LABELS = "test_images.npy", "test_labels.npy"


def arrays(name, n=6, size=28, rgb=False, seed=0):
    """{split}_images and _labels of one set as its owners store them, few and random."""
    draw, known, made = np.random.default_rng(seed), SETS[name], {}
    for split in ("train", "val", "test"):
        shape = (n, size, size, 3) if rgb else (n, size, size)
        made[f"{split}_images"] = draw.integers(0, 256, shape, dtype=np.uint8)
        n_classes = len(known.classes)
        n_values, columns = (2, n_classes) if known.task == "multi-label" else (n_classes, 1)
        made[f"{split}_labels"] = draw.integers(0, n_values, (n, columns), dtype=np.uint8)
    return made


def npy(array):
    """The bytes of an array in NumPy's format."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def written(header, data=b"", version=(1, 0)):
    """A .npy with any text for its header."""
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header.encode("latin1") + data


def claiming(shape, dtype="|u1", data=b""):
    """A .npy whose header claims a shape and a dtype, whatever the data."""
    return written(str({"descr": dtype, "fortran_order": False, "shape": shape}), data)


def write(file, members, method=zipfile.ZIP_DEFLATED, **claims):
    """A zip of named bytes. `claims` are what the zip's directory then claims about the images."""
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for field, value in claims.items():
            setattr(archive.getinfo(IMAGES), field, value)
    return file


@pytest.fixture
def pneumonia(tmp_path):
    """Where a test writes its broken PneumoniaMNIST, and the members of a good one."""
    good = {f"{name}.npy": npy(array) for name, array in arrays("pneumoniamnist").items()}
    return tmp_path / "pneumoniamnist.npz", good


def refused(file, *parts, split="test"):
    """Reading ends in one line that begins with the file and has all the parts."""
    with pytest.raises(UserError) as error:
        read_split(file, split)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and message.count(file.name) == 1
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(file)) + 260
    for part in parts:
        assert part in message
    return message


# The table


def test_the_table_has_the_published_sizes_and_distinct_classes():
    assert {s.name: (len(s.classes), *s.counts) for s in SETS.values()} == FACTS
    assert list(SETS) == [s.name for s in SETS.values()]
    for known in SETS.values():
        assert len(set(known.classes)) == len(known.classes)
        assert all(c == c.lower().strip() and c for c in known.classes)


def test_the_table_has_the_published_tasks_and_this_projects_modalities():
    tasks = {name: s.task for name, s in SETS.items() if s.task != "multi-class"}
    assert tasks == {
        "chestmnist": "multi-label",
        "pneumoniamnist": "binary-class",
        "retinamnist": "ordinal",
        "breastmnist": "binary-class",
    }
    modalities = {name: s.modality for name, s in SETS.items() if s.modality is not None}
    assert modalities == {
        "pathmnist": "pathology",
        "chestmnist": "X-ray",
        "pneumoniamnist": "X-ray",
        "organamnist": "CT",
        "organcmnist": "CT",
        "organsmnist": "CT",
    }
    assert set(modalities.values()) <= set(MODALITIES)


def test_labels_mean_what_the_owners_say():
    assert SETS["pneumoniamnist"].classes == ("normal", "pneumonia")
    assert SETS["breastmnist"].classes == ("malignant", "normal or benign")
    assert SETS["octmnist"].classes[3] == "normal"
    assert SETS["retinamnist"].classes[4] == "grade 4"
    assert SETS["chestmnist"].classes[6:8] == ("pneumonia", "pneumothorax")
    assert SETS["dermamnist"].classes[4:6] == ("melanoma", "melanocytic nevi")
    assert SETS["bloodmnist"].classes[3] == "immature granulocytes"
    assert SETS["tissuemnist"].classes[6] == "proximal tubule segments"
    assert SETS["pathmnist"].classes[8] == "colorectal adenocarcinoma epithelium"
    for plane in "acs":
        assert SETS[f"organ{plane}mnist"].classes[1:3] == ("left femur", "right femur")
        assert SETS[f"organ{plane}mnist"].classes[10] == "spleen"


@pytest.mark.parametrize("name", FACTS)
def test_a_set_is_known_by_its_files_name(name):
    for ending in (".npz", "_64.npz", "_224.npz", "_rebuilt.npz"):
        assert which(Path("mnist") / f"{name}{ending}") is SETS[name]


@pytest.mark.parametrize(
    "name",
    ["mnist.npz", "medmnist.npz", "organmnist3d.npz", "octmnist3d.npz", "xpathmnist.npz", "a"],
)
def test_another_name_is_refused_with_the_twelve(name):
    with pytest.raises(UserError) as error:
        which(Path("pathmnist") / name)
    assert str(Path("pathmnist") / name) in str(error.value)
    assert all(known in str(error.value) for known in FACTS)


# Good files


@needs_real
def test_the_real_file_has_the_published_counts():
    file = REAL / "pneumoniamnist_rebuilt.npz"
    known = which(file)
    for split, n in zip(("train", "val", "test"), known.counts, strict=True):
        images, labels = read_split(file, split)
        assert images.shape == (n, 28, 28) and images.dtype == np.uint8
        assert labels.shape == (n,) and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [234, 390]


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("size,rgb", [(28, False), (28, True), (64, False), (64, True)])
def test_every_set_is_read_as_it_was_written(tmp_path, name, size, rgb):
    made = arrays(name, size=size, rgb=rgb)
    file = tmp_path / f"{name}_{size}.npz"
    (np.savez_compressed if rgb else np.savez)(file, **made)
    for split in ("train", "val", "test"):
        images, labels = read_split(file, split)
        assert np.array_equal(images, made[f"{split}_images"]) and images.dtype == np.uint8
        wanted = made[f"{split}_labels"]
        assert labels.dtype == np.int64
        assert np.array_equal(labels, wanted if name == "chestmnist" else wanted[:, 0])


@pytest.mark.parametrize("dtype", ["|i1", "<i8", ">i4", "<u8"])
def test_labels_may_be_any_integers(pneumonia, dtype):
    file, good = pneumonia
    values = np.array([[0], [1], [1], [0], [1], [0]]).astype(dtype)
    write(file, good | {LABELS: npy(values)})
    labels = read_split(file, "test")[1]
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 1, 0, 1, 0]


def test_a_file_in_fortran_order_or_format_2_holds_the_same(pneumonia):
    file, good = pneumonia
    images = arrays("pneumoniamnist")["test_images"]
    newer = io.BytesIO()
    np.lib.format.write_array(newer, np.asfortranarray(images), version=(2, 0))
    write(file, good | {IMAGES: newer.getvalue()})
    assert np.array_equal(read_split(file, "test")[0], images)


def test_a_split_is_read_once_and_cannot_be_written(pneumonia):
    file, good = pneumonia
    write(file, good)
    images, labels = read_split(file, "test")
    assert read_split(file, "test")[0] is images
    assert not np.array_equal(read_split(file, "val")[0], images)
    for array in (images, labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_only_the_split_that_is_asked_for_must_be_sound(pneumonia):
    file, good = pneumonia
    write(file, {name: content for name, content in good.items() if "train" not in name})
    read_split(file, "test")
    refused(file, "train_images.npy", "is missing", split="train")


# Not a file of arrays


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    refused(tmp_path / "pathmnist.npz", "no such file")
    (tmp_path / "octmnist.npz").mkdir()
    refused(tmp_path / "octmnist.npz", "is a directory")
    refused(tmp_path / f"octmnist{'x' * 300}.npz", ": File name too long")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "octmnist.npz")
    writer = os.open(tmp_path / "octmnist.npz", os.O_RDWR)  # so that waiting fails, not hangs
    refused(tmp_path / "octmnist.npz", "no such file")
    os.close(writer)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip" * 100, npy(np.zeros((5, 28, 28)))])
def test_a_file_that_is_no_zip_is_refused(tmp_path, content):
    file = tmp_path / "pathmnist.npz"
    file.write_bytes(content)
    refused(file, "not a zip")


def test_a_file_cut_short_anywhere_is_refused(pneumonia):
    file, good = pneumonia
    whole = write(file, good).read_bytes()
    for part in range(0, len(whole) - 1, 97):
        file.write_bytes(whole[:part])
        refused(file)


def test_a_changed_byte_of_the_data_is_refused(pneumonia):
    file, good = pneumonia
    content = bytearray(write(file, good, zipfile.ZIP_STORED).read_bytes())
    content[content.find(good[IMAGES]) + 1000] ^= 1
    file.write_bytes(content)
    refused(file, f": {IMAGES}: Bad CRC")


@pytest.mark.parametrize("split", ["", "Test", "validation", None])
def test_another_split_is_refused(pneumonia, split):
    write(*pneumonia)
    refused(pneumonia[0], repr(split), "train, val, test", split=split)


@pytest.mark.parametrize("member", [IMAGES, LABELS])
def test_a_missing_member_is_named(pneumonia, member):
    file, good = pneumonia
    del good[member]
    refused(write(file, good), member, "is missing")


@pytest.mark.parametrize("member", [IMAGES, LABELS])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_is_refused(pneumonia, member):
    file, good = pneumonia
    write(file, good)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(member, good[member])
    refused(file, member, "twice")


def test_an_encrypted_member_is_refused(pneumonia):
    refused(write(*pneumonia, flag_bits=1), IMAGES, "is encrypted, or packed otherwise")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packing_that_numpy_does_not_write_is_refused(pneumonia, method):
    refused(write(*pneumonia, method=method), IMAGES, "packed otherwise")


# Arrays of the wrong kind


@pytest.mark.parametrize("member", [IMAGES, LABELS])
@pytest.mark.parametrize(
    "array,dtype",
    [
        (np.array([{"a": 1}, None], dtype=object), "object"),
        (np.array(["no", "yes"]), "<U3"),
        (np.array([b"no", b"yes"]), "|S3"),
        (np.zeros(2, dtype=[("a", "u1"), ("b", "u1")]), "[('a', 'u1'), ('b', 'u1')]"),
        (np.zeros((6, 28, 28), dtype=bool), "bool"),
        (np.zeros((6, 1), dtype=complex), "complex128"),
        (np.zeros((6, 1), dtype="M8[s]"), "datetime64[s]"),
    ],
)
def test_pickles_and_what_is_no_number_are_refused(pneumonia, member, array, dtype):
    file, good = pneumonia
    if dtype == "object":  # a header's size is that of its pointers: once the claims agree
        for content in (claiming((2,), "|O", bytes(16)), npy(array)):
            refused(write(file, good | {member: content}), member, "Object arrays cannot be loaded")
            file.unlink()
    else:
        refused(write(file, good | {member: npy(array)}), member, dtype)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((6, 28, 28), np.int8),
        np.zeros((6, 28, 28), np.uint16),
        np.zeros((6, 28, 28), np.float32),
        np.zeros((), np.uint8),
        np.zeros(6, np.uint8),
        np.zeros((6, 28), np.uint8),
        np.zeros((6, 28, 29), np.uint8),
        np.zeros((6, 28, 29, 3), np.uint8),
        np.zeros((6, 28, 28, 1), np.uint8),
        np.zeros((6, 28, 28, 4), np.uint8),
        np.zeros((6, 3, 28, 28), np.uint8),
        np.zeros((6, 28, 28, 28, 3), np.uint8),
        np.zeros((0, 28, 28), np.uint8),
        np.zeros((6, 0, 0), np.uint8),
        np.zeros((6, 1025, 1025), np.uint8),
    ],
    ids=lambda images: f"{images.dtype}{images.shape}",
)
def test_images_of_another_type_or_shape_are_refused(pneumonia, images):
    file, good = pneumonia
    write(file, good | {IMAGES: npy(images)})
    refused(file, IMAGES, f"is {images.dtype} {images.shape}, must be uint8")


def test_the_sides_that_are_allowed(pneumonia):
    file, good = pneumonia
    for side in (1, 1024):
        write(file, good | {IMAGES: npy(np.zeros((6, side, side), np.uint8))})
        read_split.cache_clear()
        assert read_split(file, "test")[0].shape == (6, side, side)


@pytest.mark.parametrize(
    "labels,reason",
    [
        (np.zeros((6, 1)), "is float64"),
        (np.full((6, 1), np.nan, np.float32), "is float32"),
        (np.zeros((6, 1), bool), "is bool"),
        (np.zeros(6, np.uint8), "must be integers (6, 1)"),
        (np.zeros((6, 2), np.uint8), "must be integers (6, 1)"),
        (np.zeros((5, 1), np.uint8), "must be integers (6, 1) for 6 images"),
        (np.zeros((0, 1), np.uint8), "must be integers (6, 1)"),
        (np.array([[0], [1], [0], [2], [0], [0]]), "row 3 (from 0) is 2, must be 0 to 1"),
        (np.array([[0], [1], [0], [0], [0], [-1]]), "row 5 (from 0) is -1, must be 0 to 1"),
        (np.full((6, 1), 2**64 - 1, np.uint64), "row 0 (from 0) is 18446744073709551615"),
    ],
)
def test_labels_that_do_not_fit_are_refused(pneumonia, labels, reason):
    file, good = pneumonia
    refused(write(file, good | {LABELS: npy(labels)}), LABELS, reason)


@pytest.mark.parametrize(
    "labels,reason",
    [
        (np.zeros((6, 13), int), "must be integers (6, 14)"),
        (np.zeros((6, 1), int), "must be integers (6, 14)"),
        (np.eye(6, 14, 8, dtype=int) * 2, "row 0 (from 0) is 2, must be 0 to 1"),
        (-np.eye(6, 14, -2, dtype=int), "row 2 (from 0) is -1, must be 0 to 1"),
    ],
)
def test_labels_of_a_multi_label_set_are_zeros_and_ones(tmp_path, labels, reason):
    made = arrays("chestmnist") | {"test_labels": labels}
    np.savez(tmp_path / "chestmnist.npz", **made)
    refused(tmp_path / "chestmnist.npz", LABELS, reason)


@pytest.mark.parametrize("name", [name for name in FACTS if name != "chestmnist"])
def test_the_highest_label_is_read_and_the_next_refused(tmp_path, name):
    highest = len(SETS[name].classes) - 1
    for extra in (0, 1):
        file = tmp_path / f"{name}_{extra}.npz"
        labels = np.array([[0], [highest + extra]])
        np.savez(file, **arrays(name, n=2) | {"test_labels": labels})
        if extra:
            refused(file, f"row 1 (from 0) is {highest + 1}, must be 0 to {highest}")
        else:
            assert read_split(file, "test")[1].tolist() == [0, highest]


# Zip bombs and inconsistent headers


def zeros(n_bytes):
    """(N, 1000, 1000) zeros that fill about so many bytes, with labels to fit."""
    n = n_bytes // 1_000_000
    images, labels = np.zeros((n, 1000, 1000), np.uint8), np.zeros((n, 1), np.uint8)
    return {IMAGES: npy(images), LABELS: npy(labels)}


def test_what_compresses_too_well_is_refused_but_not_if_it_is_small(pneumonia):
    file, _ = pneumonia
    refused(write(file, zeros(11_000_000)), IMAGES, "no image compresses so well")
    write(file, zeros(9_000_000))
    assert read_split(file, "test")[0].shape == (9, 1000, 1000)


def test_a_large_file_that_compresses_as_images_do_is_read(pneumonia):
    file, members = pneumonia[0], zeros(12_000_000)
    noise = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    members[IMAGES] = members[IMAGES][: -len(noise)] + noise  # 60 to one
    assert read_split(write(file, members), "test")[0].shape == (12, 1000, 1000)


def test_a_bomb_may_not_lie_about_its_share_of_the_file(pneumonia):
    file = write(pneumonia[0], zeros(12_000_000), compress_size=1_000_000)
    refused(file, IMAGES, "no image compresses so well")


def test_a_claim_beyond_any_published_set_is_refused_unread(pneumonia):
    file, good = pneumonia
    shape = (30_000, 1000, 1000)
    content = claiming(shape)
    claim = len(content) + 30_000 * 1000 * 1000
    write(file, good | {IMAGES: content}, file_size=claim)
    refused(file, IMAGES, f"claims {claim} bytes, must be at most 20000000000")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("more", [-1, 1, 784])
def test_header_and_zip_must_agree_about_the_size(pneumonia, method, more):
    file, good = pneumonia
    content = claiming((6, 28, 28), data=bytes(6 * 784 + more))
    parts = ("EOF", "expected 4704 bytes") if more < 0 else ("header means", "claims")
    refused(write(file, good | {IMAGES: content}, method), IMAGES, "its npy header", *parts)


@pytest.mark.parametrize("is_crc_right", [False, True])
def test_what_inflates_beyond_its_claim_is_read_no_further(pneumonia, is_crc_right):
    file, good = pneumonia
    content = claiming((6, 28, 28), data=bytes(40_000_000))
    claim = len(content) - 40_000_000 + 6 * 784
    crc = zlib.crc32(content[:claim]) if is_crc_right else 1
    write(file, good | {IMAGES: content}, file_size=claim, CRC=crc)
    tracemalloc.start()
    try:
        if is_crc_right:
            assert read_split(file, "test")[0].shape == (6, 28, 28)
        else:
            refused(file, IMAGES, "CRC")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_long_header_is_refused_in_the_memory_that_is_allowed(pneumonia):
    """NumPy reads a header to its end, as bytes and as text, before it refuses its length."""
    file, good = pneumonia
    content = written(" " * 9_000_000, version=(2, 0))
    write(file, good | {IMAGES: content})
    tracemalloc.start()
    try:
        refused(file, IMAGES, "npy header", "Header info length (9000000) is large")
        assert tracemalloc.get_traced_memory()[1] < 2 * medmnist.FREE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("member", [IMAGES, LABELS])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x80\x04N.",  # a pickle
        b"PK\x03\x04" + bytes(200),
        written("", version=(3, 0)),
        written("", version=(9, 9)),
        written(""),
        written("{"),
        written("(" * 900),
        written("[" * 190 + "]" * 190),
        written("-" * 900 + "1"),
        written("\0" * 100),
        written("1\n  2\n 3"),
        written("'''"),
        written("__import__('os').getcwd()"),
        written("{'descr': '|u1', 'fortran_order': False}"),
        written("{'descr': '|u1', 'fortran_order': 0, 'shape': (6, 28, 28)}"),
        written("{'descr': '|u1', 'fortran_order': False, 'shape': [6, 28, 28]}"),
        written("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 28.0, 28)}"),
        written("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 28, 28), 1: 2}"),
        written("{'descr': 'nonsense', 'fortran_order': False, 'shape': (6, 28, 28)}"),
        written("{'descr': 5, 'fortran_order': False, 'shape': (6, 28, 28)}"),
        written("{'descr': [[]], 'fortran_order': False, 'shape': (6, 28, 28)}"),
        written("{'descr': ('|u1',), 'fortran_order': False, 'shape': (6, 28, 28)}"),
        written("{[]: 1}"),
        claiming((6, 28, -28)),
        claiming((-1, 28, 28), data=bytes(784)),
        claiming((10**200, 28, 28)),
        claiming((6, 28, 28), "V1"),
    ],
)
def test_a_malformed_header_is_refused(pneumonia, member, content):
    file, good = pneumonia
    refused(write(file, good | {member: content}), member, "its npy header")


def test_a_negative_shape_that_adds_up_is_refused(pneumonia):
    file, good = pneumonia
    content = claiming((-6, -28, 28), data=bytes(6 * 784))
    refused(write(file, good | {IMAGES: content}), IMAGES, "npy header")
    content = claiming((6, -28, -28), data=bytes(6 * 784))
    refused(write(file, good | {IMAGES: content}), IMAGES, "npy header")


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("\n"), MemoryError("Unable to allocate\n9 GiB")]
)
def test_too_little_memory_is_reported(pneumonia, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(medmnist.np.lib.format, "read_array", fail)
    reason = "Unable to allocate" if "Unable" in str(error) else "MemoryError"
    refused(write(*pneumonia), IMAGES, reason)


def test_any_damaged_byte_is_refused_or_does_no_harm(pneumonia):
    """Bytes at random anywhere: directory, headers, data. What is read has the right shape."""
    file, good = pneumonia
    whole, draw, n_refused = write(file, good).read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for place in draw.integers(len(whole), size=4):
            content[place] = draw.integers(256)
        content[-400 + draw.integers(400)] = draw.integers(256)  # the directory
        file.write_bytes(content)
        read_split.cache_clear()
        try:
            images, labels = read_split(file, "test")
            assert images.shape == (6, 28, 28) and labels.shape == (6,)
        except UserError:
            n_refused += 1
            refused(file)
    assert n_refused > 30


# Scores


def slow_area(positive, scores):
    """Of all pairs of one with and one without the label, those the right way round."""
    wins = pairs = 0
    for (is_a, a), (is_b, b) in itertools.product(zip(positive, scores, strict=True), repeat=2):
        if is_a and not is_b:
            pairs += 1
            wins += 1 if a > b else 0.5 if a == b else 0
    return wins / pairs


def example(task, seed, n=40, n_classes=4):
    """Truth and scores with many ties, every class there."""
    draw = np.random.default_rng(seed)
    if task == "multi-label":
        truth = draw.integers(0, 2, (n, n_classes))
        truth[0], truth[1] = 0, 1
        return truth, draw.integers(0, 9, (n, n_classes)) / 8
    n_classes = 2 if task == "binary-class" else n_classes
    truth = draw.permutation(np.arange(n) % n_classes)
    if task == "binary-class":
        one = draw.integers(0, 9, n) / 8
        return truth, np.stack([1 - one, one], 1)
    return truth, draw.integers(0, 6, (n, n_classes)) / 8


def columns(task, truth, scores):
    if task == "multi-label":
        return [(truth[:, i] == 1, scores[:, i]) for i in range(truth.shape[1])]
    if task == "binary-class":
        return [(truth == 1, scores[:, 1])]
    return [(truth == c, scores[:, c]) for c in range(scores.shape[1])]


TASKS = ["multi-class", "ordinal", "binary-class", "multi-label"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(task, seed):
    truth, scores = example(task, seed)
    areas = [slow_area(*column) for column in columns(task, truth, scores)]
    assert auc(truth, scores, task) == pytest.approx(sum(areas) / len(areas), abs=1e-12)
    assert auc(truth, scores.astype(np.float32), task) == auc(truth, scores, task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_accuracy_counts_what_is_right(task, seed):
    truth, scores = example(task, seed)
    right = []
    for row in range(len(truth)):
        if task == "multi-label":
            right += [(s > 0.5) == bool(t) for s, t in zip(scores[row], truth[row], strict=True)]
        elif task == "binary-class":
            right.append((scores[row, 1] > 0.5) == bool(truth[row]))
        else:
            right.append(list(scores[row]).index(max(scores[row])) == truth[row])
    assert accuracy(truth, scores, task) == pytest.approx(sum(right) / len(right), abs=1e-12)


def test_scores_that_are_known_by_heart():
    truth = np.array([0, 0, 1, 1])
    up = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
    assert (accuracy(truth, up, "binary-class"), auc(truth, up, "binary-class")) == (1.0, 1.0)
    assert auc(truth, up[::-1], "binary-class") == 0.0
    assert auc(truth, np.full((4, 2), 0.5), "binary-class") == 0.5
    assert accuracy(truth, np.full((4, 2), 0.5), "binary-class") == 0.5  # one half is not above it
    quarter = np.array([[0, 0.1], [0, 0.4], [0, 0.35], [0, 0.8]])
    assert auc(truth, quarter, "binary-class") == 0.75


def test_in_a_binary_task_only_the_second_column_counts():
    truth = np.array([0, 1, 1])
    scores = np.array([[0.0, 0.1], [0.9, 0.6], [0.9, 0.4]])
    assert accuracy(truth, scores, "binary-class") == pytest.approx(2 / 3)
    assert accuracy(truth, scores, "multi-class") == pytest.approx(0)
    assert auc(truth, scores, "binary-class") == 1.0


@pytest.mark.parametrize("task", ["multi-class", "ordinal"])
def test_auc_is_undefined_without_one_class(task):
    scores = np.random.default_rng(0).random((6, 3))
    assert auc(np.array([0, 1, 0, 1, 1, 0]), scores, task) is None
    assert auc(np.array([0, 1, 0, 1, 1, 2]), scores, task) is not None


@pytest.mark.parametrize("value", [0, 1])
def test_auc_is_undefined_where_all_are_alike(value):
    scores = np.random.default_rng(0).random((4, 2))
    assert auc(np.full(4, value), scores, "binary-class") is None
    labels = np.array([[0, value], [1, value], [0, value], [1, value]])
    assert auc(labels, scores, "multi-label") is None


def test_auc_of_many_is_exact():
    """More pairs than 32 bits count."""
    truth = np.arange(200_000) % 2
    scores = np.stack([truth, truth], 1)
    assert auc(truth, scores, "binary-class") == 1.0


@pytest.mark.parametrize("score", [accuracy, auc])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(score, value):
    with pytest.raises(ValueError, match="binary-class: a score is not finite"):
        score(np.array([0, 1]), np.array([[0.5, value], [0.5, 0.5]]), "binary-class")
