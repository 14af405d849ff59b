"""Classes as answers, by likelihood and by generation."""

import numpy as np
import pytest

from data import Sample
from scoring.classify import judge_classes, show_classes
from sources import medmnist


def question(image, answer, options, source):
    turns = (("Which?", answer),)
    return Sample("", source, "test", image, turns, "X-ray", "closed", "class", options)


def test_one_label_is_scored_by_likelihood_and_by_the_answer():
    options = ("normal", "pneumonia")
    truth = enumerate(["normal", "normal", "pneumonia", "pneumonia", "pneumonia"])
    samples = [question(i, answer, options, "pneumoniamnist") for i, answer in truth]
    p = np.array([0.1, 0.7, 0.6, 0.9, 0.4])  # of pneumonia: right for 0, 2 and 3
    answers = ["normal.", "Normal", "no pneumonia", "pneumonia", "yes"]  # right: 0, 1 and 3
    found = judge_classes(samples, answers, np.stack([1 - p, p], axis=1))
    assert found["n"] == 5 and found["likelihood_accuracy"] == found["generation_accuracy"] == 0.6
    assert found["auc"] == pytest.approx(4 / 6)  # of six pairs 0.4 < 0.7 and 0.6 < 0.7 are wrong
    assert found["ci95"]["likelihood_accuracy"] == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert 0 <= found["ci95"]["auc"][0] < 4 / 6 < found["ci95"]["auc"][1] <= 1


def test_several_labels_are_scored_each_by_itself_and_an_image_that_lacks_some_is_left_out():
    truth, n_labels = np.zeros((3, 14), int), len(medmnist.SETS["chestmnist"].classes)
    truth[0, 0] = truth[1, :2] = 1
    samples = [question(i // n_labels, ("no", "yes")[t], ("no", "yes"), "chestmnist")
               for i, t in enumerate(truth.flatten())]  # fmt: skip
    p = np.full((3, 14), 0.2)
    p[0, 0], p[1, 0], p[2, 5] = 0.9, 0.4, 0.8  # right, missed, wrong; the second of 1 is missed too
    answers = ["yes" if value > 0.5 else "no" for value in p.flatten()]
    both = np.stack([1 - p, p], axis=2).reshape(-1, 2)
    found = judge_classes(samples, answers, both)
    rates = found["likelihood_accuracy"], found["generation_accuracy"]
    assert found["n"] == 3 and rates == pytest.approx((1 - 3 / 42, 1 - 3 / 42))
    assert "AUC undefined" in show_classes("chestmnist", found)  # twelve labels are never there
    assert judge_classes(samples[:41], answers[:41], both[:41])["n"] == 2
