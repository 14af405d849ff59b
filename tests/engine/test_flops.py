"""FLOPs of a step are those that torch counts as it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ops
import train
from config import IGNORE, IMAGE_ID, TrainConfig
from engine.flops import matmul_rate, model_flops
from engine.run import Run
from model import freeze_all_but

IMAGE = [IMAGE_ID] * 4
SAMPLES = [
    ([5, *IMAGE, 6, 7, 8, 9, 10], [IGNORE] * 8 + [9, 10]),
    ([*IMAGE, 11, 12, 13], [IGNORE] * 4 + [11, 12, 13]),
    ([14, 15, 16, 17, 18], [IGNORE, 15, 16, 17, 18]),
]
DENSE, PAPER = None, {"router": "modality"}


@pytest.fixture(autouse=True)
def one_matmul_an_expert(monkeypatch):
    """torch counts no grouped matmul; the loop that defines it is counted."""
    monkeypatch.setattr(ops, "_has_grouped_mm", lambda *_: False)


def prepared(build, family, phase, moe=DENSE, **flags):
    model = build(family, moe)
    freeze_all_but(model, train.trained_patterns(TrainConfig(**flags), phase, model.config))
    return model


def attention(q, k, *_, **__):
    """q (B, H, T, K) k' and the weights times v, 2 FLOPs for every product and sum."""
    return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def both(model, batch):
    """(what torch counts, what we count) of one micro-batch, forward and backward."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # it does not know this
    with FlopCounterMode(display=False, custom_mapping={fused: attention}) as counter:
        out = model.loss(batch)
        out.total.backward()
    return counter.get_total_flops(), total(model, batch, out)


def total(model, batch, out):
    """The costs times what Run.count counts of one micro-batch."""
    layers = [block for block in model.decoder.blocks if block.is_sparse]
    run = object.__new__(Run)
    run.load_shape = len(layers), model.config.moe.n_experts if layers else 0
    run.begin_step()
    run.count(batch, out)
    *costs, routed = model_flops(model)
    numbers = *run.counts.tolist(), *run.routed.sum(dim=1).tolist()
    return sum(n * c for n, c in zip(numbers, (*costs, *routed), strict=True))


@pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
@pytest.mark.parametrize(
    ("phase", "moe", "flags"),
    [
        (1, DENSE, {}),
        (1, DENSE, {"tune_vision": True}),
        (2, DENSE, {}),
        (2, DENSE, {"tune_vision": True}),
        (3, PAPER, {}),
        (3, PAPER, {"trains": "released"}),
        (3, {"router": "topk"}, {}),
        (3, {"router": "topk", "level": "sequence", "top_k": 1}, {}),
        (3, {"layers": (0, 1, 2), "top_k": 4, "n_experts": 5}, {}),
        (3, {"layers": (1,), "residual": True}, {}),
    ],
)
def test_they_are_what_torch_counts_in_every_phase(build, collate, family, phase, moe, flags):
    model = prepared(build, family, phase, moe, **flags)
    batch = collate(SAMPLES[:1] * 2)  # of equal lengths: nothing is padded
    torchs, ours = both(model, batch)
    assert ours == torchs > 1e6


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize(
    "trains", ["decoder.*", "decoder.embed.*", "decoder.blocks.*.attn.*", "decoder.lm_head.*"]
)
def test_they_are_what_torch_counts_whatever_of_the_decoder_is_trained(
    build, collate, family, trains
):
    model = build(family)
    freeze_all_but(model, (trains,))
    torchs, ours = both(model, collate(SAMPLES[:1]))
    assert ours == torchs > 5e5


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_padding_is_not_useful_work(build, collate, phase):
    model = prepared(build, "stablelm", phase, PAPER if phase == 3 else DENSE)
    samples = SAMPLES[: 3 if phase > 1 else 2]  # phase 1 has nothing to learn without an image
    alone = [both(model, collate([s])) for s in samples]
    torchs, ours = both(model, collate(samples))
    assert ours == sum(n for n, _ in alone) < torchs


def test_routed_tokens_are_counted_one_by_one(build, collate):
    model = prepared(build, "phi", 3, PAPER)
    batch = collate(SAMPLES)
    costs, out = model_flops(model), model.loss(batch)
    fewer = [r._replace(gates=r.gates.clone()) for r in out.routings]
    b, t, e = fewer[1].gates.nonzero()[0]
    fewer[1].gates[b, t, e] = 0
    saved = total(model, batch, out) - total(model, batch, out._replace(routings=fewer))
    config = model.config.decoder
    assert saved == costs.routed[1] == 3 * 2 * 2 * config.d_model * config.d_ff
    assert costs.routed[0] == costs.routed[1] * 5 // 6  # nothing trained lies before block 0's


def test_low_rank_additions_are_trained_and_what_they_add_to_is_not(build):
    model = prepared(build, "phi", 3, PAPER)
    layer = model.decoder.blocks[0].mlp.meta.fc1
    width, hidden = layer.in_features, layer.out_features
    before = model_flops(model).position
    layer.requires_grad_(False)
    layer.a = torch.nn.Parameter(torch.zeros(3, width))
    layer.b = torch.nn.Parameter(torch.zeros(hidden, 3))
    # Block 0's input needs no gradient, what a makes of it does.
    added = 2 * 2 * 3 * width + 3 * 2 * 3 * hidden
    assert model_flops(model).position - before == added - 2 * width * hidden


def test_the_machines_rate_is_the_median_of_large_matmuls(monkeypatch):
    clock, done = [0.0], []

    def matmul(a, b):
        done.append((a.shape, b.shape, a.dtype, b.dtype))
        clock[0] += 5.0 if len(done) == 1 else (0.01, 0.02, 0.06)[len(done) % 3]

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    rate = matmul_rate.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert rate == pytest.approx(2 * 1024**3 / 0.02)
    assert clock[0] == pytest.approx(5.3, abs=0.07)  # seconds, the slow first one among them
    assert set(done) == {((1024, 1024), (1024, 1024), torch.bfloat16, torch.bfloat16)}
