"""Phantoms match their ground truth."""

import zlib
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from sources.phantoms import ORGAN_CLASSES, Phantom, caption, draw, plan

# golden/phantoms.png: these seeds at 48 pixels, side by side, each with findings and normal spots.
GOLDEN = Path(__file__).parents[1] / "golden" / "phantoms.png"
SEEDS = (27, 48, 98, 24, 16, 28, 22, 7)
TRUTHS = [Phantom(None, seed, **plan(seed)[1]) for seed in range(2000)]
ABNORMAL = [p for p in TRUTHS[:110] if p.count]  # about 80


def drawn(seed, findings, normal):
    rng, truth, _, _ = plan(seed)
    with patch("sources.phantoms.plan", return_value=(rng, truth, findings, normal)):
        return draw(seed).image.astype(int).mean(2)


def test_as_many_findings_as_are_counted_stand_out_in_the_quadrant_that_is_named():
    seen, normal = set(), Counter()
    assert len(ABNORMAL) > 70
    for p in ABNORMAL:
        _, _, findings, others = plan(p.seed)
        image = drawn(p.seed, findings, others)
        change = image - drawn(p.seed, [], others)
        rows, columns = np.nonzero(np.abs(change) > 2)
        assert all(at.max() < 55 or at.min() > 56 for at in (rows, columns))  # off the mid-lines
        # A radiologist faces the patient: what is on the image's left is the patient's right.
        is_left = (columns.max() < 55) == (p.modality == "pathology")
        assert p.side == ("left" if is_left else "right")
        assert p.height == ("upper" if rows.max() < 55 else "lower")
        seen.add((p.modality, p.side))
        sign = 1 if p.modality in ("X-ray", "MRI") else -1
        assert len(findings) == p.count
        for x, y, _, _ in findings:
            rows, columns = (slice(int(at + 56) - 1, int(at + 56) + 2) for at in (y, x))
            assert sign * change[rows, columns].mean() > 25  # of 255
        normal[p.modality] -= sign * (image - drawn(p.seed, findings, [])).sum()  # the other way
    assert len(seen) == 8 and len(normal) == 4 and min(normal.values()) > 5000


def test_a_seed_gives_this_caption_and_every_organ_is_painted_as_before_but_for_rounding():
    assert draw(1).image.tobytes() == draw(1).image.tobytes() != draw(2).image.tobytes()
    assert caption(TRUTHS[1]) == "an MRI of the knee with two large bone bruises in the lower right"
    every = str([caption(p) for p in TRUTHS])
    assert zlib.crc32(every.encode()) == 3711417749  # as in every version so far
    painted = [draw(seed, 48) for seed in SEEDS]
    assert tuple(p.organ for p in painted) == ORGAN_CLASSES
    found = np.concatenate([p.image for p in painted], axis=1)
    differs = np.abs(found - np.asarray(Image.open(GOLDEN)).astype(int)) > 1
    assert found.dtype == np.uint8  # of an organ's 6 912 values few differ: float32 sums may
    assert differs.reshape(48, 8, -1).sum(axis=(0, 2)).max() < 10
