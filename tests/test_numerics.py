"""What must not change the numbers does not: python -m pytest tests/test_numerics.py

The golden curve is made by: python -m tests.test_numerics
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from config import (
    ASSETS,
    IGNORE,
    PHASES,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    Recipe,
    TrainConfig,
    UserError,
    VisionConfig,
)
from data import Dataset, Text
from engine.inference import compile_blocks
from engine.run import checkpoint_blocks
from model import MedMoE, autocast, freeze_all_but, make_sparse
from moe import MLP, GatedMLP, upcycle
from ops import use_sorted_experts
from router_training import ffn_inputs
from routers import Hints, TopKRouter, load_balancing_loss
from sources.images import Images
from sources.load import load_samples
from tests.one_step import gradients, losses_of_steps, place

VISION = VisionConfig(image_size=32, patch_size=16, width=32, n_layers=3, n_heads=4, d_ff=64)
DECODER = DecoderConfig("phi", 1024, 32, 3, 4, 64, rotary_dim=4, max_len=128, dropout=0.1)
CURVE = Path(__file__).parent / "golden" / "curve.json"
ALL = PHASES[2].trains  # projector and decoder


def questions(config, kind="vqa"):
    samples = load_samples(("phantoms:64",), kind, "train")
    return Dataset(samples, Text(ASSETS / "phi"), config, False, Images(config.vision.image_size))


def prepared(phase=3, trains=ALL, dropout=0.1, **flags):
    """A small model of phase 2 or 3 as initialised, questions that it can read, and its flags."""
    torch.manual_seed(0)
    config = ModelConfig(VISION, DecoderConfig(**(vars(DECODER) | {"dropout": dropout})))
    model = MedMoE(config)
    if phase == 3:
        make_sparse(model, MoEConfig(router="topk"))
        for block in model.decoder.blocks[::2]:
            nn.init.normal_(block.mlp.router.proj.weight)  # far from logits that are all alike
            for param in block.mlp.experts.parameters():  # and from experts that are
                param.data += 0.1 * torch.randn_like(param)
    freeze_all_but(model, trains)
    flags = TrainConfig(phase=phase, device="cpu", **{"dtype": "float32", **flags})
    return model.train(), questions(config), flags


# Accumulation


@pytest.mark.parametrize("phase", [2, 3])
def test_accumulation_is_exact_in_the_number_of_supervised_tokens(phase, tmp_path, monkeypatch):
    """8 x 1 = 4 x 2 = 1 x 8, and 3 + 3 + 2, where micro-batches differ in labels and lengths."""
    plain, found, parts = Dataset.batch, [], []

    def in_fp64(data, rows):
        parts.append(rows)
        batch = plain(data, rows)
        return batch._replace(images=batch.images.double())

    monkeypatch.setattr(Dataset, "batch", in_fp64)
    short, long = (questions(ModelConfig(VISION, DECODER), k) for k in ("vqa", "instructions"))
    data, rows = short, [0, 1, 2, 3, 4, -1, -2, -3]
    data.samples, data.encoded = short.samples + long.samples, short.encoded + long.encoded
    lengths = [len(data.encoded[row][0]) for row in rows]
    n_supervised = [sum(label != IGNORE for label in data.encoded[row][1]) for row in rows]
    assert len(set(lengths)) > 3 and sum(n_supervised[4:]) > 2 * sum(n_supervised[:4])
    for accumulate in (1, 2, 8, 3):
        model, _, flags = prepared(phase, dropout=0.0, accumulate=accumulate)
        model.double()
        run = place(tmp_path, flags)
        loss, load = gradients(model, data, rows, flags, run)
        assert run.counts[3] == sum(lengths) and len(parts) == accumulate
        parts.clear()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss, grads, load))
    assert all(grad.abs().max() > 1e-6 for grad in found[0][1].values())
    for loss, grads, load in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=5e-6)  # cross-entropies are fp32
        torch.testing.assert_close(load, found[0][2], rtol=0, atol=1e-6)
        torch.testing.assert_close(grads, found[0][1], rtol=0, atol=1e-6)


# bf16


def test_training_in_bf16_stays_near_fp32(tmp_path):
    curves = []
    for dtype in ("float32", "bfloat16"):
        model, data, flags = prepared(steps=30, dtype=dtype)
        torch.manual_seed(1)
        with losses_of_steps() as losses:
            train.train(model, data, flags, Recipe(2e-3, 1, 4), place(tmp_path, flags))
        curves.append(torch.tensor(losses))
    drift = (curves[0] - curves[1]).abs()
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert 0 < drift.max() < 0.01  # 0.003 here


def test_routers_compute_in_fp32_whatever_the_matmuls_are_in():
    model, data, _ = prepared()
    batch, seen = data.batch(range(8)), []
    routers = [model.decoder.blocks[layer].mlp.router for layer in (0, 2)]
    for router in routers:
        router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with autocast(torch.device("cpu"), torch.bfloat16):
        routings = model.loss(batch).routings
    assert len(routings) == 2
    for router, x, routing in zip(routers, seen, routings, strict=True):
        logits = F.linear(x.float(), router.proj.weight, router.proj.bias)
        gates = router.gate(logits, batch.mask, x).masked_fill(~batch.mask[..., None], 0.0)
        assert routing.logits.dtype == routing.gates.dtype == torch.float32
        assert torch.equal(routing.logits, logits) and torch.equal(routing.gates, gates)


def test_a_choice_that_bf16_could_not_see_is_made():
    router = TopKRouter(4, 4, top_k=2)
    with torch.no_grad():
        router.proj.weight.copy_(torch.eye(4))
        router.proj.bias.zero_()
    x = torch.tensor([[[1.0, 1.001, 1.002, 1.003], [1.003, 1.002, 1.001, 1.0]]])
    assert len(x.bfloat16().unique()) == 1
    with torch.autocast("cpu", torch.bfloat16):
        gates = router(x, torch.ones(1, 2, dtype=torch.bool)).gates
    assert (gates[0] != 0).tolist() == [[False, False, True, True], [True, True, False, False]]


# What is no number


def poison(where, value, model, batch):
    """Put the value into a pixel, a weight or a gradient."""
    weight = model.projector.fc1.weight
    if where == "pixel":
        batch.images[0, 0, 0, 0] = value
    elif where == "weight":
        weight.data[0, 0] = value
    else:
        weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))


def state_of(model, optimizer):
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = [{k: t.clone() for k, t in state.items()} for state in optimizer.state.values()]
    return params, kept, [group["lr"] for group in optimizer.param_groups]


@contextmanager
def poisoned(at, where, value):
    """Poison batch `at` (from 1), and see that no step follows and that nothing has changed."""
    batch_of, loss_of, optimizers = Dataset.batch, MedMoE.loss, []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    noted = {"n": 0}

    def batch(data, rows):
        noted["ids"] = ", ".join(data.samples[row].id for row in rows)
        return batch_of(data, rows)

    def loss(model, batch):
        noted["n"] += 1
        if noted["n"] == at:
            poison(where, value, model, batch)
            noted["model"], noted["before"] = model, state_of(model, optimizers[-1])
        return loss_of(model, batch)

    Dataset.batch, MedMoE.loss = batch, loss
    try:
        yield noted
    finally:
        Dataset.batch, MedMoE.loss = batch_of, loss_of
        hook.remove()
    assert noted["n"] == at == len(optimizers) + 1
    after = state_of(noted["model"], optimizers[-1])
    torch.testing.assert_close(after, noted["before"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["pixel", "weight", "gradient"])
def test_a_number_that_is_none_stops_the_step_and_changes_nothing(where, value, tmp_path):
    model, data, flags = prepared(steps=5)
    with poisoned(3, where, value) as noted, pytest.raises(UserError) as stop:
        train.train(model, data, flags, Recipe(1e-3, 1, 8), place(tmp_path, flags))
    message = str(stop.value)
    assert "phase 3, step 2: " in message and "nothing was updated" in message
    assert message.endswith(noted["ids"])


def test_the_command_then_ends_in_one_line_and_exit_code_2(tmp_path, capsys):
    with poisoned(2, "pixel", math.nan) as noted, pytest.raises(SystemExit) as stop:
        train.main(["--data", "phantoms:16", "--out", str(tmp_path), "--batch-size", "4",
                    "--phase", "1", "--steps", "3", "--no-eval", "--dtype", "float32"])  # fmt: skip
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "phase 1, step 1: loss nan" in line and line.endswith(noted["ids"])
    assert not (tmp_path / "phase1").exists()


@pytest.mark.parametrize(
    ("dtype", "width", "library"),
    [(torch.float32, 16, True), (torch.bfloat16, 16, True), (torch.float32, 18, False),
     (torch.float64, 16, False)],
)  # fmt: skip
@pytest.mark.parametrize("family", [MLP, GatedMLP])
def test_a_broken_expert_without_tokens_breaks_nothing(family, dtype, width, library, monkeypatch):
    calls, found = [], []
    fast = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: (calls.append(1), fast(*a, **k))[1])
    for broken in (False, True):
        torch.manual_seed(2)
        router = TopKRouter(16, 4)
        nn.init.normal_(router.proj.weight)
        router.proj.bias.data[1] = -1e4
        layer = upcycle(family(16, width), router, 4, "released").to(dtype)
        use_sorted_experts(layer)
        if broken:
            for param in layer.experts.parameters():
                param.data[1] = math.nan
        x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
        y, routing = layer(x, torch.ones(2, 5, dtype=torch.bool), Hints())
        assert (routing.gates != 0).flatten(0, 1).any(0).tolist() == [True, False, True, True]
        (y.square().sum() + routing.logits.square().mean()).backward()
        grads = {n: p.grad for n, p in layer.named_parameters()}
        found.append({"y": y, "x": x.grad, **grads})
    assert bool(calls) == library
    assert all(t.isfinite().all() for t in found[1].values())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


# Activation checkpointing


def measured(model, batch):
    """One forward and backward -> numbers, gradients, routings, the generator, bytes kept."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.loss(batch)
        total = out.total + sum(load_balancing_loss(r, batch.mask) for r in out.routings)
    n_kept = sum(kept.values())
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": total, "generator": torch.get_rng_state(), "grads": grads,
            "routings": [tuple(r) for r in out.routings]}, n_kept  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("phase", "trains"), [(2, ALL), (3, ALL), (3, PHASES[3].trains)], ids=["2", "3, all", "3"]
)
def test_recomputing_changes_no_bit_and_keeps_less(phase, trains, dtype):
    model, data, _ = prepared(phase, trains)
    if phase == 3:  # a tie of three, of which two are chosen
        router = model.decoder.blocks[2].mlp.router.proj
        router.weight.data[1:] = router.weight.data[1]
        router.bias.data[1:] = router.bias.data[1]
    batch, found = data.batch(range(8)), []
    for recomputes in (False, True):
        if recomputes:
            checkpoint_blocks(model)
        with autocast(torch.device("cpu"), dtype):
            found.append(measured(model, batch))
    (plain, kept), (again, kept_again) = found
    assert plain["grads"] and kept_again < 0.5 * kept
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert phase == 2 or (plain["routings"][1][1].diff(dim=-1)[..., 1:] == 0).all()


def test_only_blocks_that_gradients_pass_are_computed_twice_and_only_in_training(tmp_path):
    model, data, flags = prepared(3, ("decoder.blocks.2.mlp.experts.*",))
    checkpoint_blocks(model)
    calls = [0, 0, 0]
    for i, block in enumerate(model.decoder.blocks):
        block.ln.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    gradients(model, data, [0, 1], flags, place(tmp_path, flags))
    assert calls == [1, 1, 2]
    model.eval()
    gradients(model, data, [0, 1], flags, place(tmp_path, flags))
    assert calls == [2, 2, 3]


# Compiled blocks


def compiled_losses(folder, steps, compiles, recompute=False, resume=False):
    """Of `steps` steps in phase 3, saved in the middle, or of those after it.

    Without dropout: compiled, its masks differ.
    """
    model, data, flags = prepared(
        dropout=0.0, steps=steps, save_every=steps // 2, resume=resume, keep=1
    )
    if recompute:
        checkpoint_blocks(model)
    names = [name for name, _ in model.named_parameters()]
    if compiles:
        compile_blocks(model)
    with losses_of_steps() as losses:
        train.train(model, data, flags, Recipe(2e-3, 1, 4), place(folder, flags))
    assert [name for name, _ in model.named_parameters()] == names
    return losses


def only_trace(monkeypatch):
    """Let torch.compile trace whole graphs and run them as they are; returns whose it traced."""
    really, traced = torch.compile, []

    def trace(function, **how):
        traced.append(type(function.__self__).__name__)
        return really(function, backend="eager", fullgraph=True, **how)

    monkeypatch.setattr(torch, "compile", trace)
    return traced


def test_every_graph_is_whole_says_the_same_and_goes_on_from_a_run_without(tmp_path, monkeypatch):
    """Traced, not yet compiled: pytest -m slow does that too."""
    plain = compiled_losses(tmp_path, 4, False)
    traced = only_trace(monkeypatch)
    same = compiled_losses(tmp_path, 4, True, resume=True)
    assert len(plain) == 4 and same == pytest.approx(plain[2:], abs=1e-5)
    assert traced[1:] == ["VisionBlock"] * 2 + ["Attention", "MLP", "PhiBlock", "Attention", "MLP"]


def test_what_teaches_the_router_looks_into_compiled_blocks(monkeypatch):
    model, data, _ = prepared(2)
    model.eval()
    batch, layers = data.batch(range(4)), range(0, 3, 2)
    plain = ffn_inputs(model, batch, layers)
    only_trace(monkeypatch)
    compile_blocks(model)
    assert torch.equal(ffn_inputs(model, batch, layers), plain)


def test_where_torch_cannot_compile_one_line_says_so(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"--compile: .* no working C"):
        compile_blocks(prepared()[0])


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_runs_go_on_with_and_without(tmp_path):
    whole = compiled_losses(tmp_path / "plain", 10, False)
    same = compiled_losses(tmp_path / "compiled", 10, True)
    assert len(whole) == 10 and same == pytest.approx(whole, abs=1e-5)
    again = compiled_losses(tmp_path / "recomputed", 10, True, recompute=True)
    assert again == pytest.approx(whole, abs=1e-5)
    for folder, compiles in (("plain", True), ("compiled", False)):
        rest = compiled_losses(tmp_path / folder, 10, compiles, resume=True)
        assert rest == pytest.approx(whole[5:], abs=1e-5)


# Curves


@pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
def test_an_untrained_model_knows_nothing(family):
    """Its loss is near that of guessing, ln V."""
    torch.manual_seed(0)
    config = ModelConfig(VISION, DecoderConfig(**(vars(DECODER) | {"family": family})))
    out = MedMoE(config).loss(questions(config).batch(range(16)))
    assert out.total.item() / out.n_tokens == pytest.approx(math.log(1024), abs=0.5)


@pytest.mark.parametrize(("phase", "lr", "end"), [(1, 1e-2, 0.5), (2, 1e-3, 1e-3), (3, 3e-3, 1e-3)])
def test_what_a_phase_trains_can_memorise_a_batch(phase, lr, end, tmp_path):
    """Phase 1 only in part: the decoder is as it was pretrained, and never saw an image."""
    flags = train.resolve(
        TrainConfig(phase=phase, router="topk", data=("phantoms:8",), dtype="float32", device="cpu")
    )
    torch.manual_seed(0)
    model, tokenizer, _ = train.initial_model(flags, None)
    if phase == 3:
        train.go_sparse(model, flags, {})
    freeze_all_but(model, PHASES[phase].trains)
    samples = load_samples(flags.data, PHASES[phase].task, "train")
    images = Images(model.config.vision.image_size, pad=phase != 1)
    data = Dataset(samples, Text(tokenizer), model.config, phase == 1, images)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    while len(losses) < 40 and (not losses or losses[-1] > end):
        rows = [0] if phase == 1 else [0, 1]
        losses.append(gradients(model, data, rows, flags, place(tmp_path, flags))[0])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 1 and losses[-1] < end


def curve():
    """The losses of 200 steps in which all that phases 2 and 3 train is trained at once."""
    model, data, flags = prepared(steps=200, balance=0.01, z_loss=1e-3)
    torch.manual_seed(1)
    with TemporaryDirectory() as folder, losses_of_steps() as losses:
        train.train(model, data, flags, Recipe(2e-3, 1, 8), place(Path(folder), flags))
    return losses


def test_training_follows_the_golden_curve():
    golden = json.loads(CURVE.read_text())
    assert len(golden["losses"]) == 200 and golden["losses"][-1] < 0.2 * golden["losses"][0]
    exact = golden["torch"] == torch.__version__.partition("+")[0]
    # 8e-6 apart with AVX2 instead of AVX-512, or from weights that differ by 1e-7.
    assert curve() == pytest.approx(golden["losses"], abs=1e-4 if exact else 1e-3, rel=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = {"torch": torch.__version__.partition("+")[0], "losses": curve()}
    CURVE.write_text(json.dumps(golden) + "\n")
    print(f"wrote {CURVE}")
