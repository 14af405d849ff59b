"""The published scorers, quirk by quirk."""

import hashlib
import math

import pytest

from scoring.protocols import CONTRACTIONS, LLAVA_MED, MED_MOE, normalise


@pytest.mark.parametrize(("answer", "truth", "med_moe", "llava_med"), [
    ("abnormal", "No", 1, 1),  # ab-no-rmal
    ("none", "no", 1, 0),  # LLaVA-Med reads 0
    ("n.o", "no", 0, 1),  # its periods go first
    ("left", "left", 1, 0),  # neither yes nor no is in it
    ("no", "A", 0, 1),  # an article is normalised to nothing, and nothing is in every answer
])  # fmt: skip
def test_closed_answers_are_searched_for_letters(answer, truth, med_moe, llava_med):
    assert MED_MOE.closed(answer, truth) == med_moe
    assert LLAVA_MED.closed(answer, truth) == llava_med


@pytest.mark.parametrize(("text", "expected"), [
    ("The LUNG, a lung, an arm", "lung lung arm"),
    ("none Two ten eleven", "0 2 10 eleven"),
    ("dont couldnt've couldn'tve couldntve", "don't couldn't've couldn't've couldntve"),
    ("t2-weighted - x-ray", "t2weighted xray"),  # one hyphen beside a space glues all of them
    ("left/right (a/b)", "left right b"),  # each mark for itself: ( deleted, / a space
    ("1,000 t2-weighted", "1000 t2weighted"),  # the comma between digits acts on all marks
    ("3.5 cm. .5 e.g. th.e", "3.5 cm .5 eg"),  # an article once its period is gone
    ("." * 32 + "no.", "no."),  # 32 periods are deleted and no more
])  # fmt: skip
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_the_contraction_table_is_the_released_one():
    # taken from the released dict, glossary.py:3-124 @148cbd6
    digest = hashlib.sha256(repr(sorted(CONTRACTIONS.items())).encode()).hexdigest()
    assert digest == "8f189686e9ad2a7535a459ef38996aae87d06358cf3d91e78f1a729d0a66dcd6"


@pytest.mark.parametrize(("answer", "truth", "recall", "precision", "exact_match", "bleu1"), [
    ("Upper left.", "left upper", 1, 1, 1, (1 / 2, 1)),  # the raw word "left." is not in the truth
    ("left left left", "upper left", 3 / 4, 1, 1 / 3, (1 / 3, 1 / 3)),  # 3 right, 1 missed
    ("in the left lung", "left lung", 1, 2 / 3, 2 / 3, (1 / 2, 2 / 3)),  # an "exact match" of 2 / 3
    ("left", "left lung base", 1 / 3, 1, 1, (math.exp(-2), math.exp(-2))),  # short answers lose
    ("the lungs:", "a lungs", 0, 0, 0, (0, 0)),  # no smoothing: 0, not 0.1 / 2
])  # fmt: skip
def test_open_answers(answer, truth, recall, precision, exact_match, bleu1):
    expected = {"recall": recall, "precision": precision, "exact_match": exact_match}
    expected["f1"] = 2 * recall * precision / (recall + precision) if recall else 0.0
    for paper, bleu in zip((MED_MOE, LLAVA_MED), bleu1, strict=True):
        found, wanted = paper.opened(answer, truth), expected | {"bleu1": bleu}
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
