"""Scores, protocols, joined answers, paired comparison: pytest tests/scoring/test_scoring.py"""

import json
import math
import os
from pathlib import Path

import pytest

import metrics
from config import UserError
from data import Sample
from metrics import bleu1, bootstrap, precision, recall, token_f1, wilson
from scoring import compare
from scoring.compare import mcnemar


def sample(
    answer: str, answer_type: str, image: int, kind: str = "side", name: str | None = None,
    question: str = "What?", source: str = "test",
) -> Sample:  # fmt: skip
    turns = ((question, answer),)
    return Sample(name or str(image), source, "test", image, turns, "CT", answer_type, kind)


def test_a_score_counts_closed_and_open_answers_apart():
    samples = [
        sample("yes", "closed", 1),
        sample("no", "closed", 1),
        sample("upper left", "open", 2),
        sample("CT", "open", 3),
    ]
    result = metrics.score(samples, ["yes", "normal", "left", "ct"])
    assert (result["n"], result["n_closed"], result["n_open"]) == (4, 2, 2)
    assert result["closed_accuracy"] == 0.5
    assert result["open_recall"] == 0.75 and result["open_exact_match"] == 0.5
    assert result["overall"] == (1 + 0 + 0.5 + 1) / 4
    assert result["accuracy"] == (1 + 0 + 0 + 1) / 4
    for name, (low, high) in result["ci95"].items():
        assert 0 <= low <= result[name] <= high <= 1, name


def test_an_answer_of_no_type_counts_as_open_and_intervals_are_by_image():
    samples = [sample("left", "open", 2), sample("right", "open", 2), sample("axial", "", 2)]
    samples.append(sample("yes", "closed", 2))
    result = metrics.score(samples, ["left", "left", "axial", "yes"])
    assert result["n_closed"] == 1 and result["n_open"] == 3
    # One image: drawing it again changes nothing.
    assert result["ci95"]["open_recall"] == pytest.approx((2 / 3, 2 / 3))
    assert result["ci95"]["closed_accuracy"] == wilson(1, 1)


def test_one_set_of_answers_under_three_protocols():
    samples = [
        sample("no", "closed", 1),  # "abnormal" holds no "no" as a word
        sample("left", "closed", 2),  # neither yes nor no: LLaVA-Med counts it wrong
        sample("the left lung", "open", 3),
    ]
    found = compare.under_all(samples, ["abnormal", "left", "left left"])
    closed = {name: part["closed_accuracy"] for name, part in found.items()}
    # LLaVA-Med searches for "yes" or "no" within the answer: "no" is in "abnormal".
    assert closed == {"strict": 0.5, "med-moe": 1.0, "llava-med": 0.5}
    assert found["strict"]["open_recall"] == 0.5  # left of left, lung
    assert found["med-moe"]["open_recall"] == pytest.approx(2 / 3)  # the repeated word counts twice


def test_the_majority_control_sees_the_training_answers_only():
    learnt = [sample(a, "open", i) for i, a in enumerate(["left", "left", "right"])]
    learnt += [sample("yes", "closed", 9, kind="presence")]
    samples = [sample("right", "open", 1), sample("no", "closed", 1, kind="unseen")]
    assert metrics.majority(samples, learnt) == ["left", "yes"]


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),  # recall, precision, F1, BLEU-1
    [
        ("left lung", "the left lung", (1, 1, 1, 1)),
        ("left", "left lung", (1 / 2, 1, 2 / 3, math.exp(1 - 2))),
        ("left left left", "left lung", (1 / 2, 1, 2 / 5, 1 / 3)),
        ("in the left lung", "left lung", (1, 2 / 3, 4 / 5, 2 / 3)),
        ("heart", "left lung", (0, 0, 0, 0)),
        ("", "left lung", (0, 0, 0, 0)),
        ("", "the", (1, 1, 1, 1)),
        ("肺部", "肺", (1, 1 / 2, 2 / 3, 1 / 2)),
    ],
)
def test_word_scores_by_hand(answer, truth, expected):
    found = [f(answer, truth) for f in (recall, precision, token_f1, bleu1)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 9), (10, 10), (700, 620)])
def test_mcnemar_is_the_sign_test_of_the_unequal_pairs(first, second):
    n = first + second
    as_uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)]
    expected = sum(math.comb(n, k) for k in as_uneven) / 2**n if n < 1000 else None
    if expected is None:  # too large for a float: by logarithms
        expected = sum(
            math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
                     - n * math.log(2)) for k in as_uneven
        )  # fmt: skip
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_a_hundred_thousand_pairs_is_that_of_the_normal_distribution():
    z = (61_000 - 60_000 - 1) / math.sqrt(121_000)
    assert mcnemar(60_000, 61_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_a_bootstrap_interval_is_that_of_a_mean_of_images():
    values, groups = [0.0, 1.0] * 200, [str(i) for i in range(400)]
    low, high = bootstrap(values, groups)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(400), rel=0.1)
    pairs = [str(i // 2) for i in range(400)]  # each image one right and one wrong: no spread
    assert bootstrap(values, pairs) == (0.5, 0.5)


def test_a_comparison_is_paired_by_question():
    samples = [sample("yes", "closed", i) for i in range(40)]
    samples += [sample("upper left", "open", 40 + i) for i in range(10)]
    first = ["yes"] * 20 + ["no"] * 20 + ["left"] * 10
    second = ["yes"] * 17 + ["no"] * 3 + ["yes"] * 12 + ["no"] * 8 + ["upper left"] * 10
    found = compare.compare(samples, first, second)
    closed = found["closed"]
    assert (closed["only_first"], closed["only_second"], closed["n"]) == (3, 12, 40)
    assert closed["difference"] == pytest.approx(9 / 40)
    assert closed["mcnemar_p"] == pytest.approx(mcnemar(3, 12))
    assert closed["ci95"][0] < 9 / 40 < closed["ci95"][1]
    assert found["recall"]["difference"] == 0.5 and found["recall"]["ci95"] == (0.5, 0.5)
    assert found["overall"]["difference"] == pytest.approx((9 + 5) / 50)
    assert found["exact"]["only_second"] == 12 + 10
    back = compare.compare(samples, second, first)
    assert back["overall"]["difference"] == -found["overall"]["difference"]
    assert "McNemar p = 0.0352" in compare.show_comparison(found)
    none = compare.compare(samples, first, first)
    assert none["closed"]["mcnemar_p"] == 1 and none["overall"]["ci95"] == (0, 0)


QUESTIONS = [
    sample("yes", "closed", 1, name="7", question="Is it?"),
    sample("left", "open", 2, name="b"),
]


def write(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_predictions_are_joined_by_id_and_not_by_order(tmp_path):
    lines = [{"question_id": "b", "text": "left"}, "", {"question_id": 7, "text": "yes", "more": 1}]
    assert compare.read_predictions(write(tmp_path / "x.jsonl", *lines), QUESTIONS) == [
        "yes",
        "left",
    ]
    results = write(tmp_path / "x.json", {"answers": {"b": "left", "7": "yes"}})
    assert compare.read_predictions(results, QUESTIONS) == ["yes", "left"]


def test_of_several_sources_the_id_begins_with_the_source(tmp_path):
    two = [QUESTIONS[0], sample("no", "closed", 1, name="7", source="other")]
    assert metrics.question_ids(two) == ["test/7", "other/7"]
    with pytest.raises(UserError, match="question 7 is in the data 2 times"):
        metrics.question_ids([QUESTIONS[0], QUESTIONS[0]])


GOOD = {"question_id": "b", "text": "left"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD], "1 of 2 answers are missing: 7"),
        ([], "2 of 2 answers are missing: 7, b"),
        ([GOOD, GOOD], 'line 2: field "question_id" "b"; must be another than that of line 1'),
        ([GOOD, {"question_id": 8, "text": ""}], 'line 2: field "question_id" 8; must be one of'),
        ([{"text": "left"}], 'line 1: field "question_id" is missing'),
        ([{"question_id": "b", "text": None}], 'line 1: field "text" null; must be a text'),
        ([{"question_id": "b", "text": 4}], 'line 1: field "text" 4; must be a text'),
        ([{"question_id": float("nan"), "text": ""}], "NaN; must be a text or a finite number"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not an object: [1]"),
        (["[" * 100_000], "line 1 is not JSON"),
        (['{"question_id": "b", "text": "x", "text": "y"}'], 'an object holds "text" twice'),
        ([GOOD, "x" * 1_100_000], "line 2 is longer than 1000000 bytes"),
    ],
)
def test_what_is_wrong_with_predictions_is_reported_with_its_line(tmp_path, lines, message):
    file = write(tmp_path / "x.jsonl", *lines)
    with pytest.raises(UserError) as refused:
        compare.read_predictions(file, QUESTIONS)
    error = str(refused.value)
    assert error.startswith(f"{file}: ") and message in error and len(error) < 400


def test_a_file_of_100_megabytes_in_one_line_is_refused_after_its_first(tmp_path):
    file = tmp_path / "x.jsonl"
    with file.open("wb") as f:
        f.truncate(100_000_000)
    with pytest.raises(UserError, match="line 1 is longer than 1000000 bytes"):
        compare.read_predictions(file, QUESTIONS)


def test_prompts_with_another_question_are_reported(tmp_path, capsys):
    same = {"question_id": 7, "text": "no", "prompt": "<image>\nIs it? Please choose: [yes, no]"}
    other = GOOD | {"prompt": "Where is it?"}
    compare.read_predictions(write(tmp_path / "x.jsonl", same, other), QUESTIONS)
    assert "1 of 2 prompts do not hold the question" in capsys.readouterr().err


def test_results_of_another_kind_are_refused(tmp_path):
    for content, message in (({"scores": 1}, 'no "answers" in it'), ([1], 'no "answers" in it'),
                          ({"answers": {"7": 1}}, '"text" 1; must be a text')):  # fmt: skip
        with pytest.raises(UserError, match=message):
            compare.read_predictions(write(tmp_path / "x.json", content), QUESTIONS)
    os.mkfifo(tmp_path / "x.jsonl")
    for place in (tmp_path / "x.jsonl", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match=f"{place}: is not a regular file"):
            compare.read_predictions(place, QUESTIONS)


def test_not_utf8_and_missing_files_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"question_id": "\xff"}')
    with pytest.raises(UserError, match="line 1 is not JSON: 'utf-8' codec"):
        compare.read_predictions(tmp_path / "x.jsonl", QUESTIONS)
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        compare.read_predictions(tmp_path / "none.jsonl", QUESTIONS)
