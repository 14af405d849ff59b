"""What training has seen is found again, and nothing else is."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from data import Packed, Sample
from scoring.leaks import MAX_DISTANCE, alike, check, fingerprint, merge, seen_by, show
from tests.sources.written import npz


def photo(seed, size=(180, 150)):
    """Soft blobs, different for each seed."""
    noise = np.random.default_rng(seed).integers(20, 220, (9, 9), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def saved(image, file, **options):
    file.parent.mkdir(exist_ok=True)
    image.save(file, **options)
    return file


@pytest.fixture
def files(tmp_path):
    return [saved(photo(n), tmp_path / "all" / f"{n}.png") for n in range(8)]


def qa(image, question="What is shown?", answer="Lung", id="1"):
    return Sample(id, "source", "test", image, ((question, answer),))


def found(image, trained):
    """How many of one image are seen and alike after training on another."""
    report = check([qa(image)], seen_by([qa(trained)]))
    assert report["images"] == 1
    return report["images_seen"], report["images_alike"]


def test_the_same_bytes_are_seen_a_changed_copy_is_alike_and_another_image_neither(tmp_path, files):
    image = photo(0)
    saved(image, tmp_path / "0.jpg", quality=50)
    brighter = ImageEnhance.Brightness(image).enhance(1.1)
    changed = image.resize((90, 75)), image.resize((300, 200)), image.convert("L"), brighter
    copies = [saved(copy, tmp_path / f"{i}.png") for i, copy in enumerate(changed)]
    assert [found(file, files[0]) for file in (tmp_path / "0.jpg", *copies)] == [(0, 1)] * 5
    assert found(Path(shutil.copy(files[0], tmp_path / "renamed.png")), files[0]) == (1, 1)
    for n, other in enumerate((ImageOps.mirror(photo(0)), ImageOps.flip(photo(0)), photo(1))):
        assert found(saved(other, tmp_path / f"other {n}.png"), files[0]) == (0, 0)


def test_a_question_counts_as_seen_only_with_its_answer_and_its_image(tmp_path, files):
    a, b = files[:2]
    like_a = saved(photo(0), tmp_path / "a.jpg", quality=50)
    questions = (a, "Where?", "left lung"), (b, "Which side?", "right"), (None, "Why?", "Cough")
    trained = seen_by([qa(*question) for question in questions])

    def counts(*sample):
        report = check([qa(*sample)], trained)
        return report["pairs_seen"], report["questions_seen"]

    assert counts(a, "Where?", "left lung") == counts(like_a, "WHERE...", "Left lung.") == (1, 1)
    assert counts(b, "Where?", "left lung") == (1, 0)  # both known, never together
    assert counts(a, "Where?", "right") == counts(a, "Where left?", "lung") == (0, 0)
    assert counts(None, "Where?", "left lung") == counts(a, "Why?", "Cough") == (1, 0)
    assert counts(None, "Why?", "Cough") == (1, 1)  # text only


def test_phantoms_are_their_seeds_and_rows_of_an_npz_their_pixels(tmp_path):
    npz(tmp_path, "octmnist", [0, 1])
    train, test = (Packed(tmp_path / "octmnist.npz", split, 1) for split in ("train", "test"))
    report = check([qa(7), qa(9), qa(test)], seen_by([qa(7), qa(8), qa(7), qa(train)]))
    assert (report["images"], report["images_seen"], report["images_alike"]) == (3, 2, 2)
    assert report["named"] == ["phantom 7", "octmnist.npz test 1"]


def test_what_was_seen_is_stored_without_doubles_in_one_order_and_merged_as_a_union(files):
    first = [qa(files[n], q) for n in (0, 1, 2) for q in ("a1", "b2")] + [qa(None)]
    second = [qa(files[n], q) for n in (3, 1) for q in ("c3", "b2")] + [qa(None)]
    one, two, both = seen_by(first), seen_by(second), seen_by(second[::-1] + first, workers=1)
    for seen in (merge(one, two), merge(two, one), merge(merge(one, two), one, seen_by([]))):
        assert torch.equal(seen, both)
    assert both.shape == (10, 6) and len(both[:, 0].unique()) == 5  # one of them for text only


def test_the_fingerprint_tells_versions_of_a_split_apart(tmp_path, files):
    samples = [qa(files[0], id="1"), qa(files[1], id="2"), qa(None, id="3")]
    first = fingerprint(samples)
    assert len(first) == 16 and fingerprint(samples[::-1]) == first
    moved = Path(shutil.copy(files[0], tmp_path / "moved.png"))
    assert fingerprint([replace(samples[0], image=moved), *samples[1:]]) == first
    other = saved(photo(0), tmp_path / "other.png", compress_level=1)  # the same pixels
    changes = [{"turns": (("What is shown?", "Liver"),)}, {"turns": (("Which is it?", "Lung"),)},
               {"image": other}, {"id": "4"}, {"source": "other"}, {"split": "val"}]  # fmt: skip
    others = {fingerprint([replace(samples[0], **change), *samples[1:]]) for change in changes}
    assert len(others - {first}) == len(changes)


def test_the_search_equals_counting_bits_across_chunks(monkeypatch):
    monkeypatch.setattr("scoring.leaks.CHUNK", 8)
    rng = np.random.default_rng(0)
    trained = rng.integers(-(2**63), 2**63 - 1, (30, 4))
    others = trained[rng.permutation(30)[:20]].copy()
    for row, flips in enumerate(range(MAX_DISTANCE - 9, MAX_DISTANCE + 11)):
        bits = np.unpackbits(others[row].view(np.uint8))
        bits[rng.permutation(256)[:flips]] ^= 1
        others[row] = np.packbits(bits).view(np.int64)
    others[4], trained[9], trained[10] = 0, 0, (1, 0, 0, 0)  # 0: without a dHash, near nothing
    bits = [np.unpackbits(rows.view(np.uint8), axis=1) for rows in (others, trained)]
    slow = {(i, j) for i, a in enumerate(bits[0]) for j, b in enumerate(bits[1])
            if a.any() and b.any() and (a != b).sum() <= MAX_DISTANCE}  # fmt: skip
    assert set(alike(others, trained)) == slow and 5 < len(slow) < 11


def test_a_leak_is_said_loudly_and_nothing_shared_plainly(tmp_path, files):
    assert show(check([qa(files[0])], seen_by([qa(files[1], "Why?")]))).startswith("no image")
    like = saved(photo(0), tmp_path / "like.jpg", quality=60)
    tested = [qa(file, "What\nis\x1b shown?", "lung") for file in (like, *files[1:])]
    message = show(check(tested, seen_by([qa(file) for file in files[:6]])))
    assert message.startswith("LEAK: 5 of 8 images were in training, 1 of 8 look like")
    assert "seen questions: " in message and "2 of 8 questions were in training with" in message
    elsewhere = show(check([qa(files[0])], seen_by([qa(files[2])])))
    assert "1 of 1 questions were in training with the same answers, about other" in elsewhere
    assert "seen questions: " not in elsewhere
    assert "all/1.png" in message and message.replace("\n", "").isprintable()
