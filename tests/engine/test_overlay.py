"""The experts of one answer: as a table, and as the image with its patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import IMAGE_ID, MoEConfig
from engine.overlay import COLOURS, Routes, Token, draw_patches, overlay
from model import Generated
from routers import Routing


def test_the_table_counts_the_experts_of_tokens_block_by_block():
    ids = torch.tensor([[1, IMAGE_ID, IMAGE_ID, 2]])
    gates = torch.tensor([[[0.5, 0.5, 0], [0, 1, 0], [0.2, 0.8, 0], [0, 0, 0.7]]])
    first = [Routing(gates, None), Routing(0 * gates, None)]
    later = [Routing(torch.tensor([[[0.1, 0, 0.2]]]), None)] * 2
    steps = [Generated(torch.tensor([i]), r) for i, r in ((0, first), (9, later))]
    config = SimpleNamespace(moe=MoEConfig(n_experts=3, router="topk", layers=(4, 6)))
    text = SimpleNamespace(decode=lambda ids: f"w{ids[0]}")
    routes = Routes(config, SimpleNamespace(ids=ids), steps)
    assert routes.table(text).split("\n") == ["",
        "experts             expert 0  expert 1  expert 2",
        "  block 4  image       33.3%     66.7%      0.0%",
        "  block 4  question    33.3%     33.3%     33.3%",
        "  block 6  image        0.0%      0.0%      0.0%",
        "  block 6  question     0.0%      0.0%      0.0%",
        "  answer 'w0'           block 4: expert 0+expert 2  block 6: expert 0+expert 2",
        ""]  # fmt: skip


def test_a_patch_is_tinted_by_its_first_expert_the_more_the_larger_the_gate():
    gates = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.0, 0.0], [0.0, 1.0]])
    tile = np.asarray(draw_patches(torch.full((3, 32, 32), 255, dtype=torch.uint8), gates))
    for (y, x), expert, gate in (((0, 0), 0, 0.9), ((0, 1), 1, 0.6), ((1, 1), 1, 1.0)):
        opacity = 0.15 + 0.4 * gate
        mixed = [255 + opacity * (c - 255) for c in bytes.fromhex(COLOURS[expert][1:])]
        assert tile[168 * y + 9, 168 * x + 9] == pytest.approx(mixed, abs=2)
    assert (tile[177, 9] == 255).all() and (tile[168:, :168] == 0).any()  # only "-" is on it


def test_the_picture_has_the_tokens_tinted_like_patches():
    black, gates = torch.zeros(3, 32, 32).byte(), torch.tensor([[0.9, 0.1]] * 4)
    page = np.asarray(overlay(black, [gates], [0], ["a", "b"], [[Token("no\n", 1, 1.0)]]), int)
    mixed = [255 + 0.55 * (c - 255) for c in bytes.fromhex(COLOURS[1][1:])]
    assert page.shape[1] == 2 * (336 + 8) + 8 and (abs(page - mixed).max(-1) < 3).sum() > 100
