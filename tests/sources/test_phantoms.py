"""Phantoms match their ground truth, and their questions cannot be guessed without the image."""

import zlib
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import MODALITIES
from sources import painting, phantoms
from sources.phantoms import (
    CLOSED,
    CONVENTIONS,
    COUNTS,
    FINDINGS,
    OPEN,
    ORGANS,
    caption,
    draw,
    plan,
)

# golden/phantoms.png: these seeds at 48 pixels, side by side, each with findings and normal spots.
GOLDEN = Path(__file__).parents[1] / "golden" / "phantoms.png"
SEEDS = {"head": 27, "abdomen": 48, "brain": 98, "knee": 24, "chest": 16, "hand": 28, "colon": 22,
         "breast": 7}  # fmt: skip
TRUTHS = [phantoms.Phantom(None, seed, **plan(seed)[1]) for seed in range(2000)]
ABNORMAL = [p for p in TRUTHS[:110] if p.count]  # about 80


@cache
def change(seed, which="findings"):
    """(112, 112) how much brighter the findings, or the normal spots, make each pixel."""
    rng, truth, findings, normal = plan(seed)
    others = ([], normal) if which == "findings" else (findings, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantoms, "plan", lambda seed: (rng, truth, *others))
        without = draw(seed).image.astype(int)
    return (draw(seed).image - without).mean(2)


def test_a_seed_always_gives_this_caption_and_these_questions():
    assert draw(1).image.tobytes() == draw(1).image.tobytes() != draw(2).image.tobytes()
    p, normal = TRUTHS[1], TRUTHS[4]
    assert caption(p) == "an MRI of the knee with two large bone bruises in the lower right"
    assert caption(normal) == "an X-ray of the hand with no abnormality"
    assert [tuple(q) for q in phantoms.questions(p)[3:5]] == [
        ("What is wrong here, if anything?", "bone bruise", "open", "finding"),
        ("Is the bone bruise small?", "no", "closed", "size"),
    ]
    kinds = ["modality", "organ", "finding", "count", "presence", "modality", "organ"]
    assert [q.kind for q in phantoms.questions(normal)] == kinds
    every = str([(caption(p), phantoms.questions(p)) for p in TRUTHS])
    assert zlib.crc32(every.encode()) == 3529288676  # as in every version so far


def test_splits_are_a_billion_seeds_each_and_worlds_ten():
    assert phantoms.seeds("train", 3) == range(3)
    assert phantoms.seeds("val", 3, 5) == range(10**9 + 5, 10**9 + 8)
    assert phantoms.seeds("test", 3, domains=8) == range(82 * 10**9, 82 * 10**9 + 3)
    assert len(phantoms.seeds("train", 9, 10**9 - 2)) == 2  # the next are of the next split


def test_findings_lie_in_the_quadrant_that_is_named_off_the_mid_lines():
    seen = set()
    for p in ABNORMAL:
        rows, columns = np.nonzero(np.abs(change(p.seed)) > 2)
        assert all(at.max() < 55 or at.min() > 56 for at in (rows, columns))
        # A radiologist faces the patient: what is on the image's left is the patient's right.
        is_left = (columns.max() < 55) == (p.modality == "pathology")
        assert p.side == ("left" if is_left else "right")
        assert p.height == ("upper" if rows.max() < 55 else "lower")
        seen.add((p.modality, p.side))
    assert len(seen) == 8


def test_as_many_findings_stand_out_as_are_counted_and_normal_spots_the_other_way():
    normal = Counter()
    for p in ABNORMAL:
        sign, findings = (1 if p.modality in ("X-ray", "MRI") else -1), plan(p.seed)[2]
        assert len(findings) == p.count
        for x, y, _, _ in findings:
            rows, columns = (slice(int(at + 56) - 1, int(at + 56) + 2) for at in (y, x))
            assert sign * change(p.seed)[rows, columns].mean() > 25  # of 255
        normal[p.modality] -= sign * change(p.seed, "normal").sum()
    assert len(normal) == 4 and min(normal.values()) > 5000 and len(ABNORMAL) > 70


def test_spots_lie_in_the_image_clear_of_each_other_and_normal_ones_in_another_quadrant():
    groups, sums = 0, []
    for p in TRUTHS:
        _, _, findings, normal = plan(p.seed)
        spots = findings + normal
        assert len(spots) == p.count + len(normal)
        for i, (x, y, *radii) in enumerate(spots):
            assert max(abs(x), abs(y)) + max(radii) <= 56
            assert min(abs(x), abs(y)) - max(radii) > 2
            for u, v, *others in spots[:i]:
                assert np.hypot(x - u, y - v) > max(radii) + max(others) + 1
        corners = [{(x > 0, y > 0) for x, y, _, _ in group} for group in (findings, normal)]
        assert max(map(len, corners)) <= 1 and not corners[0] & corners[1]
        groups += all(corners)
        sums.append([(len(g), sum(rx for _, _, rx, _ in g)) for g in (findings, normal)])
    assert groups > 1000
    np.testing.assert_allclose(*np.mean(sums, axis=0), rtol=0.06)  # as many and as large


def test_answers_follow_from_the_truth_and_are_balanced():
    answers = defaultdict(Counter)
    for p in TRUTHS:
        assert p.organ in ORGANS[p.modality]
        assert p.finding == (FINDINGS[p.organ] if p.count else "none")
        for q in phantoms.questions(p):
            answers[q.answer_type, q.kind][q.answer] += 1
            words = q.question if q.kind == "finding" else q.question.replace(FINDINGS[p.organ], "")
            truth = {"location": f"{p.height} {p.side}", "count": COUNTS[p.count]}
            value = truth.get(q.kind) or getattr(p, q.kind, None)
            is_true = value in words if value else (p.count == 0) == ("normal?" in words.split())
            assert q.answer == (value if q.answer_type == "open" else ("no", "yes")[is_true])
    assert len(answers) == 1 + len(CLOSED) + len(OPEN)
    for (answer_type, _), count in answers.items():
        share = max(count.values()) / count.total()
        assert share < (0.55 if answer_type == "closed" else 0.6)


@pytest.mark.parametrize("domains", [1, 2, 4, 8])
def test_a_world_has_as_many_conventions_as_it_has_domains(domains):
    world = phantoms.seeds("train", 200, domains=domains)
    found = {o: phantoms.convention(world[0], o) for o in phantoms.ORGAN_CLASSES}
    assert len(set(found.values())) == domains
    for i, organs in enumerate(ORGANS.values()):
        assert found[organs[0]] == CONVENTIONS[MODALITIES[i % domains]]
        assert (found[organs[1]] == found[organs[0]]) == (domains != 8)
    read = set()
    assert len(world) == 200
    for seed in world:
        _, truth, spots, _ = plan(seed)
        if truth["count"]:
            patient, _, limit = found[truth["organ"]]
            x, _, rx, ry = spots[0]
            low, high = (0.75, 0.85) if truth["size"] == "small" else (1.15, 1.25)
            assert low <= (rx * ry) ** 0.5 / limit <= high
            assert (truth["side"] == "left") == ((x > 0) == patient)
            read.add(patient)
    assert len(read) == (1 if domains < 4 else 2)


@pytest.mark.parametrize("organ", SEEDS)
def test_an_organ_is_painted_as_before_but_for_rounding(organ):
    place = 48 * list(SEEDS).index(organ)
    expected = np.asarray(Image.open(GOLDEN))[:, place : place + 48].astype(int)
    p = phantoms.draw(SEEDS[organ], 48)
    assert p.organ == organ and p.image.shape == expected.shape and p.image.dtype == np.uint8
    assert (np.abs(p.image - expected) > 1).sum() < 10  # of 6 912; float32 sums may differ
    assert caption(p) == caption(draw(SEEDS[organ]))  # at any size


def test_the_window_in_which_a_shape_is_painted_cuts_nothing_off():
    for paint in (
        lambda c: c.ellipse(-30, 41, 9, 14, 0.7, turn=0.6, ring=3),
        lambda c: c.rod(-40, -30, 28, 45, 6, 0.8, bones=3),
    ):
        cut, whole = (painting.Canvas(np.random.default_rng(0), 224) for _ in range(2))
        whole.window = lambda *_: (slice(None), slice(None))
        for c in (cut, whole):
            c.frame(0.9 + 0.2j, 5 - 3j)
            paint(c)
        assert np.array_equal(cut.image, whole.image) and cut.image.any()
