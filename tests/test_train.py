"""The loop, what each phase trains, and the command.

The golden curve is made by: python -m tests.test_train
"""

import io
import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from checkpoint import read_config, read_seen
from config import (
    ASSETS,
    IGNORE,
    PHASES,
    PRESETS,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    Recipe,
    TrainConfig,
    UserError,
    preset,
    to_dict,
)
from data import Batch, Dataset, Text
from engine.processes import ALONE, Processes
from model import Loss, MedMoE, freeze_all_but, make_sparse
from routers import Routing, load_balancing_loss, router_z_loss
from scoring import leaks
from sources.images import Images
from sources.load import load_samples
from sources.tensorfiles import open_tensors
from tests.conftest import VISION
from tests.mini import losses, mini, same, weights
from tests.one_step import gradients, losses_of_steps, place

DECODER = DecoderConfig("phi", 1024, 32, 3, 4, 64, rotary_dim=4, max_len=128, dropout=0.1)
CURVE = Path(__file__).parent / "golden" / "curve.json"


def questions(config, kind="vqa"):
    samples = load_samples(("phantoms:64",), kind, "train")
    return Dataset(samples, Text(ASSETS / "phi"), config, False, Images(config.vision.image_size))


def prepared(phase=3, dropout=0.1, **flags):
    """A small model of phase 2 or 3 as initialised, questions that it can read, and its flags."""
    torch.manual_seed(0)
    config = ModelConfig(VISION, replace(DECODER, dropout=dropout))
    model = MedMoE(config)
    if phase == 3:
        make_sparse(model, MoEConfig(router="topk"))
        for block in model.decoder.blocks[::2]:
            nn.init.normal_(block.mlp.router.proj.weight)  # far from logits that are all alike
            for param in block.mlp.experts.parameters():  # and from experts that are
                param.data += 0.1 * torch.randn_like(param)
    freeze_all_but(model, PHASES[2].trains)
    flags = TrainConfig(phase=phase, device="cpu", **{"dtype": "float32", **flags})
    return model.train(), questions(config), flags


# What each phase trains

FFN = {"tiny": ("fc1", "fc2"), "tiny-stablelm": ("gate", "up", "down")}
PROJECTOR = {f"projector.{fc}.{key}" for fc in ("fc1", "fc2") for key in ("weight", "bias")}


def trained(name: str, number: int, **flags) -> set[str]:
    flags = TrainConfig(preset=name, **flags)
    model = MedMoE(preset(name).model)
    if number == 3 and flags.experts:
        make_sparse(model, train.sparse_config(flags, model.config))
    freeze_all_but(model, train.trained_patterns(flags, number, model.config))
    return {name for name, param in model.named_parameters() if param.requires_grad}


def ffn(name: str, layers, prefix="") -> set[str]:
    """FFN parameter names as this test spells them out, for these blocks."""
    keys = ("weight", "bias") if name == "tiny" else ("weight",)
    places = [f"decoder.blocks.{i}.mlp.{prefix}" for i in layers]
    return {f"{place}{part}.{key}" for place in places for part in FFN[name] for key in keys}


@pytest.mark.parametrize("name", FFN)
def test_each_phase_trains_exactly_its_parameters(name):
    assert trained(name, 1) == PROJECTOR
    every = {n for n, _ in MedMoE(preset(name).model).named_parameters()}
    tower = {n for n in every if n.startswith("vision.")}
    assert tower and trained(name, 2) == every - tower
    assert trained(name, 2, tune_vision=True) == every
    assert trained(name, 1, tune_vision=True) == PROJECTOR | tower
    experts, meta = (ffn(name, (0, 2), f"{part}.") for part in ("experts", "meta"))
    assert trained(name, 3) == trained(name, 3, tune_vision=True) == experts | meta
    assert trained(name, 3, meta=False) == experts
    released = experts | meta | PROJECTOR | ffn(name, (1, 3))
    assert trained(name, 3, trains="released") == released
    router = {f"decoder.blocks.{i}.mlp.router.proj.{k}" for i in (0, 2) for k in ("weight", "bias")}
    assert trained(name, 3, router="topk") == experts | meta | router
    assert trained(name, 3, router="random") == trained(name, 3, router="oracle") == experts | meta
    assert trained(name, 3, experts=0, moe_layers="1,2") == ffn(name, (1, 2))
    lora = train.trained_patterns(TrainConfig(lora_rank=2), 2, preset(name).model)
    assert "decoder.*" not in lora and any("lora" in pattern for pattern in lora)


def test_the_summary_of_parameters_has_one_line_for_each_family():
    model = MedMoE(ModelConfig(VISION, DECODER))
    freeze_all_but(model, ("projector.*", "decoder.*.ln.*"))
    rows = [line.split() for line in train.describe(model).splitlines()]
    names = ["decoder.blocks.*.ln", "projector.fc1", "projector.fc2", "decoder.blocks.*.attn",
             "decoder.blocks.*.mlp", "decoder.embed", "decoder.lm_head", "decoder.ln_f",
             "vision"]  # fmt: skip
    assert [row[:2] for row in rows] == [["trains" if i < 3 else "frozen", name]
                                         for i, name in enumerate(names)]  # fmt: skip
    n = [int(row[2].replace(",", "")) for row in rows]
    assert n[0] == 3 * 2 * 32 and n[5] == 1024 * 32
    assert sum(n) == sum(p.numel() for p in model.parameters())


# The loop


def test_the_learning_rate_warms_up_over_3_percent_and_falls_to_zero_as_a_cosine():
    found = [train.lr_scale(step, 103) for step in (0, 1, 2, 3, 28, 53, 103)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    assert train.lr_scale(0, 50) == 0.5 and train.lr_scale(0, 1) == train.lr_scale(1, 1) == 1.0


def test_router_losses_are_weighted_and_a_mean_over_the_layers():
    mask = torch.tensor([[True, True, False]])
    torch.manual_seed(0)
    routings = [Routing(torch.rand(1, 3, 4), torch.randn(1, 3, 4), p) for p in (0.25, 0.5)]
    flags, out = TrainConfig(balance=0.1, z_loss=0.3), Loss(torch.zeros(()), 1, routings)
    by_hand = [
        r.penalty + 0.1 * load_balancing_loss(r, mask) + 0.3 * router_z_loss(r, mask)
        for r in routings
    ]
    assert train.router_losses(out, mask, flags) == pytest.approx(float(sum(by_hand)) / 2)
    assert train.router_losses(out, mask, TrainConfig()) == 0.375
    assert train.router_losses(out._replace(routings=[]), mask, flags) == 0


@pytest.mark.parametrize(
    ("rank", "world", "wanted"),
    [(0, 1, [[0, 1, 2], [3, 4, 5], [6]]), (0, 2, [[0, 2], [3, 5], [6]]),
     (1, 2, [[1], [4], [6]])],  # another process's sample, without labels
)  # fmt: skip
def test_a_step_is_split_into_micro_batches_and_these_among_processes(rank, world, wanted):
    def batch(rows):
        labels = torch.tensor(rows)[:, None]
        return Batch(labels, labels > -1, labels.clone(), None, None)

    run = SimpleNamespace(rank=rank, world=world)
    found = train.micro_batches(SimpleNamespace(batch=batch), list(range(7)), 3, run)
    assert [b.ids.flatten().tolist() for b in found] == wanted
    has_labels = [(b.labels != IGNORE).all().item() for b in found]
    assert has_labels == [True, True, rank == 0]


@pytest.mark.parametrize("phase", [2, 3])
def test_accumulation_is_exact_in_the_number_of_supervised_tokens(phase, tmp_path):
    """8 x 1 = 4 x 2 = 1 x 8, and 3 + 3 + 2, where micro-batches differ in labels and lengths."""
    data, long = (questions(ModelConfig(VISION, DECODER), k) for k in ("vqa", "instructions"))
    data.samples, data.encoded = data.samples + long.samples, data.encoded + long.encoded
    rows, found, parts, batch = [0, 1, 2, 3, 4, -1, -2, -3], [], [], data.batch
    n_supervised = [sum(label != IGNORE for label in data.encoded[row][1]) for row in rows]
    assert sum(n_supervised[4:]) > 2 * sum(n_supervised[:4])

    def in_fp64(rows):
        parts.append(rows)
        return (of := batch(rows))._replace(images=of.images.double())

    data.batch = in_fp64
    for accumulate in (1, 2, 8, 3):
        model, _, flags = prepared(phase, dropout=0.0, accumulate=accumulate)
        run = place(tmp_path, flags)
        loss, load = gradients(model.double(), data, rows, flags, run)
        assert run.counts[3] == sum(len(data.encoded[row][0]) for row in rows)
        assert len(parts) == accumulate
        parts.clear()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss, grads, load))
    assert len(found) == 4 and min(grad.abs().max() for grad in found[0][1].values()) > 1e-6
    for loss, grads, load in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=5e-6)  # cross-entropies are fp32
        torch.testing.assert_close((load, grads), (found[0][2], found[0][1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("flag", "limit"), [(0.3, 0.3), (0.0, math.inf)])
def test_gradients_are_clipped_to_the_norm_of_the_flag(tmp_path, flag, limit):
    model, data, flags = prepared(steps=2, clip_grad=flag)
    used = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(
        nn.utils.get_total_norm([p.grad for g in optimizer.param_groups for p in g["params"]])
    ))  # fmt: skip
    try:
        train.train(model, data, flags, Recipe(1e-3, 1, 8), place(tmp_path, flags))
    finally:
        hook.remove()
    before = [record["grad_norm"] for record in losses(tmp_path)]
    assert len(used) == len(before) == 2 and min(before) > 0.3
    assert [u.item() for u in used] == pytest.approx([min(b, limit) for b in before], rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["pixel", "weight", "gradient"])
def test_a_number_that_is_none_stops_the_step_and_changes_nothing(where, value, tmp_path):
    model, data, flags = prepared(steps=5)
    batch_of, loss_of, weight, shown, before = (
        data.batch,
        model.loss,
        model.projector.fc1.weight,
        [],
        [],
    )

    def loss(batch):
        if len(before) == 2 and where == "pixel":
            batch.images[0, 0, 0, 0] = value
        elif len(before) == 2 and where == "weight":
            weight.data[0, 0] = value
        elif len(before) == 2:
            weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))
        before.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return loss_of(batch)

    data.batch, model.loss = lambda rows: shown.append(rows) or batch_of(rows), loss
    with pytest.raises(UserError, match=r"phase 3, step 2: .*nothing was updated") as stop:
        train.train(model, data, flags, Recipe(1e-3, 1, 8), place(tmp_path, flags))
    assert str(stop.value).endswith(", ".join(data.samples[row].id for row in shown[-1]))
    assert len(before) == 3 and not same(before[0], before[1])
    after = dict(model.named_parameters())
    torch.testing.assert_close(after, before[-1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("epochs", "n"), [(2, 6), (0.4, 1), (0.01, 1), (1.4, 4)])
def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own(
    tmp_path, monkeypatch, epochs, n
):
    model, data, flags = prepared(2, seed=5, jitter=n > 4)
    for part in (data.samples, data.encoded, data.lengths, data.weights):
        del part[24:]
    batch, shown, ahead = data.batch, [], []
    data.batch = lambda rows: shown.append(rows) or batch(rows)
    data.prefetch = lambda batches: ahead.append([*batches])
    monkeypatch.setattr(train, "jitter", Mock(side_effect=torch.clone))
    train.train(model, data, flags, Recipe(1e-3, epochs, 8), place(tmp_path, flags))
    orders = [data.epoch(8, 5, epoch) for epoch in (0, 1)]
    assert shown == [*orders[0], *orders[1]][:n] and len(losses(tmp_path)) == n
    assert sorted(chain.from_iterable(orders[0])) == list(range(24)) and orders[0] != orders[1]
    assert ahead[:3] == [orders[0][1:3], orders[0][2:3], []][:n]
    assert train.jitter.call_count == (n if n > 4 else 0) and not model.training


def test_a_batch_of_text_alone_is_not_jittered(tmp_path):
    model, data, flags = prepared(2, jitter=True)
    data.samples = [replace(s, image=None) for s in data.samples]
    data.encoded = [([1, 2, 3], [IGNORE, 2, 3])] * 2
    assert math.isfinite(gradients(model, data, [0, 1], flags, place(tmp_path, flags))[0])


COUNTING = """
import torch
from routers import TopKRouter

class Counting(TopKRouter):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(4))

    def penalty(self, gates, logits, mask, x):
        return torch.tensor(PRICE)

    def update(self, load):
        assert not torch.is_grad_enabled()
        self.seen += load
"""


def test_a_routers_penalty_is_in_the_loss_and_its_load_arrives_once_a_step(tmp_path):
    found = []
    for price in ("0.0", "1.5"):
        file = tmp_path / f"counting{price}.py"
        file.write_text(COUNTING.replace("PRICE", price))
        _, data, flags = prepared(steps=2, accumulate=2)
        torch.manual_seed(0)
        model = MedMoE(ModelConfig(VISION, DECODER))
        make_sparse(model, MoEConfig(router=f"{file}:Counting"))
        train.train(model, data, flags, Recipe(1e-3, 1, 8), place(tmp_path / price, flags))
        logged = losses(tmp_path / price)
        found.append([record["loss"] for record in logged])
        seen = torch.stack([block.mlp.router.seen for block in model.decoder.blocks[::2]])
        assert seen.sum(dim=1).tolist() == pytest.approx([2 * 2] * 2)  # k, steps
        loads = torch.tensor([record["load"] for record in logged]).sum(0)
        torch.testing.assert_close(seen, loads, atol=2e-4, rtol=0)
        assert not torch.equal(*seen)
    assert found[1] == pytest.approx([loss + 1.5 for loss in found[0]], abs=1e-5)


def test_training_in_bf16_stays_near_fp32(tmp_path):
    curves = []
    for dtype in ("float32", "bfloat16"):
        model, data, flags = prepared(steps=5, dtype=dtype, dropout=0.0)
        train.train(model, data, flags, Recipe(2e-3, 1, 4), place(tmp_path / dtype, flags))
        curves.append(torch.tensor([record["loss"] for record in losses(tmp_path / dtype)]))
    assert len(curves[0]) == 5 and 0 < (curves[0] - curves[1]).abs().max() < 0.01


def test_an_untrained_model_guesses_at_a_loss_of_ln_v():
    torch.manual_seed(0)
    model = MedMoE(ModelConfig(VISION, replace(DECODER, family="llama")))
    out = model.loss(questions(model.config).batch(range(16)))
    assert out.total.item() / out.n_tokens == pytest.approx(math.log(1024), abs=0.5)


def curve():
    """The losses of 200 steps in which all that phases 2 and 3 train is trained at once."""
    model, data, flags = prepared(steps=200, balance=0.01, z_loss=1e-3)
    torch.manual_seed(1)
    with TemporaryDirectory() as folder, losses_of_steps() as found:
        train.train(model, data, flags, Recipe(2e-3, 1, 8), place(Path(folder), flags))
        lrs = [record["lr"] for record in losses(Path(folder))]
    assert lrs == pytest.approx([2e-3 * train.lr_scale(step, 200) for step in range(200)])
    return found


def test_training_follows_the_golden_curve():
    golden = json.loads(CURVE.read_text())
    assert len(golden["losses"]) == 200 and golden["losses"][-1] < 0.2 * golden["losses"][0]
    exact = golden["torch"] == torch.__version__.partition("+")[0]
    # 8e-6 apart with AVX2 instead of AVX-512, or from weights that differ by 1e-7.
    assert curve() == pytest.approx(golden["losses"], abs=1e-4 if exact else 1e-3, rel=0)


# The command

ARGV = ["--preset", "mini", "--data", "phantoms:12", "--batch-size", "4", "--router-images", "12",
        "--device", "cpu", "--dtype", "float32", "--steps", "2"]  # fmt: skip


def noting(calls, name, function):
    def noted(*args, **kwargs):
        calls.append((name, args, kwargs))
        return function(*args, **kwargs)

    return noted


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of all three phases: its folder, and what was called and printed on the way."""
    folder, calls = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("preset")))
        for name in ("Images", "seed_all", "load_samples", "Dataset"):
            patch.setattr(train, name, noting(calls, name, getattr(train, name)))
        scored = noting(calls, "run", lambda *_, **__: SimpleNamespace(returncode=0))
        patch.setattr(train.subprocess, "run", scored)
        train.main([*ARGV, "--out", str(folder), "--save-every", "1", "--json",
                    str(folder / "scores.json"), "--workers", "1"])  # fmt: skip
        yield SimpleNamespace(folder=folder, calls=calls, out=printed.getvalue(),
                              phases=[folder / f"phase{n}" for n in (1, 2, 3)])  # fmt: skip


def test_one_command_runs_the_missing_phases_and_each_changes_only_its_own(finished):
    assert [f"phase {n}: saved" in finished.out for n in (1, 2, 3)] == [True] * 3
    assert not list(finished.folder.glob("*step*"))
    one, two, three = map(weights, finished.phases)
    changed = {k for k in one if not torch.equal(one[k], two[k])}
    assert changed == {k for k in one if not k.startswith("vision.")}
    kept = set(two) & set(three)
    assert len(kept) > 40 and all(torch.equal(two[k], three[k]) for k in kept)
    config, info = read_config(finished.phases[2])
    assert config.moe == MoEConfig() and info["phase"] == 3
    router = dict(open_tensors(finished.phases[1] / "router.safetensors"))
    for layer in (0, 2):
        mine = {k: three[f"decoder.blocks.{layer}.mlp.router.proj.{k}"] for k in ("weight", "bias")}
        assert same(mine, router)
    assert 1 <= read_config(finished.phases[1])[1]["router"]["n"] <= 4
    steps = [(r["phase"], r["step"]) for r in losses(finished.folder)]
    assert steps == [(n, i) for n in (1, 2, 3) for i in (0, 1)]


def test_each_phase_reads_its_samples_and_crops_only_the_images_of_captions(finished):
    def of(name):
        return [(args, kwargs) for n, args, kwargs in finished.calls if n == name]

    tasks = [args[1] for args, _ in of("load_samples")]
    assert tasks == ["vqa", "captions", "instructions", "vqa", "vqa"]  # the first to see modalities
    assert [kwargs for _, kwargs in of("Images")] == [
        {"pad": pad, "workers": 1} for pad in (False, True, True)
    ]
    assert [args[3] for args, _ in of("Dataset")] == [True, False, False]
    assert [args[0] for args, _ in of("seed_all")] == [1, 2, 3]
    seen = leaks.seen_by([])
    for folder, task in zip(finished.phases, ("captions", "instructions", "vqa"), strict=True):
        seen = leaks.merge(seen, leaks.seen_by(load_samples(("phantoms:12",), task, "train")))
        assert torch.equal(read_seen(folder), seen)


def test_then_it_is_scored_in_a_process_of_its_own(finished, monkeypatch):
    (((argv,), kwargs),) = [call[1:] for call in finished.calls if call[0] == "run"]
    script, last = str(Path(train.__file__).with_name("eval.py")), finished.phases[2]
    assert argv == [sys.executable, script, str(last), "--blind", "--device", "cpu", "--dtype",
                    "float32", "--json", str(finished.folder / "scores.json")]  # fmt: skip
    assert "PATH" in kwargs["env"] and f"try it: python chat.py {last}" in finished.out
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    calls, failed = [], SimpleNamespace(returncode=3)
    monkeypatch.setattr(train.subprocess, "run", noting(calls, "run", lambda *_, **__: failed))
    with pytest.raises(SystemExit) as stop:
        train.main([*ARGV, "--out", str(finished.folder), "--resume"])
    assert stop.value.code == 3 and not {"RANK", "WORLD_SIZE"} & calls[0][2]["env"].keys()


def test_phases_that_are_done_are_kept_and_must_have_been_trained_alike(finished, capsys, tmp_path):
    before = weights(finished.phases[2])
    argv = [*ARGV, "--out", str(finished.folder), "--no-eval"]
    train.main([*argv, "--resume"])
    assert same(weights(finished.phases[2]), before)
    assert "phase 3: done before" in capsys.readouterr().out
    for change in (["--resume", "--seed", "5"], ["--data", "phantoms:13"]):
        with pytest.raises(SystemExit) as stop:
            train.main([*argv, *change])
        assert stop.value.code == 2 and change[-2] in capsys.readouterr().err
    train.main([*argv, "--init", str(finished.phases[1]), "--out", str(tmp_path)])
    assert same(weights(tmp_path / "phase3"), before) and not (tmp_path / "phase1").exists()
    assert torch.equal(read_seen(tmp_path / "phase3"), read_seen(finished.phases[2]))


def test_a_phase_starts_from_the_checkpoint_before_only_if_it_fits(finished):
    flags = TrainConfig(preset="mini", data=("phantoms:12",), out=str(finished.folder))
    one, two, three = finished.phases
    model, tokenizer, router = train.initial_model(flags, two)
    assert tokenizer == two / "tokenizer.json" and router.keys() == {"weight", "bias"}
    assert train.initial_model(flags, one)[2] == {}
    sparse, _, _ = train.initial_model(flags, three)
    assert same(dict(sparse.named_parameters()), weights(three))
    assert train.pretrained(TrainConfig(clip="a", llm="b")) == (Path("a"), Path("b"))
    for refused, message in (
        (lambda: train.initial_model(replace(flags, preset="tiny"), two),
         "phase2: a checkpoint of mini, not of --preset tiny"),
        (lambda: train.pretrained(TrainConfig(preset="phi2")), "--preset phi2 .* --clip DIR"),
        (lambda: train.go_sparse(model, flags, {}), "has no router.safetensors"),
        (lambda: train.go_sparse(model, replace(flags, experts=3), router), "--experts 3: .* 4"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            refused()
    train.go_sparse(model, replace(flags, router="topk", top_k=1), router)
    assert model.config.moe == MoEConfig(router="topk", top_k=1)
    assert not torch.equal(model.decoder.blocks[0].mlp.router.proj.weight, router["weight"])


@pytest.mark.parametrize(
    ("more", "dtype", "moe"),
    [({}, torch.float32, True), ({"weights": "bf16"}, torch.bfloat16, True),
     ({"experts": 0}, torch.float32, False), ({"lora_rank": 2}, torch.float32, True)],
)  # fmt: skip
def test_phase_3_goes_sparse_and_flags_say_in_what(finished, more, dtype, moe):
    flags = TrainConfig(preset="mini", **more)
    model, _ = train.prepare(3, flags, finished.phases[1])
    assert model.decoder.embed.weight.dtype == dtype and (model.config.moe is not None) == moe
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lora" in n for n in names) == ("lora_rank" in more) and names
    assert train.prepare(2, flags, finished.phases[0])[0].config.moe is None


def test_which_phases_run_and_what_follows(tmp_path, monkeypatch, capsys):
    calls, flags = [], TrainConfig(phase=2, out=str(tmp_path), data=("llava:x.json",))

    def run_phase(number, flags, init, _):
        calls.append((number, init))
        return Path(f"p{number}")

    monkeypatch.setattr(train, "run_phase", run_phase)
    monkeypatch.setattr(train.subprocess, "run", Mock())
    train.run_phases(flags, ALONE)
    assert "llava:x.json has no held-out split" in capsys.readouterr().out
    train.run_phases(replace(flags, init="i", phase=3), ALONE)
    train.run_phases(replace(flags, resume=True, phase=1, eval=False), ALONE)
    assert calls == [(1, None), (2, Path("p1")), (3, Path("i")), (1, None)]
    second, ended = Processes(1, 2), []
    second.end = lambda: ended.append(1)
    capsys.readouterr()
    train.run_phases(replace(flags, phase=1, data=("phantoms",)), second)
    assert ended == [1] and capsys.readouterr().out == "" and not train.subprocess.run.called


def test_a_recipe_is_the_presets_longer_with_the_tower_and_changed_by_flags():
    assert train.choose_recipe(TrainConfig(), 2) == PRESETS["tiny"].recipes[2]
    assert train.choose_recipe(TrainConfig(tune_vision=True), 2) == PRESETS["tiny"].long[2]
    assert train.choose_recipe(TrainConfig(lr=0.5, epochs=0.0), 2) == Recipe(0.5, 0.0, 64)
    assert train.choose_recipe(TrainConfig(batch_size=3), 1).batch_size == 3


def test_an_earlier_phase_is_reused_only_if_it_was_trained_alike(tmp_path):
    flags = train.resolve(TrainConfig(out=str(tmp_path)))
    assert train.earlier_phase(1, flags) is None
    file = tmp_path / "phase1" / "config.json"
    file.parent.mkdir()

    def reused(flags=flags, **changed):
        before = {k: v for k, v in (to_dict(flags) | changed).items() if v != "missing"}
        values = {"model": to_dict(preset("tiny").model), "phase": 1, "flags": before}
        file.write_text(json.dumps(values))
        return train.earlier_phase(1, flags)

    assert reused() == reused(seed=7) == reused(image_folder="missing") == file.parent
    others = {"preset": "phi2", "data": ["slake:x"], "lang": "zh", "llm": "x", "clip": "x",
              "tune_vision": True, "image_folder": "x", "router_labels": "x.json"}  # fmt: skip
    for name, other in others.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*: choose another --out"):
            reused(**{name: other})
    (tmp_path / "phase1-step0000001").mkdir()
    assert reused() == file.parent and reused(replace(flags, resume=True)) is None


@pytest.mark.parametrize(
    ("known", "data", "tunes"),
    [(["phantoms:9"], "slake:x", True), (["phantoms:9"], "phantoms", False),
     (["slake:x"], "slake:y", False), (None, "slake:x", False)],
)  # fmt: skip
def test_a_tower_is_trained_only_on_what_its_config_says_it_has_not_seen(
    tmp_path, known, data, tunes
):
    values = {} if known is None else {"pretrained_on": known}
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = train.resolve(TrainConfig(phase=1, data=(data,), clip=str(tmp_path)))
    assert flags.tune_vision is flags.jitter is tunes
    again = train.resolve(replace(flags, tune_vision=not tunes))
    assert (again.tune_vision, again.jitter) == (not tunes, tunes)


def test_defaults_that_depend_on_other_flags(finished):
    flags = train.resolve(TrainConfig(phase=1, preset="mini"))
    assert (flags.data, flags.out) == (("phantoms",), "runs/mini")
    init = replace(flags, init=str(finished.phases[1]), data=("slake:x",), tune_vision=None)
    assert train.resolve(init).tune_vision is False  # as where it starts
    for wrong in ({"phase": 3, "top_k": 9}, {"accumulate": 0},
                  {"cache_features": True, "jitter": True}):  # fmt: skip
        with pytest.raises(UserError, match=r"--(top-k 9|accumulate 0|cache-features)"):
            train.resolve(replace(flags, **wrong))
    assert train.resolve(replace(flags, phase=3, experts=0, top_k=9)).top_k == 9


def test_a_router_of_modalities_needs_two_of_them(monkeypatch):
    samples, flags = load_samples(("phantoms:8",), "vqa", "train"), TrainConfig()

    def of(*modalities):
        known = [replace(s, modality=modalities[i % 2]) for i, s in enumerate(samples)]
        monkeypatch.setattr(train, "load_samples", Mock(return_value=known))

    of("CT", "MRI")
    assert train.resolve(flags).router == "modality"
    of("CT", None)
    assert train.resolve(replace(flags, router="topk")).router == "topk"
    with pytest.raises(UserError, match="--router modality: fewer than two in phantoms"):
        train.resolve(flags)


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = {"torch": torch.__version__.partition("+")[0], "losses": curve()}
    CURVE.write_text(json.dumps(golden) + "\n")
    print(f"wrote {CURVE}")
