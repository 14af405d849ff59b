"""What training has seen is found again, and nothing else is."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from config import UserError
from data import Packed, Sample
from scoring import leaks
from scoring.leaks import MAX_DISTANCE, alike, check, fingerprint, merge, seen_by, show

REAL = Path(__file__).parents[3] / "shared" / "data"


def photo(seed: int, size: tuple[int, int] = (180, 150)) -> Image.Image:
    """Soft blobs, different for each seed."""
    noise = np.random.default_rng(seed).integers(20, 220, (9, 9), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def saved(image: Image.Image, file: Path, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


def qa(image, question="What is shown?", answer="Lung", id="1", split="test") -> Sample:
    return Sample(id, "source", split, image, ((question, answer),))


def found(image, trained) -> tuple[int, int]:
    """How many of one image are seen and alike after training on another."""
    report = check([qa(image)], seen_by([qa(trained)]))
    assert report["images"] == 1
    return report["images_seen"], report["images_alike"]


def test_a_changed_copy_of_an_image_is_found_and_a_mirrored_or_another_is_not(tmp_path):
    original = saved(photo(0), tmp_path / "a.png")
    copy = Path(shutil.copy(original, tmp_path / "renamed.png"))
    assert found(copy, original) == (1, 1)
    changed = {
        "jpeg": saved(photo(0), tmp_path / "b.jpg", quality=50),
        "half": saved(photo(0).resize((90, 75)), tmp_path / "half.png"),
        "stretched": saved(photo(0).resize((300, 200)), tmp_path / "long.png"),
        "brighter": saved(ImageEnhance.Brightness(photo(0)).enhance(1.1), tmp_path / "c.png"),
        "grey": saved(photo(0).convert("L"), tmp_path / "grey.png"),
    }
    counts = {name: found(file, original) for name, file in changed.items()}
    assert counts == dict.fromkeys(changed, (0, 1))
    for n, other in enumerate((ImageOps.mirror(photo(0)), ImageOps.flip(photo(0)), photo(1))):
        assert found(saved(other, tmp_path / f"{n}.png"), original) == (0, 0)


def test_flat_images_are_like_none_but_found_by_their_bytes(tmp_path):
    files = [saved(Image.new("RGB", (64, 64), (g,) * 3), tmp_path / f"{g}.png") for g in (0, 90)]
    nearly = photo(0).point(lambda x: 100 + x // 100)  # three levels
    files.append(saved(nearly, tmp_path / "nearly.png"))
    assert seen_by([qa(file) for file in files])[:, 1:5].unique().tolist() == [0]
    assert found(files[0], files[1]) == found(files[2], files[1]) == (0, 0)
    assert found(files[0], files[0]) == (1, 1)
    for n, box in enumerate([(40, 10, 60, 30), (100, 100, 120, 120)]):  # a few bits each
        flat = Image.new("RGB", (170, 160))
        flat.paste("#1e1e1e", box)
        files.append(saved(flat, tmp_path / f"box{n}.png"))
    assert found(files[3], files[4]) == (0, 0)


def test_a_planted_question_is_found_whatever_its_capitals_and_punctuation(tmp_path):
    file = saved(photo(0), tmp_path / "xmlab7" / "source.jpg")
    trained = seen_by([qa(file, "is this... the LUNG", "yes.", split="train")])
    other = qa(saved(photo(1), tmp_path / "xmlab8" / "source.jpg"), "Where?", "Left", id="8")
    report = check([other, qa(file, "Is this the lung?", "Yes", id="7")], trained)
    assert report == {
        "fingerprint": report["fingerprint"],
        "images": 2,
        "images_seen": 1,
        "images_alike": 1,
        "questions": 2,
        "pairs_seen": 1,
        "questions_seen": 1,
        "first": [{"id": "7", "question": "Is this the lung?"}],
        "named": ["xmlab7/source.jpg"],
    }
    assert json.loads(json.dumps(report)) == report


def test_a_question_counts_as_seen_only_with_its_answer_and_its_image(tmp_path):
    a, b = (saved(photo(n), tmp_path / f"{n}.png") for n in (0, 1))
    like_a = saved(photo(0), tmp_path / "a.jpg", quality=50)
    trained = seen_by([qa(a, "Where?", "left lung"), qa(b, "Which side?", "right")])

    def counts(*sample):
        report = check([qa(*sample)], trained)
        return report["pairs_seen"], report["questions_seen"]

    same = counts(a, "Where?", "left lung"), counts(like_a, "Where?", "left lung")
    assert same == ((1, 1), (1, 1))
    assert counts(b, "Where?", "left lung") == (1, 0)  # both known, never together
    assert counts(None, "Where?", "left lung") == (1, 0)
    assert counts(a, "Where?", "right") == (0, 0)
    assert counts(a, "Where left?", "lung") == (0, 0)


def test_every_turn_and_caption_counts_for_itself(tmp_path):
    file = saved(photo(0), tmp_path / "a.png")
    trained = seen_by([Sample("1", "x", "train", file, (("", "A chest CT."), ("Why?", "Cough")))])
    assert trained.shape == (2, 6)
    twice = Sample("2", "x", "test", file, (("", "chest ct"), ("Why?", "Pain"), ("why", "cough")))
    report = check([twice], trained)
    assert (report["questions"], report["pairs_seen"], report["questions_seen"]) == (3, 2, 2)
    assert report["first"] == [{"id": "2", "question": ""}, {"id": "2", "question": "why"}]


def test_text_only_questions_are_compared_with_text_only_ones(tmp_path):
    trained = seen_by([qa(None), qa(saved(photo(0), tmp_path / "a.png"), "Where?", "left")])
    assert (trained[:, 0] == 0).sum() == 1 and len(trained) == 2
    report = check([qa(None), qa(None, "Where?", "left", id="2")], trained)
    assert (report["images"], report["pairs_seen"], report["questions_seen"]) == (0, 2, 1)
    assert report["first"][0]["id"] == "1"
    assert show(report).startswith("LEAK: 1 of 2 questions with their answers\n")


def test_exact_hashes_are_the_first_bytes_of_sha_256(tmp_path):
    file = saved(photo(0), tmp_path / "a.png")
    for image, data in ((file, file.read_bytes()), (7, b"phantom 7")):
        start = hashlib.sha256(data).digest()[:8]
        assert seen_by([qa(image)])[0, 0].numpy().tobytes() == start


def test_phantoms_are_their_seeds():
    trained = seen_by([qa(7), qa(8), qa(7)])
    assert len(trained) == 2 and not trained[:, 1:5].any()
    report = check([qa(7), qa(9), qa(10, "else")], trained)
    assert (report["images"], report["images_seen"], report["images_alike"]) == (3, 1, 1)
    assert (report["pairs_seen"], report["questions_seen"]) == (2, 1)
    assert report["named"] == ["phantom 7"]


def test_images_in_an_npz_are_found_by_their_content(tmp_path):
    small = [np.array(photo(n, (28, 28)).convert("L")) for n in (0, 1, 2)]
    arrays = {}
    for split, rows in (("train", [0, 1]), ("val", [1]), ("test", [2, 0])):
        arrays[f"{split}_images"] = np.stack([small[n] for n in rows])
        arrays[f"{split}_labels"] = np.zeros((len(rows), 1), np.uint8)
    file = tmp_path / "pneumoniamnist.npz"
    np.savez_compressed(file, **arrays)
    trained = seen_by([qa(Packed(file, "train", n)) for n in (0, 1)])
    report = check([qa(Packed(file, "test", n)) for n in (0, 1)], trained)
    assert (report["images"], report["images_seen"], report["images_alike"]) == (2, 1, 1)
    assert report["named"] == ["pneumoniamnist.npz test 1"]
    assert found(saved(Image.fromarray(small[1]), tmp_path / "a.png"), Packed(file, "val", 0))[1]


def test_merge_is_the_union(tmp_path):
    files = [saved(photo(n), tmp_path / f"{n}.png") for n in range(4)]
    first = [qa(files[n], q, "yes") for n in (0, 1, 2) for q in ("a1", "b2")] + [qa(None)]
    second = [qa(files[n], q, "yes") for n in (3, 1) for q in ("c3", "b2")] + [qa(None)]
    one, two, both = seen_by(first), seen_by(second), seen_by(first + second)
    for seen in (merge(one, two), merge(two, one), merge(merge(one, two), one)):
        assert torch.equal(seen, both)
    assert both.shape == (10, 6) and len(both[:, 0].unique()) == 5  # one of them for text only
    assert torch.equal(merge(one, seen_by([])), one)


def test_what_was_seen_is_stored_without_doubles_in_one_order(tmp_path):
    samples = [qa(saved(photo(n), tmp_path / f"{n}.png"), str(n)) for n in range(3)]
    samples.append(qa(Path(shutil.copy(samples[0].image, tmp_path / "copy.png")), "0"))
    seen, back = seen_by(samples), seen_by(samples[::-1] + samples, workers=1)
    assert torch.equal(seen, back) and seen.dtype == torch.int64
    assert len(seen) == check(samples, seen)["images"] == 3


def test_the_fingerprint_tells_versions_of_a_split_apart(tmp_path):
    files = [saved(photo(n), tmp_path / "one" / f"{n}.png") for n in (0, 1)]
    samples = [qa(files[0], id="1"), qa(files[1], id="2"), qa(None, id="3")]
    first = fingerprint(samples)
    assert len(first) == 16 and int(first, 16) >= 0
    assert fingerprint(samples[::-1]) == first
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = [s.image and tmp_path / "two" / s.image.name for s in samples]
    assert fingerprint([replace(s, image=m) for s, m in zip(samples, moved, strict=True)]) == first
    saved(photo(0), tmp_path / "three" / "0.png", compress_level=1)  # other bytes, same image
    changes = [
        {"turns": (("What is shown?", "Liver"),)}, {"turns": (("What is shown here?", "Lung"),)},
        {"image": tmp_path / "three" / "0.png"}, {"image": None}, {"id": "4"},
        {"source": "elsewhere"}, {"split": "val"},
    ]  # fmt: skip
    others = {fingerprint([replace(samples[0], **change), *samples[1:]]) for change in changes}
    assert len(others - {first}) == len(changes)
    assert fingerprint(samples[:2]) != first


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png"):
        seen_by([qa(tmp_path / "broken.png")])
    with pytest.raises(UserError, match=r"missing\.png: no such file"):
        check([qa(tmp_path / "missing.png")], seen_by([]))


def test_the_search_equals_counting_bits_across_chunks(monkeypatch):
    monkeypatch.setattr(leaks, "CHUNK", 8)
    rng = np.random.default_rng(0)
    trained = rng.integers(-(2**63), 2**63 - 1, (30, 4))
    others = trained[rng.permutation(30)[:20]].copy()
    for row, flips in enumerate(range(MAX_DISTANCE - 9, leaks.MAX_DISTANCE + 11)):
        bits = np.unpackbits(others[row].view(np.uint8))
        bits[rng.permutation(256)[:flips]] ^= 1
        others[row] = np.packbits(bits).view(np.int64)
    others[4], trained[9] = 0, 0  # without a dHash: neither near each other nor near few bits
    others[5], trained[10] = (1, 0, 0, 0), (2, 0, 0, 0)
    slow = {
        (i, j)
        for i, a in enumerate(others.tolist())
        for j, b in enumerate(trained.tolist())
        if any(a) and any(b)
        and sum(((x ^ y) % 2**64).bit_count() for x, y in zip(a, b, strict=True)) <= MAX_DISTANCE
    }  # fmt: skip
    assert set(alike(others, trained)) == slow and 5 < len(slow) < 11


def test_nothing_shared_is_said_plainly(tmp_path):
    samples = [qa(saved(photo(0), tmp_path / "a.png")), qa(None, "Where?")]
    clean = "no image and no question of this split was in training"
    for seen in (seen_by([]), seen_by([qa(saved(photo(1), tmp_path / "b.png"), "Why?")])):
        report = check(samples, seen)
        assert show(report) == clean
        assert not any(report[x] for x in ("images_alike", "pairs_seen", "questions_seen", "named"))
    elsewhere = check(samples[:1], seen_by([qa(tmp_path / "b.png")]))
    assert "LEAK" not in show(elsewhere) and clean not in show(elsewhere)
    assert "1 of 1 questions were, with their answers, about other images" in show(elsewhere)


def test_a_leak_is_said_loudly_and_in_few_lines(tmp_path):
    files = [saved(photo(n), tmp_path / "all" / f"{n}.png") for n in range(8)]
    trained = seen_by([qa(f) for f in files[:6]] + [qa(None, "Why?")])
    like = saved(photo(0), tmp_path / "all" / "like.jpg", quality=60)
    images = [like, *files[1:]]
    report = check([qa(f, "What\nis\x1b shown?", "lung", id=f.stem) for f in images], trained)
    assert len(report["first"]) == len(report["named"]) == 5
    assert report["named"][0] == "all/1.png"  # the same file before one that is alike
    message = show(report)
    assert message.startswith(
        "LEAK: 5 of 8 images were in training, 1 of 8 look like a training image, "
        "6 of 8 questions with their answers too: all/1.png, all/2.png,"
    )
    assert "2 of 8 questions were, with their answers, about other images" in message
    other = check([qa(files[1], "Why?")], trained)
    assert show(other).startswith("LEAK: 1 of 1 images were in training, 0 of 1 questions")
    assert len(message.splitlines()) == 3 and message.replace("\n", "").isprintable()


def test_slake_shares_neighbouring_slices_between_its_splits():
    if not (REAL / "slake").is_dir():
        pytest.skip("SLAKE is not in shared/data")
    images = {}
    for split in ("train", "test"):
        rows = json.loads((REAL / "slake" / f"{split}.json").read_text())
        names = sorted({row["img_name"] for row in rows if row["q_lang"] == "en"})
        images[split] = [REAL / "slake" / "imgs" / name for name in names]
    seen = seen_by([qa(file) for file in images["train"]])
    report = check([qa(file) for file in images["test"]], seen)
    assert [report[x] for x in ("images", "images_seen", "images_alike")] == [96, 0, 16]
