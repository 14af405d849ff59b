"""Every score on worked examples, and every interval by its definition."""

import numpy as np
import pytest

import metrics
from config import UserError
from data import Sample
from metrics import bootstrap, is_right, router_report, wilson, words


def test_words_drop_case_punctuation_and_articles_and_a_closed_answer_is_right_or_wrong():
    assert words("The left lung, a bit LOWER.") == ["left", "lung", "bit", "lower"]
    assert words("T2-weighted b_c 肺部CT") == ["t2", "weighted", "b", "c", "肺", "部", "ct"]
    right = ("yes", "Yes"), ("No, it is normal", "no"), ("the left", "Left")
    wrong = ("", "no"), ("yes and no", "yes"), ("left lung", "left"), ("normal", "no")
    assert all(is_right(answer, truth) for answer, truth in right)
    assert not any(is_right(answer, truth) for answer, truth in wrong)


@pytest.mark.parametrize(("answer", "truth", "recall", "precision", "f1", "bleu1", "exact"), [
    ("left upper", "upper left", 1.0, 1.0, 1.0, 1.0, False),
    ("left left left", "upper left", 0.5, 1.0, 2 / 5, 1 / 3, False),
    ("left lung", "left upper lobe", 1 / 3, 0.5, 2 / 5, np.exp(-0.5) / 2, False),
    ("", "lung", 0.0, 0.0, 0.0, 0.0, False), ("lung", "", 0.0, 0.0, 0.0, 0.0, False),
    ("", ",", 1.0, 1.0, 1.0, 1.0, True)])  # fmt: skip
def test_open_answers_are_scored_by_their_words(answer, truth, recall, precision, f1, bleu1, exact):
    wanted = {"recall": recall, "precision": precision, "f1": f1, "exact_match": float(exact),
              "bleu1": bleu1}  # fmt: skip
    assert metrics.STRICT.opened(answer, truth) == pytest.approx(wanted)


def test_wilson_is_newcombes_1998_table_1_and_a_bootstrap_draws_whole_groups_2000_times():
    table = {(81, 263): (0.2553, 0.3662), (0, 20): (0.0, 0.1611), (20, 20): (0.8389, 1.0)}
    for (right, n), interval in table.items():
        assert wilson(right, n) == pytest.approx(interval, abs=5e-5)
    values, groups = np.random.default_rng(1).random(30).tolist(), [*"abcdefghij" * 2, *"ab" * 5]
    of = [[v for v, g in zip(values, groups, strict=True) if g == name] for name in "abcdefghij"]
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        drawn = [v for i in rng.integers(10, size=10) for v in of[i]]
        means.append(sum(drawn) / len(drawn))
    assert bootstrap(values, groups) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=1e-12)
    assert wilson(0, 0) == bootstrap([], []) == (0.0, 1.0)


def test_a_router_report_has_the_truth_in_rows_and_f1_by_class():
    names = metrics.expert_names(6, "oracle")[2:]
    assert metrics.expert_names(2, "topk") == ["expert 0", "expert 1"]
    assert router_report([0, 1, 1, 2], [0, 1, 0, 2], names) == {
        "n": 4, "accuracy": 3 / 4, "ci95": wilson(3, 4), "labels": names,
        "confusion": [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        "f1": {"X-ray": 2 / 3, "pathology": 2 / 3, "expert 4": 1.0, "expert 5": None}}  # fmt: skip
    assert router_report([], [], ["CT"])["accuracy"] == 0.0


def test_an_interval_is_never_empty_and_a_question_without_an_image_is_its_own_group():
    images, half = list("abcdefghijkl"), wilson(0, 12)[1]
    assert bootstrap([0] * 12, images) == (0, half) == wilson(0, 12)
    assert bootstrap([1] * 12, images) == pytest.approx(wilson(12, 12))
    assert bootstrap([0.5] * 12, images) == pytest.approx((0.5 - half, 0.5 + half))
    assert bootstrap([0] * 12, images, least=-1.0) == (-half, half)
    assert bootstrap([0, 1] * 20, ["one image"] * 40) == pytest.approx((0.35, 0.65))
    texts = [sample(str(i), "left", "open", None) for i in range(3)]
    assert len(set(metrics.images_of([*texts, SAMPLES[0], SAMPLES[1]]))) == 4


@pytest.mark.parametrize(("truth", "wrong"), [
    ("Hepatitis A", "Hepatitis B"), ("influenza A", "influenza"), ("type A node", "type B node"),
    ("A", "the"), ("A", ""), ("> 5 mm", "< 5 mm"), ("-5", "5"), ("+", "-"), ("1.5 cm", "15 cm"),
    ("0.5", "5.0"), ("50 %", "50"), ("grade I", "grade II"), ("CD20+", "CD20")])  # fmt: skip
def test_signs_units_comparisons_and_grades_are_part_of_an_answer(truth, wrong):
    assert metrics.is_exact(truth, truth) and metrics.recall(wrong, truth) < 1
    assert words("A left-sided mass, 5-10 mm.") == ["left", "sided", "mass", "5", "10", "mm"]


def sample(name, answer, answer_type, image, kind="", source="set"):
    return Sample(name, source, "test", image, (("Q?", answer),), None, answer_type, kind)


SAMPLES = [sample("1", "yes", "closed", 1, "a"), sample("2", "no", "closed", 1, "b"),
           sample("3", "left lung", "open", 1, "a"), sample("4", "left", "", 2, "b"),
           sample("5", "right", "open", 2, "b")]  # fmt: skip
ANSWERS = ["yes", "yes", "lung", "left", "left"]


def test_a_score_counts_closed_and_open_answers_apart_and_is_split_by_any_key():
    found = metrics.score(SAMPLES, ANSWERS)
    images = ["1", "1", "1", "2", "2"]  # of the closed ones, then of the others
    wanted = {"closed_accuracy": (1 / 2, wilson(1, 2)),
              "overall": (2.5 / 5, bootstrap([1, 0, 0.5, 1, 0], images)),
              "accuracy": (2 / 5, bootstrap([1, 0, 0, 1, 0], images))}  # fmt: skip
    first = {"recall": 0.5, "precision": 1, "f1": 2 / 3, "exact_match": 0, "bleu1": np.exp(-1)}
    for name, score in first.items():
        values = (score, 1, 0)
        wanted[f"open_{name}"] = sum(values) / 3, bootstrap(values, images[2:])
    assert found.pop("ci95") == {name: interval for name, (_, interval) in wanted.items()}
    values = {name: pytest.approx(value) for name, (value, _) in wanted.items()}
    assert found == {"n": 5, "n_closed": 2, "n_open": 3} | values
    assert metrics.score([], [])["overall"] == metrics.score([], [])["closed_accuracy"] == 0.0
    expected = {key: metrics.score([SAMPLES[i] for i in rows], [ANSWERS[i] for i in rows])
                for key, rows in {"a": (0, 2), "b": (1, 3, 4)}.items()}  # fmt: skip
    assert metrics.split_by(SAMPLES, ANSWERS, lambda s: s.kind) == expected


def test_the_majority_baseline_is_the_commonest_training_answer_to_this_kind_of_question():
    rows = [*["no a"] * 2, "yes a", *["yes b"] * 2]
    train = [sample("", row.split()[0], "closed", 1, row.split()[1]) for row in rows]
    asked = [sample("", "?", "closed", 1, kind) for kind in ("a", "b", "new")]
    asked.append(sample("", "?", "open", 1, "a"))
    assert metrics.majority(asked, train) == ["no", "yes", "yes", ""]


def test_question_ids_are_unique_and_name_their_source_where_there_are_several():
    assert metrics.question_ids(SAMPLES) == ["1", "2", "3", "4", "5"]
    both = [*SAMPLES[:2], sample("1", "yes", "closed", 1, source="other")]
    assert metrics.question_ids(both) == ["set/1", "set/2", "other/1"]
    with pytest.raises(UserError, match="question 2 is in the data 2 times"):
        metrics.question_ids([*SAMPLES, SAMPLES[1]])
