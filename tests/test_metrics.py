"""Every score on worked examples, and every interval by its definition."""

import numpy as np
import pytest

import metrics
from config import UserError
from data import Sample
from metrics import bootstrap, confusion, f1_scores, is_right, router_report, wilson, words


@pytest.mark.parametrize(
    ("text", "found"),
    [("The left lung, a bit LOWER an.", ["left", "lung", "bit", "lower"]), ("", []),
     ("T2-weighted snake_case", ["t2", "weighted", "snake", "case"]),
     ("肺部CT", ["肺", "部", "ct"])],
)  # fmt: skip
def test_words_drop_case_punctuation_and_articles(text, found):
    assert words(text) == found


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [("yes", "Yes", True), ("No.", "no", True), ("none", "no", False), ("", "no", False),
     ("normal", "no", False),  # the released scorer finds "no" in it
     ("No, it is normal", "no", True), ("yes and no", "yes", False), ("the left", "Left", True),
     ("left lung", "left", False), ("left upper", "upper left", False)],
)  # fmt: skip
def test_a_closed_answer_is_right_or_wrong(answer, truth, right):
    assert is_right(answer, truth) is right


@pytest.mark.parametrize(
    ("answer", "truth", "recall", "precision", "f1", "bleu1", "exact"),
    [
        ("The Upper left.", "upper left", 1.0, 1.0, 1.0, 1.0, True),
        ("left upper", "upper left", 1.0, 1.0, 1.0, 1.0, False),
        ("left", "upper left", 0.5, 1.0, 2 / 3, np.exp(-1), False),
        ("left left left", "upper left", 0.5, 1.0, 2 / 5, 1 / 3, False),
        ("left lung", "left upper lobe", 1 / 3, 0.5, 2 / 5, np.exp(-0.5) / 2, False),
        ("left lung", "left", 1.0, 0.5, 2 / 3, 0.5, False),
        ("lungs", "lung", 0.0, 0.0, 0.0, 0.0, False),
        ("", "lung", 0.0, 0.0, 0.0, 0.0, False),
        ("lung", "", 0.0, 0.0, 0.0, 0.0, False),
        ("", "the", 1.0, 1.0, 1.0, 1.0, True),
    ],
)
def test_open_answers_are_scored_by_their_words(answer, truth, recall, precision, f1, bleu1, exact):
    wanted = {"recall": recall, "precision": precision, "f1": f1, "exact_match": float(exact),
              "bleu1": bleu1}  # fmt: skip
    assert metrics.STRICT.opened(answer, truth) == pytest.approx(wanted)
    assert metrics.STRICT.closed(answer, truth) == exact


@pytest.mark.parametrize(
    ("right", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (1, 29, (0.0061, 0.1718)),
     (0, 20, (0.0, 0.1611)), (20, 20, (0.8389, 1.0)), (0, 0, (0.0, 1.0))],
)  # fmt: skip
def test_wilson_agrees_with_newcombe_1998_table_1(right, n, interval):
    assert wilson(right, n) == pytest.approx(interval, abs=5e-5)
    assert min(wilson(right, n)) >= 0 and max(wilson(right, n)) <= 1


def test_a_bootstrap_draws_whole_groups_2000_times():
    values, groups = np.random.default_rng(1).random(30).tolist(), [*"abcdefghij" * 2, *"ab" * 5]
    of = [[v for v, g in zip(values, groups, strict=True) if g == name] for name in "abcdefghij"]
    rng, means = np.random.default_rng(0), []
    for _ in range(2000):
        drawn = [v for i in rng.integers(10, size=10) for v in of[i]]
        means.append(sum(drawn) / len(drawn))
    assert bootstrap(values, groups) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=1e-12)
    assert bootstrap(values, groups, 2000) == bootstrap(values, groups)
    assert bootstrap([1.0, 1.0], ["a", "b"]) == (1.0, 1.0) and bootstrap([], []) == (0.0, 1.0)


def test_confusion_rows_are_the_truth_and_f1_is_by_class():
    table = confusion([0, 0, 1, 2], [0, 1, 1, 1], 4)
    assert table.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert f1_scores(table) == [2 / 3, 0.5, 0.0, None]


def test_a_router_report_counts_names_and_is_printed():
    report = router_report([0, 1, 1], [0, 1, 0], ["CT", "MRI", "X-ray"])
    assert report == {
        "n": 3, "accuracy": 2 / 3, "ci95": wilson(2, 3), "labels": ["CT", "MRI", "X-ray"],
        "confusion": [[1, 0, 0], [1, 1, 0], [0, 0, 0]],
        "f1": {"CT": 2 / 3, "MRI": 2 / 3, "X-ray": None},
    }  # fmt: skip
    assert metrics.format_confusion(report).splitlines() == [
        "                       CT        MRI      X-ray         F1",
        "  CT                    1          0          0      0.667",
        "  MRI                   1          1          0      0.667",
        "  X-ray                 0          0          0          -",
    ]
    empty = router_report([], [], ["CT"])
    assert (empty["n"], empty["accuracy"], empty["ci95"]) == (0, 0.0, (0.0, 1.0))


def test_experts_are_named_after_modalities_then_numbered():
    assert metrics.expert_names(2) == ["CT", "MRI"]
    assert metrics.expert_names(6)[3:] == ["pathology", "expert 4", "expert 5"]


def sample(name, answer, answer_type, image, kind="", source="set"):
    return Sample(name, source, "test", image, (("Q?", answer),), None, answer_type, kind)


SAMPLES = [
    sample("1", "yes", "closed", 1, "a"), sample("2", "no", "closed", 1, "b"),
    sample("3", "left lung", "open", 1, "a"), sample("4", "left", "", 2, "b"),
    sample("5", "right", "open", 2, "b"),
]  # fmt: skip
ANSWERS = ["yes", "yes", "lung", "left", "left"]


def test_a_score_counts_closed_and_open_answers_apart():
    found = metrics.score(SAMPLES, ANSWERS)
    images = ["1", "1", "1", "2", "2"]  # of the closed ones, then of the others
    wanted = {
        "closed_accuracy": (1 / 2, wilson(1, 2)),
        "overall": (2.5 / 5, bootstrap([1, 0, 0.5, 1, 0], images)),
        "accuracy": (2 / 5, bootstrap([1, 0, 0, 1, 0], images)),
    }
    first = {"recall": 0.5, "precision": 1, "f1": 2 / 3, "exact_match": 0, "bleu1": np.exp(-1)}
    for name, score in first.items():
        values = (score, 1, 0)
        wanted[f"open_{name}"] = sum(values) / 3, bootstrap(values, images[2:])
    assert found.pop("ci95") == {name: interval for name, (_, interval) in wanted.items()}
    assert found == {"n": 5, "n_closed": 2, "n_open": 3} | {
        name: pytest.approx(value) for name, (value, _) in wanted.items()
    }
    nothing = metrics.score([], [])
    assert nothing["overall"] == nothing["closed_accuracy"] == 0.0 and nothing["n"] == 0
    for shorter in (metrics.score, lambda s, a: metrics.split_by(s, a, lambda _: "")):
        with pytest.raises(ValueError):
            shorter(SAMPLES, ANSWERS[1:])


def test_scores_are_split_by_any_key():
    parts = metrics.split_by(SAMPLES, ANSWERS, lambda s: s.kind)
    picks = {"a": (0, 2), "b": (1, 3, 4)}
    assert list(parts) == ["a", "b"]
    assert parts == {key: metrics.score([SAMPLES[i] for i in rows], [ANSWERS[i] for i in rows])
                     for key, rows in picks.items()}  # fmt: skip


def test_the_majority_baseline_is_the_commonest_training_answer_to_this_kind_of_question():
    train = [sample("", a, t, 1, k) for a, t, k in (
        ("yes", "closed", "a"), ("no", "closed", "a"), ("no", "closed", "a"),
        ("yes", "closed", "b"), ("yes", "closed", "b"), ("lung", "open", "a"))]  # fmt: skip
    asked = [sample("", "?", t, 1, k) for t, k in (
        ("closed", "a"), ("closed", "b"), ("closed", "new"), ("open", "new"),
        ("other", "a"))]  # fmt: skip
    assert metrics.majority(asked, train) == ["no", "yes", "yes", "lung", ""]


def test_question_ids_are_unique_and_name_their_source_where_there_are_several():
    assert metrics.question_ids(SAMPLES) == ["1", "2", "3", "4", "5"]
    both = [*SAMPLES[:2], sample("1", "yes", "closed", 1, source="other")]
    assert metrics.question_ids(both) == ["set/1", "set/2", "other/1"]
    with pytest.raises(UserError, match="question 2 is in the data 2 times"):
        metrics.question_ids([*SAMPLES, SAMPLES[1]])


def test_the_table_of_scores_stands_under_its_titles():
    s = metrics.score(SAMPLES, ANSWERS)
    s |= {"ci95": dict.fromkeys(s["ci95"], (0.25, 0.75))}
    titles = ("closed accuracy, 95 %, n", "open recall, 95 %, n", "together, 95 %, n", " exact")
    assert " " * 24 + "".join(f"{t:<30}" for t in titles[:3]) + titles[3] == metrics.HEADER
    cells = [f"{x} [25.0%, 75.0%]     {n}".ljust(30) for x, n in
             ((" 50.0%", 2), (" 50.0%", 3), (" 50.0%", 5))]  # fmt: skip
    assert metrics.show("all", s) == "  " + "all".ljust(22) + "".join(cells) + " 40.0%"
    none = metrics.show("x", metrics.score(SAMPLES[:2], ANSWERS[:2]))
    assert none[54:84] == "-".ljust(30)
