"""Answers from files, joined to their questions, under three protocols, compared in pairs."""

import json
import math

import pytest

from config import UserError
from data import Sample
from scoring import compare


def sample(answer, answer_type, image, name=None, question="What?"):
    turns = ((question, answer),)
    return Sample(name or str(image), "test", "test", image, turns, "CT", answer_type, "side")


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (3, 9), (10, 10), (400, 350)])
def test_mcnemar_is_the_sign_test_of_the_unequal_pairs(first, second):
    n = first + second
    as_uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)]
    expected = sum(math.comb(n, k) for k in as_uneven) / 2**n
    assert compare.mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_a_comparison_is_paired_by_question():
    samples = [sample("yes", "closed", i) for i in range(40)]
    samples += [sample("upper left", "open", 40 + i) for i in range(10)]
    first = ["yes"] * 20 + ["no"] * 20 + ["left"] * 10
    second = ["yes"] * 17 + ["no"] * 3 + ["yes"] * 12 + ["no"] * 8 + ["upper left"] * 10
    closed = (found := compare.compare(samples, first, second))["closed"]
    assert (closed["only_first"], closed["only_second"], closed["n"]) == (3, 12, 40)
    assert closed["difference"] == pytest.approx(9 / 40) and found["recall"]["difference"] == 0.5
    assert found["recall"]["ci95"] == pytest.approx((0.2225, 0.7775), abs=1e-4)
    assert found["overall"]["difference"] == pytest.approx((9 + 5) / 50)
    assert found["exact"]["only_second"] == 12 + 10
    assert "McNemar p = 0.0352" in compare.show_comparison(found)


QUESTIONS = [sample("yes", "closed", 1, "7", "Is it?"), sample("left", "open", 2, "b")]
GOOD = {"question_id": "b", "text": "left"}


def write(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_predictions_are_joined_by_id_and_results_of_another_split_refused(tmp_path, capsys):
    prompt = "<image>\nIs it? Please choose: [yes, no]"
    lines = [GOOD | {"prompt": "Where?"}, {"question_id": 7, "text": "yes", "prompt": prompt}]
    file = write(tmp_path / "x.jsonl", *lines)
    assert compare.read_predictions(file, QUESTIONS) == ["yes", "left"]
    assert "1 of 2 prompts" in capsys.readouterr().err
    file, answers = tmp_path / "x.json", {"answers": {"b": "left", "7": "yes"}}
    write(file, answers | {"leaks": {"fingerprint": "0" * 16}})
    with pytest.raises(UserError, match=f"^{file}: .*split {'0' * 16}"):
        compare.read_answers([str(file)], QUESTIONS)
    write(file, answers | {"leaks": {"fingerprint": compare.leaks.fingerprint(QUESTIONS)}})
    assert compare.read_answers([str(file)] * 2, QUESTIONS) == [["yes", "left"]] * 2


@pytest.mark.parametrize(("ending", "lines", "named"), [
    ("jsonl", [GOOD], "1 of 2 answers are missing: 7"), ("json", [{"answers": {"7": 1}}], ""),
    ("jsonl", [GOOD, GOOD], 'line 2: field "question_id"'), ("json", [[1]], 'no "answers"'),
    ("jsonl", [{"question_id": "b", "text": None}], 'line 1: field "text"')])  # fmt: skip
def test_what_is_wrong_with_predictions_is_reported_with_its_line(tmp_path, ending, lines, named):
    file = write(tmp_path / f"x.{ending}", *lines)
    with pytest.raises(UserError, match=f"^{file}: {named}"):
        compare.read_predictions(file, QUESTIONS)
