"""Classes as answers, by likelihood and by generation."""

import numpy as np
import pytest

from data import Sample
from scoring.classify import judge_classes, show_classes
from sources import medmnist


def question(name, answer, options, source, kind="class", image=1):
    turns = (("Which?", answer),)
    return Sample(name, source, "test", image, turns, "X-ray", "closed", kind, options)


def test_one_label_is_scored_by_likelihood_and_by_the_answer():
    options = ("normal", "pneumonia")
    truth = [0, 0, 1, 1, 1]
    samples = [question(str(i), options[t], options, "pneumoniamnist", image=i)
               for i, t in enumerate(truth)]  # fmt: skip
    p = np.array([0.1, 0.7, 0.6, 0.9, 0.4])  # of pneumonia: right for 0, 2 and 3
    answers = ["normal.", "Normal", "no pneumonia", "pneumonia", "yes"]  # right: 0, 1 and 3
    found = judge_classes(samples, answers, np.stack([1 - p, p], axis=1))
    assert found["n"] == 5 and found["likelihood_accuracy"] == found["generation_accuracy"] == 0.6
    assert found["auc"] == pytest.approx(4 / 6)  # of six pairs 0.4 < 0.7 and 0.6 < 0.7 are wrong
    for name, (low, high) in found["ci95"].items():
        assert 0 <= low <= found[name] <= high <= 1
    assert found["ci95"]["likelihood_accuracy"] == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert "accuracy by likelihood 0.600" in show_classes("pneumoniamnist", found)


def test_several_labels_are_scored_each_by_itself():
    labels = medmnist.SETS["chestmnist"].classes
    truth = np.zeros((3, 14), int)
    truth[0, 0] = truth[1, :2] = 1
    samples = [
        question(f"{i}-{c}", ("no", "yes")[truth[i, j]], ("no", "yes"), "chestmnist", c, i)
        for i in range(3)
        for j, c in enumerate(labels)
    ]
    p = np.full((3, 14), 0.2)
    p[0, 0], p[1, 0], p[2, 5] = 0.9, 0.4, 0.8  # right, missed, wrong; the second of 1 is missed too
    answers = ["yes" if value > 0.5 else "no" for value in p.flatten()]
    found = judge_classes(samples, answers, np.stack([1 - p, p], axis=2).reshape(-1, 2))
    assert found["n"] == 3
    assert found["likelihood_accuracy"] == pytest.approx(1 - 3 / 42)
    assert found["generation_accuracy"] == pytest.approx(1 - 3 / 42)
    assert found["auc"] is None  # twelve labels are never there
    assert "AUC undefined" in show_classes("chestmnist", found)
    both = np.stack([1 - p, p], axis=2).reshape(-1, 2)
    cut = judge_classes(samples[:41], answers[:41], both[:41])  # the third image lacks a label
    assert cut["n"] == 2 and cut["likelihood_accuracy"] == pytest.approx(1 - 2 / 28)
    assert judge_classes(samples[:13], answers[:13], both[:13]) == {}


def test_the_interval_of_an_auc_holds_it_and_shrinks_with_more_images():
    rng = np.random.default_rng(1)
    widths = []
    for n in (60, 600):
        truth = rng.integers(2, size=n)
        p = 1 / (1 + np.exp(-(truth + rng.normal(size=n))))
        options = ("normal", "pneumonia")
        samples = [question(str(i), options[t], options, "pneumoniamnist", image=i)
                   for i, t in enumerate(truth)]  # fmt: skip
        found = judge_classes(samples, ["normal"] * n, np.stack([1 - p, p], axis=1))
        low, high = found["ci95"]["auc"]
        assert low < found["auc"] < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]
