"""The modality that a checkpoint's routers chose, and the load of its experts."""

from types import SimpleNamespace

import pytest
import torch

from data import Sample
from metrics import expert_names
from scoring.router import expert_load, judge_router, show_load


def test_routers_are_judged_by_all_prompts_of_an_image_and_their_load_by_modality():
    even = [[1.0, 0, 0, 0]] * 2  # (L, E)
    rows = [
        (1, "CT", [0.4, 0.6, 0.0, 0.0], even),
        (1, "CT", [0.9, 0.1, 0.0, 0.0], even),  # with the other prompt of image 1: CT after all
        (2, "MRI", [0.0, 0.2, 0.0, 0.8], [[0.0, 3, 0, 0], [0, 1, 0, 2]]),  # taken for pathology
        (3, "", [0.0, 1.0, 0.0, 0.0], [even[0], [0.0] * 4]),  # every token dropped in block 2
        (None, "CT", [0.0, 1.0, 0.0, 0.0], even)]  # fmt: skip
    samples = [Sample("1", "test", "test", image, (), name) for image, name, _, _ in rows]
    predictions = [SimpleNamespace(votes=torch.tensor(votes), load=torch.tensor(load))
                   for _, _, votes, load in rows]  # fmt: skip
    found = judge_router(samples, predictions)
    assert found["n"] == 2 and found["accuracy"] == 0.5
    assert found["confusion"][0][0] == 1 and found["confusion"][1][3] == 1
    load = expert_load(samples, predictions)
    assert load["CT"] == even and load["unknown"] == [even[0], [0] * 4]
    assert load["MRI"][0] == [0, 1, 0, 0]
    assert load["MRI"][1] == pytest.approx([0, 1 / 3, 0, 2 / 3])
    lines = show_load(load, expert_names(4), [0, 2]).splitlines()[1:]
    assert lines[5].split() == ["block", "2", "MRI", "0.0%", "33.3%", "0.0%", "66.7%"]
    assert judge_router(samples, [SimpleNamespace(votes=torch.tensor([]))] * 5)["n"] == 0  # dense
