"""The published scorers, quirk by quirk."""

import hashlib
import math

import pytest

from scoring.protocols import CONTRACTIONS, LLAVA_MED, MED_MOE, normalise


@pytest.mark.parametrize(
    ("answer", "truth", "med_moe", "llava_med"),
    [
        ("abnormal", "No", 1, 1),  # ab-no-rmal
        ("none", "no", 1, 0),  # LLaVA-Med reads 0
        ("n.o", "no", 0, 1),  # its periods go first
        ("left", "left", 1, 0),  # neither yes nor no is in it
        ("no", "A", 0, 1),  # an article is normalised to nothing, and nothing is in every answer
    ],
)
def test_closed_answers_are_searched_for_letters(answer, truth, med_moe, llava_med):
    assert MED_MOE.closed(answer, truth) == med_moe
    assert LLAVA_MED.closed(answer, truth) == llava_med


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The LUNG, a lung, an arm", "lung lung arm"),
        ("none Two ten eleven", "0 2 10 eleven"),
        ("dont couldnt've couldn'tve couldntve", "don't couldn't've couldn't've couldntve"),
        ("t2-weighted - x-ray", "t2weighted xray"),  # one hyphen beside a space glues all of them
        ("left/right (a/b)", "left right b"),  # each mark for itself: ( deleted, / a space
        ("1,000 t2-weighted", "1000 t2weighted"),  # the comma between digits acts on all marks
        ("3.5 cm. .5 e.g. th.e", "3.5 cm .5 eg"),  # an article once its period is gone
        ("." * 32 + "no.", "no."),  # 32 periods are deleted and no more
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_the_contraction_table_is_the_released_one():
    # taken from the released dict, glossary.py:3-124 @148cbd6
    digest = hashlib.sha256(repr(sorted(CONTRACTIONS.items())).encode()).hexdigest()
    assert digest == "8f189686e9ad2a7535a459ef38996aae87d06358cf3d91e78f1a729d0a66dcd6"


@pytest.mark.parametrize("paper", [MED_MOE, LLAVA_MED])
@pytest.mark.parametrize(
    ("answer", "truth", "recall", "precision", "exact_match"),
    [
        ("Upper left.", "left upper", 1, 1, 1),  # order does not matter
        ("left left left", "upper left", 3 / 4, 1, 1 / 3),  # 3 right, 1 missed; 1 of 3 words
        ("in the left lung", "left lung", 1, 2 / 3, 2 / 3),  # "exact match" of two thirds
        ("the lungs:", "a lungs", 0, 0, 0),
    ],
)
def test_open_answers(paper, answer, truth, recall, precision, exact_match):
    expected = {"recall": recall, "precision": precision, "exact_match": exact_match}
    expected["f1"] = 2 * recall * precision / (recall + precision) if recall else 0.0
    found = paper.opened(answer, truth)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "truth", "med_moe", "llava_med"),
    [
        ("lung.", "Lung", 0, 1),  # Med-MoE compares the raw words
        ("left", "left lung base", math.exp(-2), math.exp(-2)),  # short answers lose
        ("right", "left", 0, 0),  # no smoothing: 0, not 0.1 / 1
    ],
)
def test_bleu1(answer, truth, med_moe, llava_med):
    assert MED_MOE.opened(answer, truth)["bleu1"] == pytest.approx(med_moe, abs=1e-12)
    assert LLAVA_MED.opened(answer, truth)["bleu1"] == pytest.approx(llava_med, abs=1e-12)
