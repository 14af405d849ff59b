"""Every score on worked examples: python -m pytest tests/test_metrics.py"""

import numpy as np
import pytest

from metrics import (
    bootstrap,
    confusion,
    f1_scores,
    is_exact,
    is_right,
    recall,
    router_report,
    wilson,
    words,
)


def test_words_drop_case_punctuation_and_articles():
    assert words("The left lung, a bit LOWER.") == ["left", "lung", "bit", "lower"]
    assert words("T2-weighted") == ["t2", "weighted"]
    assert words("") == []


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("yes", "Yes", True),
        ("No.", "no", True),
        ("normal", "no", False),  # the released scorer finds "no" in it
        ("abnormal", "no", False),
        ("none", "no", False),
        ("No, it is normal", "no", True),
        ("yes and no", "yes", False),
        ("", "no", False),
        ("left", "left", True),
        ("left lung", "left", False),
        ("the left", "Left", True),
        ("coronal plane", "Coronal Plane", True),
    ],
)
def test_a_closed_answer_is_right_or_wrong(answer, truth, right):
    assert is_right(answer, truth) is right


@pytest.mark.parametrize(
    ("answer", "truth", "value"),
    [
        ("upper left", "upper left", 1.0),
        ("left upper", "upper left", 1.0),
        ("left", "upper left", 0.5),
        ("left left left", "upper left", 0.5),  # saying it again does not help
        ("lungs", "lung", 0.0),
        ("", "lung", 0.0),
        ("the lung", "a lung", 1.0),
    ],
)
def test_open_recall_is_the_share_of_true_words_that_are_said(answer, truth, value):
    assert recall(answer, truth) == value


def test_exact_needs_the_same_words_in_the_same_order():
    assert is_exact("The Upper left.", "upper left")
    assert not is_exact("left upper", "upper left")


def test_wilson_agrees_with_published_values():
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 20)[0] == 0.0 and round(wilson(0, 20)[1], 4) == 0.1611
    assert wilson(20, 20)[1] == 1.0


def test_the_bootstrap_covers_the_mean_and_widens_when_answers_come_in_groups():
    rng = np.random.default_rng(1)
    values = rng.random(400)
    alone = bootstrap(values, [str(i) for i in range(400)])
    assert alone[0] < values.mean() < alone[1]
    by_ten = np.repeat(rng.random(40), 10)
    loose = bootstrap(by_ten, [str(i) for i in range(400)])
    tied = bootstrap(by_ten, [str(i // 10) for i in range(400)])
    assert tied[1] - tied[0] > 2 * (loose[1] - loose[0])
    assert bootstrap(values, list(map(str, range(400)))) == alone  # the same every time
    assert bootstrap([1.0, 1.0], ["a", "b"]) == (1.0, 1.0)


def test_confusion_rows_are_the_truth():
    table = confusion([0, 0, 1, 2], [0, 1, 1, 1], 4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert f1_scores(table) == [2 / 3, 0.5, 0.0, None]


def test_a_router_report_counts_and_names():
    report = router_report([0, 1, 1], [0, 1, 0], ["CT", "MRI"])
    assert report["n"] == 3 and report["accuracy"] == 2 / 3
    assert report["confusion"] == [[1, 0], [1, 1]]
    assert report["f1"] == {"CT": 2 / 3, "MRI": 2 / 3}
