"""A correct submission, and a budget so small that it is scored in seconds."""

from dataclasses import asdict

import pytest

from config import PRESETS
from course import judge, score
from tests.mini import mini

GOOD = '''"""Submitted."""
import torch
from routers import Router, top_k_gates


class Mine(Router):
    """The likeliest experts."""

    sums_to_one = True

    def gate(self, logits, mask, x):
        # top-k
        return top_k_gates(logits.softmax(dim=-1), self.top_k)
'''
BUDGET = score.Budget(preset="mini", base_images=8, base_steps=2, train_images=8, steps=2, signs=16,
                      batch_size=4, lr=1e-2, eval_images=3)  # fmt: skip
JOB = asdict(BUDGET) | {"class": "Mine", "seed": 1, "where": "mine.py",
                        "data": "phantoms:8+10000/16"}  # fmt: skip


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
    """The common checkpoint of a model of 30 000 parameters; course.score then uses BUDGET."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(folder / "mini"))
        patch.setattr(score, "BUDGET", BUDGET)
        patch.setattr(judge, "CONTRACT", folder / "absent.py")
        yield score.make_base(BUDGET, folder)
