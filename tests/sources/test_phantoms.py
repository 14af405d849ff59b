"""The images match their ground truth, and their questions cannot be guessed.

pytest tests/sources/test_phantoms.py
"""

from collections import Counter, defaultdict
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from sources import phantoms


@lru_cache(maxsize=1)
def examples() -> list[phantoms.Phantom]:
    """Truth and questions do not depend on the size, so a small one does."""
    return [phantoms.draw(seed, size=64) for seed in phantoms.seeds("train", 2000)]


def abnormal(n: int) -> list[int]:
    found = [seed for seed in range(4 * n) if phantoms.plan(seed)[1]["count"]]
    assert len(found) >= n
    return found[:n]


def change(seed: int, size: int = 112) -> np.ndarray:
    """(S, S) how much brighter the findings make each pixel."""
    there = phantoms.draw(seed, size).image.astype(int)
    rng, truth, _, normal = phantoms.plan(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantoms, "plan", lambda seed: (rng, truth, [], normal))
        without = phantoms.draw(seed, size).image.astype(int)
    return (there - without).mean(2)


def blobs(mask: np.ndarray) -> list[int]:
    """Areas of the connected parts of a mask."""
    todo, areas = set(zip(*np.nonzero(mask), strict=True)), []
    while todo:
        edge, area = [todo.pop()], 0
        while edge:
            y, x = edge.pop()
            area += 1
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & todo
            todo -= near
            edge += near
        areas.append(area)
    return areas


def test_the_same_seed_gives_the_same_bytes_and_words():
    for seed in range(16):
        a, b = phantoms.draw(seed), phantoms.draw(seed)
        assert a.image.tobytes() == b.image.tobytes()
        assert phantoms.caption(a) == phantoms.caption(b)
        assert phantoms.questions(a) == phantoms.questions(b)


def test_different_seeds_give_different_images():
    assert len({p.image.tobytes() for p in examples()}) == len(examples())


def test_splits_share_no_seed():
    spans = list(phantoms.SPLITS.values())
    assert set(phantoms.SPLITS) == {"train", "val", "test"}
    assert all(a.stop <= b.start for a, b in pairwise(spans))
    assert all(len(phantoms.seeds(split, 5)) == 5 for split in phantoms.SPLITS)
    assert all(seed in phantoms.SPLITS["val"] for seed in phantoms.seeds("val", 5))


@pytest.mark.parametrize("size", [64, 112, 336])
def test_images_are_bytes_in_colour_at_any_size(size):
    for seed in range(12):
        p = phantoms.draw(seed, size)
        assert p.image.shape == (size, size, 3) and p.image.dtype == np.uint8
        assert p.image.std() > 20, f"seed {seed}: nearly nothing is drawn"
        grey = (p.image[..., 0] == p.image[..., 1]).all()
        assert grey == (p.modality != "pathology")


def test_truth_does_not_depend_on_the_size():
    for seed in range(30):
        small, large = phantoms.draw(seed, 64), phantoms.draw(seed, 112)
        assert phantoms.caption(small) == phantoms.caption(large)
        assert phantoms.questions(small) == phantoms.questions(large)


def test_the_modalities_are_the_experts_of_the_config():
    config = pytest.importorskip("config")
    assert config.MODALITIES == phantoms.MODALITIES


def test_every_modality_has_two_organs_with_findings_of_their_own():
    assert [len(phantoms.ORGANS[m]) for m in phantoms.MODALITIES] == [2, 2, 2, 2]
    assert sum(phantoms.ORGANS.values(), ()) == phantoms.ORGAN_CLASSES
    assert len(set(phantoms.FINDING_CLASSES)) == 9


def test_findings_lie_on_the_side_that_the_modality_says():
    seen = set()
    for seed in abnormal(80):
        p, weight = phantoms.draw(seed), np.abs(change(seed))
        x = (weight.sum(0) * np.arange(112)).sum() / weight.sum()
        y = (weight.sum(1) * np.arange(112)).sum() / weight.sum()
        on_the_viewers_left = x < 55.5
        # A radiologist faces the patient, so that what is on the image's left is the right lung.
        says_left = on_the_viewers_left if p.modality == "pathology" else not on_the_viewers_left
        assert p.side == ("left" if says_left else "right"), f"seed {seed}: {p.modality}, x = {x}"
        assert p.height == ("upper" if y < 55.5 else "lower"), f"seed {seed}: y = {y}"
        seen.add((p.modality, on_the_viewers_left))
    assert len(seen) == 8


def test_findings_keep_to_one_quadrant_and_off_the_mid_lines():
    for seed in abnormal(80):
        rows, columns = np.nonzero(np.abs(change(seed)) > 2)
        for at in (rows, columns):
            assert at.max() < 55 or at.min() > 56, f"seed {seed} crosses a mid-line"


def test_findings_are_brighter_in_x_ray_and_mri_and_darker_in_ct_and_pathology():
    for seed in abnormal(80):
        rises = change(seed).sum() > 0
        assert rises == (phantoms.draw(seed).modality in ("X-ray", "MRI")), f"seed {seed}"


def test_as_many_findings_are_seen_as_are_counted():
    for seed in abnormal(60):
        assert len(blobs(np.abs(change(seed)) > 12)) == phantoms.draw(seed).count, f"seed {seed}"


def test_every_finding_stands_out_from_what_is_behind_it():
    for seed in abnormal(100):
        _, _, findings, _ = phantoms.plan(seed)
        difference = np.abs(change(seed))
        assert findings
        for x, y, _, _ in findings:
            centre = difference[
                int(y + 56) - 1 : int(y + 56) + 2, int(x + 56) - 1 : int(x + 56) + 2
            ]
            assert centre.mean() > 25, f"seed {seed}: {centre.mean():.0f} of 255"


def test_spots_overlap_neither_each_other_nor_the_normal_ones():
    for seed in range(400):
        _, _, findings, normal = phantoms.plan(seed)
        spots = findings + normal
        for i, (x, y, *radii) in enumerate(spots):
            assert max(abs(x), abs(y)) + max(radii) <= 56, f"seed {seed}: outside the image"
            for u, v, *others in spots[:i]:
                assert np.hypot(x - u, y - v) > max(radii) + max(others) + 1, f"seed {seed}"


def test_size_is_the_radius_by_the_limit_of_the_modality():
    radii = defaultdict(list)
    for seed in range(2000):
        _, truth, findings, _ = phantoms.plan(seed)
        for _, _, rx, ry in findings:
            radii[truth["modality"], truth["size"]].append((rx * ry) ** 0.5)
    for modality, (_, _, limit) in phantoms.CONVENTIONS.items():
        assert max(radii[modality, "small"]) < 0.9 * limit
        assert min(radii[modality, "large"]) > 1.1 * limit
    large_in_ct, small_in_x_ray = radii["CT", "large"], radii["X-ray", "small"]
    assert np.mean(large_in_ct) == pytest.approx(np.mean(small_in_x_ray), abs=0.2)


def test_normal_spots_are_no_rarer_and_no_smaller_than_findings():
    found, normal = [], []
    for seed in range(3000):
        _, _, a, b = phantoms.plan(seed)
        found.append((len(a), sum(rx for _, _, rx, _ in a)))
        normal.append((len(b), sum(rx for _, _, rx, _ in b)))
    np.testing.assert_allclose(np.mean(found, 0), np.mean(normal, 0), rtol=0.06)


def test_the_truth_of_an_image_without_findings_has_none():
    for p in examples():
        assert (p.count == 0) == (p.finding == "none") == (p.side + p.height + p.size == "")
        if not p.count:
            assert phantoms.caption(p).endswith("no abnormality")


def test_the_caption_mentions_every_field():
    for p in examples()[:300]:
        fields = [p.modality, p.organ]
        if p.count:
            fields += [p.finding, phantoms.COUNTS[p.count], p.side, p.height, p.size]
        assert all(f" {field}" in phantoms.caption(p) for field in fields), phantoms.caption(p)


def test_questions_follow_from_the_truth():
    for p in examples()[:500]:
        for q in phantoms.questions(p):
            assert q.answer_type == ("closed" if q.answer in ("yes", "no") else "open")
            if q.answer_type == "open":
                truth = {"location": f"{p.height} {p.side}", "count": phantoms.COUNTS[p.count]}
                assert q.answer == truth.get(q.kind, getattr(p, q.kind, None)), q
                assert 1 <= len(q.answer.split()) <= 3
            elif q.kind == "presence":
                asks_for_normal = "normal?" in q.question.split()
                assert (q.answer == "yes") == ((p.count == 0) == asks_for_normal), q
            else:
                word = phantoms.COUNTS[p.count] if q.kind == "count" else getattr(p, q.kind)
                own = phantoms.FINDINGS[p.organ]
                words = q.question if q.kind == "finding" else q.question.replace(own, "")
                assert (q.answer == "yes") == (word in words), q


def test_closed_questions_are_as_often_true_as_false_for_every_kind():
    answers = defaultdict(Counter)
    for p in examples():
        for q in phantoms.questions(p):
            if q.answer_type == "closed":
                answers[q.kind][q.answer] += 1
    assert set(answers) == {"presence", *phantoms.CLOSED}
    for kind, count in answers.items():
        assert 0.45 < count["yes"] / count.total() < 0.55, f"{kind}: {count}"


def test_no_open_question_can_be_guessed():
    answers = defaultdict(Counter)
    for p in examples():
        for q in phantoms.questions(p):
            if q.answer_type == "open":
                answers[q.kind][q.answer] += 1
    assert set(answers) == set(phantoms.OPEN)
    for kind, count in answers.items():
        assert max(count.values()) / count.total() < 0.6, f"{kind}: {count}"


def test_who_reads_only_the_words_of_a_closed_question_is_right_half_the_time():
    rights = Counter()
    answers = defaultdict(Counter)
    for i, p in enumerate(examples()):
        for q in phantoms.questions(p):
            if q.answer_type == "closed" and i < 1000:
                answers[q.question][q.answer] += 1
            elif q.answer_type == "closed":
                guess = answers[q.question].most_common(1)
                rights[bool(guess) and guess[0][0] == q.answer] += 1
    assert 0.45 < rights[True] / rights.total() < 0.55


@pytest.mark.parametrize(("domains", "different"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_a_world_has_as_many_conventions_as_it_has_domains(domains, different):
    world = phantoms.seeds("train", 400, domains=domains)
    assert not set(world) & set(phantoms.seeds("train", 400, domains=4 if domains != 4 else 8))
    found = {o: phantoms.convention(world[0], o) for o in phantoms.ORGAN_CLASSES}
    assert len(set(found.values())) == different
    of = {m: {found[o] for o in organs} for m, organs in phantoms.ORGANS.items()}
    assert all(len(rules) == (2 if domains == 8 else 1) for rules in of.values())
    sides = set()
    for seed in world[:200]:
        p = phantoms.draw(seed, 16)
        if p.count:
            _, _, spots, _ = phantoms.plan(seed)
            on_viewers_left = spots[0][0] < 0
            patient, _, limit = found[p.organ]
            assert (p.side == "left") == (on_viewers_left != patient)
            *_, rx, ry = spots[0]
            assert (p.size == "large") == ((rx * ry) ** 0.5 > limit)
            sides.add((p.organ, patient))
    assert len({patient for _, patient in sides}) == (1 if domains < 4 else 2)


def test_the_world_of_four_domains_is_the_one_without_a_number():
    assert phantoms.seeds("test", 3, 5) == phantoms.seeds("test", 3, 5, domains=4)
    assert all(phantoms.convention(2 * 10**9, o) == phantoms.CONVENTIONS[m]
               for m, organs in phantoms.ORGANS.items() for o in organs)  # fmt: skip
