"""Answers from files, joined to their questions, under three protocols, compared in pairs."""

import json
import math
import os
from pathlib import Path

import pytest

from config import UserError
from data import Sample
from scoring import compare
from scoring.compare import mcnemar


def sample(answer, answer_type, image, name=None, question="What?"):
    turns = ((question, answer),)
    return Sample(name or str(image), "test", "test", image, turns, "CT", answer_type, "side")


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


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 9), (10, 10), (400, 350)])
def test_mcnemar_is_the_sign_test_of_the_unequal_pairs(first, second):
    n = first + second
    as_uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)]
    expected = sum(math.comb(n, k) for k in as_uneven) / 2**n
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_a_hundred_thousand_pairs_is_that_of_the_normal_distribution():
    z = (61_000 - 60_000 - 1) / math.sqrt(121_000)
    assert mcnemar(60_000, 61_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


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


GOOD = {"question_id": "b", "text": "left"}


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([GOOD], "1 of 2 answers are missing: 7"),
        ([GOOD, GOOD], 'line 2: field "question_id"'),
        ([GOOD, {"question_id": 8, "text": ""}], 'line 2: field "question_id"'),
        ([{"text": "left"}], 'line 1: field "question_id"'),
        ([{"question_id": "b", "text": None}], 'line 1: field "text"'),
        ([{"question_id": "b", "text": 4}], 'line 1: field "text"'),
        (["{"], "line 1"),
        ([GOOD, "x" * 1_100_000], "line 2"),
    ],
)
def test_what_is_wrong_with_predictions_is_reported_with_its_line(tmp_path, lines, named):
    file = write(tmp_path / "x.jsonl", *lines)
    with pytest.raises(UserError) as refused:
        compare.read_predictions(file, QUESTIONS)
    error = str(refused.value)
    assert error.startswith(f"{file}: ") and named in error and len(error) < 400


def test_prompts_with_another_question_are_reported(tmp_path, capsys):
    same = {"question_id": 7, "text": "no", "prompt": "<image>\nIs it? Please choose: [yes, no]"}
    other = GOOD | {"prompt": "Where is it?"}
    compare.read_predictions(write(tmp_path / "x.jsonl", same, other), QUESTIONS)
    assert "1 of 2 prompts" in capsys.readouterr().err


def test_results_of_another_kind_or_split_are_refused(tmp_path):
    for content in ({"scores": 1}, [1], {"answers": {"7": 1}}):
        with pytest.raises(UserError, match=r"x\.json"):
            compare.read_predictions(write(tmp_path / "x.json", content), QUESTIONS)
    answers = {"answers": {"7": "yes", "b": "left"}}
    file = write(tmp_path / "x.json", answers | {"leaks": {"fingerprint": "0" * 16}})
    with pytest.raises(UserError, match=f"split {'0' * 16}"):
        compare.read_answers([str(file)], QUESTIONS)
    ours = compare.leaks.fingerprint(QUESTIONS)
    file = write(tmp_path / "x.json", answers | {"leaks": {"fingerprint": ours}})
    assert compare.read_answers([str(file)] * 2, QUESTIONS) == [["yes", "left"]] * 2


def test_no_other_file_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    for place in (tmp_path / "x.jsonl", Path("/dev/zero"), tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=str(place)):
            compare.read_predictions(place, QUESTIONS)
