"""What Med-MoE and dense controls cost: the formulas against models that are built."""

import json

import pytest
import torch

from config import MoEConfig, preset
from engine.flops import model_flops
from engine.inference import FusedAttention
from lab import cost, counts
from lab.counts import VARIANTS
from model import count_parameters

SIZES = ("phi2", "stablelm2", "smollm2", "tiny", "tiny-stablelm", "mid")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("key", VARIANTS)
def test_the_formula_is_the_count_of_the_model_built_on_meta(name, key):
    config, variant = counts.dimensions(name), VARIANTS[key]
    model = counts.build(config, variant, "meta")
    found = counts.parameters(config, variant)
    assert found["total"] == sum(p.numel() for p in model.parameters())
    built = count_parameters(model)
    assert {k: found[k] for k in ("total", "activated")} == {
        k: built[k] for k in ("total", "activated")
    }
    assert found["touched"] == found["total"]  # tokens that are routed one by one reach all


@pytest.mark.parametrize("name", ("phi2", "stablelm2"))
def test_the_dense_controls_have_as_many_parameters_but_for_routers_and_output_biases(name):
    config = counts.dimensions(name)
    of = {key: counts.parameters(config, variant) for key, variant in VARIANTS.items()}
    d = config.decoder
    n_sparse = (d.n_layers + 1) // 2
    router = 4 * (d.d_model + 1)
    bias = d.d_model if d.family == "phi" else 0  # of the output layer, which a wide FFN has once
    assert of["medmoe"]["activated"] - of["wide-3"]["total"] == n_sparse * (router + 2 * bias)
    assert of["medmoe"]["total"] - of["wide-5"]["total"] == n_sparse * (router + 4 * bias)
    assert of["medmoe"]["activated"] - of["top-1"]["activated"] == n_sparse * counts.ffn_size(
        config
    )
    assert of["top-1"]["activated"] == of["no-meta"]["activated"]


def test_flops_of_one_question_are_those_of_the_engine(monkeypatch):
    """A batch of one prompt in a tiny model, counted from what its router decided."""
    config = preset("tiny").model
    batch = cost.batches("tiny", torch.device("cpu"))["1"]
    n_text = int(batch.mask.sum()) - config.vision.n_patches
    for key, variant in VARIANTS.items():
        model = counts.build(config, variant).requires_grad_(False)
        _, routings = model(batch.ids, batch.mask, batch.images)
        c, n, p = model_flops(model), int(batch.mask.sum()), config.vision.n_patches
        expected = c.image + p * c.patch + c.sample + n * c.position + n * n * c.pair + c.answer
        routed = [int((r.gates != 0).sum()) for r in routings]
        expected += sum(n * cost for n, cost in zip(routed, c.routed, strict=True))
        assert counts.flops(config, variant, n_text, 16)["prefill"] == expected, key


def test_three_denominators():
    found = counts.count("stablelm2")
    row, dense = found["medmoe"], found["dense"]["total"]
    assert row["share"] == {"own total": row["activated"] / row["total"],
                            "dense base": row["activated"] / dense,
                            "7 B": row["activated"] / 7e9}  # fmt: skip
    assert found["dense"]["share"]["dense base"] == 1
    text = counts.show_counts("stablelm2", found)
    assert f"{row['share']['7 B']:.2%}" in text and len(text.splitlines()) == 2 + len(VARIANTS)


def test_a_token_costs_what_is_activated():
    """Two FLOPs a parameter that it passes, and attention over what came before."""
    config = counts.dimensions("phi2")
    d, v = config.decoder, config.vision
    for variant in VARIANTS.values():
        outside = counts.parameters(config, counts.VARIANTS["dense"])["total"] - decoder(config)
        through = counts.parameters(config, variant)["activated"] - outside
        through -= d.vocab_size * d.d_model  # the embedding is looked up
        length = v.n_patches + counts.PROMPT + (counts.ANSWER + 1) / 2
        attended = 4 * d.n_layers * length * d.d_model
        found = counts.flops(config, variant, counts.PROMPT, counts.ANSWER)["token"]
        assert found == pytest.approx(2 * through + attended, rel=0.002)  # biases and norms


def decoder(config):
    model = counts.build(config, VARIANTS["dense"], "meta")
    return sum(p.numel() for p in model.decoder.parameters())


def test_variants_are_timed_interleaved_and_compared_in_their_own_round(monkeypatch):
    """A clock that each call moves by what its variant takes, more in every round."""
    clock, calls = [0.0], []
    times = {key: 1.0 + i for i, key in enumerate(VARIANTS)}
    monkeypatch.setattr(cost, "ready", lambda name, key, *rest: key)
    monkeypatch.setattr(cost, "trainable", lambda name, key, *rest: key)
    monkeypatch.setattr(cost, "batches", lambda *rest: {"1": 1, "8": 8, "train": 0})
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def answer(key, batch, dtype):
        calls.append(key)
        slow = 1 + calls.count(key) / 10
        return slow * times[key], slow * times[key] * batch

    def stepper(key, loss, dtype):
        def step(batch):
            clock[0] += times[key]

        return step

    monkeypatch.setattr(cost, "answer", answer)
    monkeypatch.setattr(cost, "stepper", stepper)
    found = cost.measure("tiny", cost.CostConfig(rounds=3, device="cpu", dtype="float32"))
    assert calls[:4] == ["dense", "dense", "medmoe", "medmoe"] and len(calls) == 4 * 2 * 6
    for i, key in enumerate(VARIANTS):
        for row in found[key].values():
            assert row["ratio"]["median"] == pytest.approx(1.0 + i)
        assert found[key]["training step"]["ms"]["median"] == pytest.approx(1000 * times[key])


@pytest.mark.parametrize("key", VARIANTS)
def test_what_is_timed_is_a_model_that_answers_and_one_that_learns(key):
    cpu, batches = torch.device("cpu"), cost.batches("tiny", torch.device("cpu"))
    model = cost.ready("tiny", key, cpu, torch.bfloat16)
    assert all(isinstance(block.attn, FusedAttention) for block in model.decoder.blocks)
    assert not any(p.requires_grad for p in model.parameters())
    assert min(cost.answer(model, batches["8"], torch.bfloat16)) > 0
    model = cost.trainable("tiny", key, cpu)
    step = cost.stepper(model, lambda b: cost.mean_loss(model, b), torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(batches["train"])
    learned = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert learned and learned <= {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.split(".")[:2] == ["decoder", "blocks"] and ".mlp." in n for n in learned)


def test_experts_that_a_question_touches(tmp_path, monkeypatch):
    """Counted for a random model of two sparse layers, routed by token and by sample."""
    model = counts.build(preset("tiny").model, counts.Variant("", MoEConfig(router="topk")))
    from data import Text

    text = Text(preset("tiny").llm)

    def load(*rest, level):
        for block in model.decoder.blocks[::2]:
            block.mlp.router.level = level
        return model.eval(), text, {}

    monkeypatch.setattr(cost, "load_model", load)
    flags = cost.CostConfig(device="cpu", dtype="float32")
    found = cost.touched(tmp_path, flags, n=3)
    assert found["sequence"] == {"prompt": 2, "answer": 2, "token": 2}
    assert found["token"]["token"] == 2 and 2 < found["token"]["prompt"] <= 4
    assert found["token"]["prompt"] <= found["token"]["answer"] <= 4


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    flags = cost.CostConfig(device="cpu", dtype="float32")
    monkey = {key: VARIANTS[key] for key in ("dense", "wide-5")}
    before = dict(VARIANTS)
    try:
        VARIANTS.clear()
        VARIANTS.update(monkey)
        found = cost.measure_memory("mid", flags)
    finally:
        VARIANTS.clear()
        VARIANTS.update(before)
    config = counts.dimensions("mid")
    weights = {k: 4 * counts.parameters(config, v)["total"] for k, v in monkey.items()}
    for key, row in found.items():
        assert row["answer"] > 0.9 * weights[key]
    assert found["wide-5"]["training step"] > found["dense"]["training step"]
    json.dumps(found)
