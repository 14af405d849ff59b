"""FLOPs of a step are those that torch counts as it runs."""

from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ops
import train
from config import IGNORE, IMAGE_ID, TrainConfig
from engine import flops
from engine.features import cache_features
from engine.lora import add_lora
from engine.run import Run
from model import freeze_all_but

IMAGE = [IMAGE_ID] * 4
SAMPLES = [
    ([5, *IMAGE, 6, 7, 8, 9, 10], [IGNORE] * 8 + [9, 10]),
    ([*IMAGE, 11, 12, 13], [IGNORE] * 4 + [11, 12, 13]),
    ([14, 15, 16, 17, 18], [IGNORE, 15, 16, 17, 18]),
]
PAPER = {"router": "modality"}


@pytest.fixture(autouse=True)
def one_matmul_per_expert(monkeypatch):
    """torch counts no grouped matmul; the loop that defines it is counted."""
    monkeypatch.setattr(ops, "_has_grouped_mm", Mock(return_value=False))


def prepared(build, family, phase, moe=None, **flags):
    model = build(family, moe)
    freeze_all_but(model, train.trained_patterns(TrainConfig(**flags), phase, model.config))
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


@pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
@pytest.mark.parametrize(
    ("phase", "moe", "flags"),
    [
        (1, None, {}), (1, None, {"tune_vision": True}),
        (2, None, {}), (2, None, {"tune_vision": True}),
        (3, PAPER, {}), (3, PAPER, {"trains": "released"}), (3, {"router": "topk"}, {}),
        (3, {"router": "topk", "level": "sequence", "top_k": 1}, {}),
        (3, {"layers": (0, 1, 2), "top_k": 4, "n_experts": 5}, {}),
        (3, {"layers": (1,), "residual": True}, {}),
    ],
)  # fmt: skip
def test_they_are_what_torch_counts_in_every_phase(build, collate, family, phase, moe, flags):
    model = prepared(build, family, phase, moe, **flags)
    batch = collate(SAMPLES[:1] * 2)  # of equal lengths: nothing is padded
    counted, out = torchs(model, batch)
    assert ours(model, batch, out) == counted > 1e6


@pytest.mark.parametrize("family", ["phi", "stablelm", "tied"])
@pytest.mark.parametrize("trains", ["decoder.*", "decoder.embed.*", "decoder.blocks.*.attn.*",
                                    "vision.positions"])  # fmt: skip
def test_they_are_what_torch_counts_whatever_is_trained(build, collate, family, trains):
    model, batch = build("llama" if family == "tied" else family), collate(SAMPLES[:1])
    if family == "tied":
        model.decoder.lm_head.weight = model.decoder.embed.weight
    freeze_all_but(model, (trains,))
    counted, out = torchs(model, batch)
    assert ours(model, batch, out) == counted > 5e5


def test_features_that_are_kept_cost_nothing(build):
    model = prepared(build, "phi", 2)
    before = flops.model_flops(model)
    cache_features(model, TrainConfig(cache_features=True), 1)
    assert before.image > 1e5 and flops.model_flops(model) == before._replace(image=0)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_padding_is_not_useful_work(build, collate, phase):
    model = prepared(build, "stablelm", phase, PAPER if phase == 3 else None)
    samples = SAMPLES[: 3 if phase > 1 else 2]  # phase 1 has nothing to learn without an image
    alone = [torchs(model, collate([s]))[0] for s in samples]
    counted, out = torchs(model, collate(samples))
    assert ours(model, collate(samples), out) == sum(alone) < counted


def test_routed_tokens_are_counted_one_by_one(build, collate):
    model, batch = prepared(build, "phi", 3, PAPER), collate(SAMPLES)
    routed, out = flops.model_flops(model).routed, model.loss(batch)
    fewer = [r._replace(gates=r.gates.clone()) for r in out.routings]
    b, t, e = fewer[1].gates.nonzero()[0]
    fewer[1].gates[b, t, e] = 0
    saved = ours(model, batch, out) - ours(model, batch, out._replace(routings=fewer))
    assert saved == routed[1] == 3 * 2 * 2 * 32 * 64  # forward, and backward to both; two layers
    assert routed[0] == routed[1] * 5 // 6  # nothing that is trained lies before block 0's


def test_lora_is_trained_and_what_it_adds_to_is_not(build):
    model = prepared(build, "phi", 3, PAPER)
    add_lora(model, 3, 3)
    freeze_all_but(model, ("decoder.*.lora_?",))
    fc1, fc2 = 3 * (32 + 64), 3 * (64 + 32)  # parameters of A and B
    weights, first = 2 * 32 * 64, 3 * 32  # of W; A of block 0's fc1, whose input needs no gradient
    routed = flops.model_flops(model).routed
    assert routed[1] == 2 * (3 * (fc1 + fc2) + 2 * weights)
    assert routed[0] == routed[1] - 2 * (first + 32 * 64)


def test_the_machines_rate_is_the_median_of_large_matmuls(monkeypatch):
    clock, done = [0.0], []

    def matmul(a, b):
        clock[0] += 0.01 * len(done) or 5.0  # the first one warms up
        done.append((a.shape, b.shape, a.dtype, b.dtype))

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    before = torch.get_rng_state()
    rate = flops.matmul_rate.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert rate == pytest.approx(2 * 1024**3 / 0.045)
    assert clock[0] == pytest.approx(5.36)  # 0.01 + .. + 0.08 s
    assert {*done} == {((1024, 1024), (1024, 1024), torch.bfloat16, torch.bfloat16)}
    assert torch.equal(torch.get_rng_state(), before)  # the run's own generator is left as it is
