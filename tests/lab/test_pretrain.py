"""The maker of assets/tiny."""

import math

import pytest
import torch

from config import preset
from engine.published import load_published
from lab import pretrain_tiny
from model import MedMoE


def test_the_contrastive_loss_is_cross_entropy_and_the_same_captions_share_the_target():
    loss, logits = pretrain_tiny.contrastive_loss, torch.full((3, 3), -50.0).fill_diagonal_(50.0)
    assert loss(logits, ["a", "b", "c"]).item() < 1e-6
    assert loss(torch.zeros(3, 3), ["a", "b", "c"]).item() == pytest.approx(math.log(3))
    logits[0, 1] = logits[1, 0] = 50.0
    assert loss(logits, ["a", "a", "c"]).item() == pytest.approx(2 / 3 * math.log(2))  # its least


def test_it_writes_what_the_loader_of_real_weights_reads(tmp_path):
    pretrain_tiny.main(["--data", "phantoms:24", "--clip-steps", "1", "--lm-steps", "1",
                        "--batch-size", "8", "--out", str(tmp_path)])  # fmt: skip
    for name, family in (("tiny", "phi"), ("tiny-stablelm", "stablelm")):
        config = preset(name).model
        model = MedMoE(config)
        for param in model.parameters():
            param.data.fill_(float("nan"))
        load_published(model, config, tmp_path / "clip", tmp_path / family)
        filled = [n for n, p in model.named_parameters() if not p.isnan().any()]
        assert filled == [n for n, _ in model.named_parameters() if not n.startswith("projector.")]
