"""The modality that a checkpoint's routers chose, and the load of its experts."""

from types import SimpleNamespace

import pytest
import torch

from data import Sample
from scoring.router import expert_load, judge_router, show_load


def sample(image, modality):
    return Sample("1", "test", "test", image, (("Which?", "this"),), modality)


def predicted(votes, load):
    return SimpleNamespace(votes=torch.tensor(votes), load=torch.tensor(load))


SAMPLES = [sample(1, "CT"), sample(1, "CT"), sample(2, "MRI"), sample(3, ""), sample(None, "CT")]
ONE = [[1.0, 0, 0, 0]] * 2  # (L, E) of each prediction below
PREDICTIONS = [
    predicted([0.4, 0.6, 0.0, 0.0], ONE),
    predicted([0.9, 0.1, 0.0, 0.0], ONE),  # with the other prompt of image 1: CT after all
    predicted([0.0, 0.2, 0.0, 0.8], [[0.0, 3, 0, 0], [0, 1, 0, 2]]),  # MRI, taken for pathology
    predicted([0.0, 1.0, 0.0, 0.0], ONE),
    predicted([0.0, 1.0, 0.0, 0.0], ONE),
]


def test_the_likeliest_expert_over_all_prompts_of_an_image_is_its_modality():
    found = judge_router(SAMPLES, PREDICTIONS)
    assert found["n"] == 2 and found["accuracy"] == 0.5
    assert found["confusion"][0][0] == 1 and found["confusion"][1][3] == 1
    assert sum(map(sum, found["confusion"])) == 2


def test_without_votes_nothing_is_judged():
    assert judge_router(SAMPLES, [predicted([], ONE)] * 5)["n"] == 0


def test_expert_load_is_each_layers_share_by_modality():
    load = expert_load(SAMPLES, PREDICTIONS)
    assert list(load) == ["CT", "MRI", "unknown"]
    assert load["CT"] == ONE and load["unknown"] == ONE
    assert load["MRI"][0] == [0, 1, 0, 0]
    assert load["MRI"][1] == pytest.approx([0, 1 / 3, 0, 2 / 3])
    head, *rows = show_load(load, 4, [0, 2]).splitlines()
    assert head.split() == ["expert", "0", "expert", "1", "expert", "2", "expert", "3"]
    assert len(rows) == 6 and rows[4].split() == [
        "block", "2", "MRI", "0.0%", "33.3%", "0.0%", "66.7%",
    ]  # fmt: skip
