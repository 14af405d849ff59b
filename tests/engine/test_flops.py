"""FLOPs of a step are those that torch counts as it runs."""

from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ops
from config import PHASES, RELEASED_EXTRA
from engine import flops
from engine.lora import add_lora
from engine.run import Run
from model import freeze_all_but
from tests.conftest import FAMILIES
from tests.test_model import ROWS

PAPER = {"router": "modality"}


@pytest.fixture(autouse=True)
def one_matmul_per_expert(monkeypatch):
    """torch counts no grouped matmul; the loop that defines it is counted."""
    monkeypatch.setattr(ops, "_has_grouped_mm", Mock(return_value=False))


def prepared(build, family, moe, trains):
    model = build(family, moe)
    if "decoder.*.lora_?" in trains:
        add_lora(model, 3, 3)
    if family == "llama":
        model.decoder.lm_head.weight = model.decoder.embed.weight  # tied
    freeze_all_but(model, trains)
    return model


def attention(q, k, *_, **__):
    """q (B, H, T, K) k' and the weights times v, 2 FLOPs for every product and sum."""
    return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def torchs(model, batch):
    """What torch counts of one micro-batch, forward and backward -> FLOPs, the outputs."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # it does not know this
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        out = model.loss(batch)
        out.total.backward()
    return counter.get_total_flops(), out


def ours(model, batch, out):
    """The costs times what Run.count counts of one micro-batch."""
    layers = sum(block.is_sparse for block in model.decoder.blocks)
    run = object.__new__(Run)
    run.load_shape = layers, model.config.moe.n_experts if layers else 0
    run.begin_step()
    run.count(batch, out)
    *costs, routed = flops.model_flops(model)
    numbers = *run.counts.tolist(), *run.routed.sum(dim=1).tolist()
    return sum(n * c for n, c in zip(numbers, (*costs, *routed), strict=True))


@FAMILIES
@pytest.mark.parametrize(("moe", "trains"), [
    (None, PHASES[1].trains), (None, (*PHASES[2].trains, "vision.*")),
    (PAPER, PHASES[3].trains), (PAPER, PHASES[3].trains + RELEASED_EXTRA),
    (PAPER, ("decoder.*.lora_?",)), ({"layers": (1,), "residual": True}, PHASES[3].trains),
    ({"router": "topk", "level": "sequence", "top_k": 1}, ("decoder.*.mlp.*",)),
    ({"layers": (0, 1, 2), "top_k": 4, "n_experts": 5}, PHASES[3].trains)])  # fmt: skip
def test_they_are_what_torch_counts_whatever_is_trained(build, collate, family, moe, trains):
    model = prepared(build, family, moe, trains)
    batch = collate(ROWS[:1] * 2)  # of equal lengths: nothing is padded
    counted, out = torchs(model, batch)
    assert ours(model, batch, out) == counted > 1e6


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_padding_is_not_useful_work(build, collate, phase):
    model = prepared(build, "stablelm", PAPER if phase == 3 else None, PHASES[phase].trains)
    samples = ROWS[: 3 if phase > 1 else 2]  # phase 1 has nothing to learn without an image
    alone = [torchs(model, collate([s]))[0] for s in samples]
    counted, out = torchs(model, collate(samples))
    assert ours(model, collate(samples), out) == sum(alone) < counted
