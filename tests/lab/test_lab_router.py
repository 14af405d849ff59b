"""lab.router: slow definitions, hand-made gates, and a broken router that every figure shows.

pytest tests/lab/test_lab_router.py
"""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import config
import eval
from checkpoint import save_checkpoint
from config import MODALITIES, MoEConfig, preset
from data import Text
from engine.published import load_published
from eval import Prediction, Predictor
from lab import router
from lab.forced_routers import Alone, ByModality, Without, forced
from lab.router_measures import answered, informed, levels, naming
from lab.router_probe import (
    KINDS,
    UNKNOWN,
    ByImage,
    kinds,
    labelled,
    leave_out,
    probe,
    set_routers,
    shuffled,
)
from lab.router_show import draw_reliability, percent
from lab.router_stats import detects, ece, information, macro_f1, mutual_information, reliability
from model import MedMoE, autocast, generate, make_sparse
from router_training import train_router
from routers import Hints
from sources import load
from sources.load import load_samples
from tests.mini import mini

CPU = torch.device("cpu")


def test_ece_is_the_weighted_gap_of_the_bins():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 200)
    right = rng.random(200) < confidence**2
    slow = 0.0
    for b in range(10):
        inside = [i for i in range(200) if b / 10 < confidence[i] <= (b + 1) / 10]
        if inside:
            sure = sum(confidence[i] for i in inside) / len(inside)
            slow += len(inside) / 200 * abs(sum(right[i] for i in inside) / len(inside) - sure)
    assert ece(confidence, right, 10) == pytest.approx(slow)
    assert sum(row["n"] for row in reliability(confidence, right, 10)) == 200


def test_ece_of_known_cases():
    sure, four = np.full(4, 0.75), np.array([True, True, True, False])
    assert ece(sure, four, 10) == pytest.approx(0)
    assert ece(np.ones(4), four, 10) == pytest.approx(0.25)
    assert ece(np.ones(4), ~np.ones(4, bool), 15) == pytest.approx(1)


def test_macro_f1_is_the_mean_over_classes_that_occur():
    truth, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    f1 = []
    for c in range(3):
        hits = sum(t == p == c for t, p in zip(truth, predicted, strict=True))
        p, r = hits / max(1, (predicted == c).sum()), hits / (truth == c).sum()
        f1.append(2 * p * r / (p + r) if p + r else 0.0)
    assert macro_f1(truth, predicted, 4) == pytest.approx(sum(f1) / 3)  # no fourth class occurs


def test_mutual_information_is_that_of_its_definition():
    joint = np.random.default_rng(0).integers(0, 9, (3, 4)).astype(float)
    p = joint / joint.sum()
    slow = sum(
        p[m, e] * math.log2(p[m, e] / (p[m].sum() * p[:, e].sum()))
        for m in range(3) for e in range(4) if p[m, e]
    )  # fmt: skip
    assert mutual_information(joint) == pytest.approx(slow)
    assert mutual_information(np.eye(4)) == pytest.approx(2)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0)


def test_information_stands_out_from_permuted_labels_only_where_there_is_some():
    truth = np.arange(40) % 4
    full = information(np.eye(4)[truth] * 10, truth)
    assert full["bits"].value == pytest.approx(2) and full["normalised"] == pytest.approx(1)
    assert full["p"] < 0.01 and full["null_q95"] < 0.6
    none = information(np.eye(4)[np.random.default_rng(1).integers(4, size=40)] * 10, truth)
    assert none["p"] > 0.05 and none["null_mean"] > 0.05  # not 0: 40 images


def test_detects_is_the_chance_of_a_larger_confidence():
    known, unknown = np.array([0.9, 0.8, 0.5]), np.array([0.7, 0.5])
    slow = np.mean([(k > u) + 0.5 * (k == u) for k in known for u in unknown])
    assert detects(known, unknown).value == pytest.approx(slow)
    assert detects(known, known - 0.45).value == 1


def random_gates(k=2, n_experts=4):
    logits = torch.randn(6, 5, n_experts, generator=torch.Generator().manual_seed(0))
    top = logits.softmax(-1).topk(k)
    return torch.zeros_like(logits).scatter(-1, top.indices, top.values), logits


@pytest.mark.parametrize("n_experts, k", [(4, 2), (3, 2), (4, 1), (2, 2)])
def test_forced_by_modality_moves_the_gates_and_keeps_their_values(build, n_experts, k):
    inner = build(moe={"n_experts": n_experts, "top_k": k}).decoder.blocks[0].mlp.router
    gates, logits = random_gates(k, n_experts)
    modality = torch.tensor([0, 1, 2, 3, 1, -1])
    for shift in range(n_experts):
        change = ByModality(inner, shift).change
        moved = change(gates, logits, modality)
        assert torch.equal(moved.sort(-1).values, gates.sort(-1).values)
        target = ((modality + shift) % n_experts)[:, None, None].expand(6, 5, 1)
        best = moved.gather(-1, target)[..., 0][:5]
        assert torch.equal(best, gates.amax(-1)[:5])
        if shift:
            true = (modality % n_experts)[:, None, None].expand(6, 5, 1)
            assert torch.equal(moved.gather(-1, true)[..., 0][:5], gates.amin(-1)[:5])
        assert torch.equal(moved[5], gates[5])  # unknown: as it was
        assert torch.equal(change(moved, logits, modality), moved)
    assert torch.equal(ByModality(inner).change(gates, logits, None), gates)


def test_a_forced_true_expert_leaves_right_routing_as_it_is(build):
    inner = build(moe={}).decoder.blocks[0].mlp.router
    gates, logits = random_gates()
    for b, t in ((0, 0), (3, 2)):
        modality = gates[b, t].argmax()[None]
        one = gates[b : b + 1, t : t + 1], logits[b : b + 1, t : t + 1]
        moved = ByModality(inner).change(*one, modality)
        assert torch.equal(moved[0, 0], gates[b, t])


def test_without_rescales_where_gates_add_up_to_one(build):
    gates, logits = random_gates(k=2)
    gates = gates / gates.sum(-1, keepdim=True)
    two = build(moe={"top_k": 2}).decoder.blocks[0].mlp.router
    left = Without(two, 1).change(gates, logits, None)
    assert (left[..., 1] == 0).all() and torch.allclose(left.sum(-1), torch.ones(6, 5))
    one = build(moe={"top_k": 1}).decoder.blocks[0].mlp.router
    left = Without(one, 1).change(gates, logits, None)
    assert torch.equal(left, gates * torch.tensor([1.0, 0, 1, 1]))


@pytest.mark.parametrize("family", ["phi", "stablelm"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_forced_routing_holds_while_the_answer_is_generated(build, collate, family, level):
    model = build(family, {"level": level})
    row = [1, 2, config.IMAGE_ID, config.IMAGE_ID, config.IMAGE_ID, config.IMAGE_ID, 3, 4]
    batch = collate([(row, [-100] * 8)] * 2, side="left", modality=[2, 3])
    own = list(generate(model, batch, eos_id=-1, max_new=4))
    with forced(model, partial(ByModality, shift=1)):
        steps = list(generate(model, batch, eos_id=-1, max_new=4))
    for step in steps:
        for routing in step.routings:
            assert (routing.gates.argmax(-1) == torch.tensor([[3], [0]])).all()
            assert (routing.gates[0, :, 2] == 0).all() and (routing.gates[1, :, 3] == 0).all()
    with forced(model, partial(Alone, expert=1)):
        steps = list(generate(model, batch, eos_id=-1, max_new=4))
    assert all((r.gates == torch.tensor([0, 1.0, 0, 0])).all() for s in steps for r in s.routings)
    again = list(generate(model, batch, eos_id=-1, max_new=4))  # its own routers are back
    for a, b in zip(own, again, strict=True):
        assert all(torch.equal(x.gates, y.gates) for x, y in zip(a.routings, b.routings))  # noqa: B905


def test_every_real_position_is_of_one_kind(collate):
    image = [config.IMAGE_ID] * 4
    rows = [
        ([1, 2, *image, 3, 4, 5, 6], [-100] * 8 + [5, 6]),
        ([1, *image, 3, 7], [-100] * 6 + [7]),
    ]
    batch = collate(rows)
    found = kinds(batch)
    assert torch.equal(found.sum(dim=0), batch.mask.long())
    assert found.sum(dim=-1).T.tolist() == [[2, 4, 2, 2], [1, 4, 1, 1]]


class Namer(Predictor):
    """Answers with the modality whose expert the last sparse block's gates favour."""

    @torch.no_grad()
    def answer(self, samples):
        found = {}
        for rows, batch in self.batches(samples, "names"):
            hints = Hints(prompt=batch.mask, modality=batch.modality)
            with autocast(self.device, self.dtype):
                _, routings = self.model(batch.ids, batch.mask, batch.images, hints)
            real = batch.mask[..., None]
            named = (routings[-1].gates * real).sum(dim=1).argmax(dim=-1)
            votes = sum((r.logits * real).sum(dim=1) for r in routings)
            for i, row in enumerate(rows):
                name = MODALITIES[int(named[i])]
                found[row] = Prediction(name, votes[i], torch.zeros(2, 4))
        return [found[i] for i in range(len(samples))]


def questions(split, n):
    """One question per image, whose answer is its modality."""
    several = load_samples(["phantoms:200"], "vqa", split)
    one = list({s.image: s for s in several}.values())[:n]
    return [
        replace(s, turns=(("Which modality is this?", s.modality),), answer_type="open")
        for s in one
    ]


@pytest.fixture(scope="module")
def reports():
    """The same figures of a trained router and of one trained on shuffled labels."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = preset("tiny")
    model = MedMoE(tiny.model)
    load_published(model, tiny.model, tiny.clip, tiny.llm)
    make_sparse(model.eval(), MoEConfig())
    predictor = Namer(model, Text(tiny.llm), CPU, torch.float32)
    samples = questions("test", 96)
    parts = questions("train", 200), samples
    train, test = (labelled(predictor, part, 200, seed=0) for part in parts)
    found = {"left out": leave_out(train, test, 4, seed=0)}
    for name, learnt in (("sound", train), ("broken", shuffled(train, seed=0))):
        set_routers(predictor, train_router(learnt, test, 4, seed=0)[0])
        images, seen = ByImage(samples), probe(predictor, samples)
        found[name] = {
            "naming": naming(images, seen, 10), "levels": levels(images, seen, [0, 2]),
            "information": informed(images, seen, [0, 2]),
            "answers": answered(predictor, samples, seed=0),
        }  # fmt: skip
    return found


@pytest.mark.slow
def test_a_broken_router_shows_in_naming_calibration_and_confusion(reports):
    sound, broken = (reports[name]["naming"] for name in ("sound", "broken"))
    assert sound["accuracy"] > 0.8 and broken["accuracy"] < 0.6
    assert sound["ci95"][0] > broken["ci95"][1]
    assert sound["macro_f1"].low > broken["macro_f1"].high
    wrong = [np.sum(r["confusion"]) - np.trace(r["confusion"]) for r in (sound, broken)]
    assert wrong[0] < 20 and wrong[1] > 36
    gap = [r["confidence"] - r["accuracy"] for r in (sound, broken)]  # too sure
    assert gap[1] > gap[0] + 0.05
    bins = [{row["low"] for row in r["bins"] if row["n"]} for r in (sound, broken)]
    assert bins[0] != bins[1]


@pytest.mark.slow
def test_a_broken_router_shows_at_every_level(reports):
    assert reports["sound"]["levels"]
    for sound, broken in zip(reports["sound"]["levels"], reports["broken"]["levels"], strict=True):
        assert sound["pooled"].low > broken["pooled"].high
        assert sound["image"].low > broken["image"].high
        assert set(KINDS) < set(sound)


@pytest.mark.slow
def test_a_broken_router_shows_in_the_information(reports):
    assert reports["sound"]["information"]
    pairs = zip(reports["sound"]["information"], reports["broken"]["information"], strict=True)
    for sound, broken in pairs:
        assert sound["bits"].low > broken["bits"].high
        assert sound["bits"].value > sound["null_q95"]


@pytest.mark.slow
def test_a_broken_router_shows_in_the_answers(reports):
    """Experts answer with their own modality: true > own > wrong, and swap is the identity."""
    for name in ("sound", "broken"):
        found = reports[name]["answers"]
        for m, row in found["swap"].items():
            assert [cell["mean"] for cell in row] == [float(e == m) for e in MODALITIES]
        assert found["true"]["mean"] == found["oracle"]["mean"] == 1 and found["wrong"]["mean"] == 0
    sound, broken = (reports[name]["answers"] for name in ("sound", "broken"))
    assert sound["own"]["ci95"][0] > broken["own"]["ci95"][1]
    assert sound["true"]["difference"] < 0.3 < broken["true"]["difference_ci95"][0]
    assert broken["by_route"]["wrong"]["n"] > sound["by_route"]["wrong"]["n"] + 20
    assert broken["by_route"]["difference"].value > 0.3
    # Of the sound router's images only those of the missing expert's modality suffer.
    for e, name in enumerate(MODALITIES):
        drops = [row[e]["difference"] for row in sound["without_by_modality"].values()]
        assert min(drops) == sound["without_by_modality"][name][e]["difference"] < -0.5


@pytest.mark.slow
def test_swap_matrix_is_that_of_one_model_at_a_time(reports):
    matrix = reports["sound"]["answers"]["swap"]
    assert {sum(cell["n"] for cell in row) // 4 for row in matrix.values()} == {
        sum(row) for row in reports["sound"]["naming"]["confusion"]
    }


@pytest.mark.slow
def test_a_modality_left_out_goes_to_the_others(reports):
    found = reports["left out"]
    assert list(found) == ["nothing", *MODALITIES]
    for e, name in enumerate(MODALITIES):
        assert found[name]["goes_to"][e] < 0.05 and sum(found[name]["goes_to"]) == pytest.approx(1)
        assert found[name]["known"].value > 0.8
        assert found[name]["confidence"] < found[name]["known_confidence"]


def test_unknown_images_are_as_described():
    images = torch.rand(2, 3, 32, 32)
    assert (UNKNOWN["blank"](images) == 0).all()
    assert torch.allclose(UNKNOWN["inverted"](UNKNOWN["inverted"](images)), images, atol=1e-5)
    moved = UNKNOWN["scrambled"](images)
    assert torch.equal(moved.flatten(2).sort().values, images.flatten(2).sort().values)
    assert not torch.equal(moved, images)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """-> a function that saves an untrained checkpoint of 30 000 parameters."""
    monkeypatch.setattr(load, "N_TEST", 6)
    small = mini(tmp_path / "parts")

    def save(moe):
        torch.manual_seed(0)
        model = MedMoE(small.model)
        load_published(model, small.model, small.clip, small.llm)
        if moe is not None:
            make_sparse(model, MoEConfig(**moe))
        flags = {"data": ["phantoms:40"], "seed": 0, "preset": "tiny"}
        meta = {"flags": flags, "phase": 3 if moe is not None else 2}
        tokenizer = small.llm / "tokenizer.json"
        save_checkpoint(tmp_path / "c", model, model.config, meta, tokenizer, {})
        return str(tmp_path / "c")

    return save


CHOICE = f"{config.ASSETS.parents[1]}/course/museum/expert_choice.py:ExpertChoice"
LOOKS_AHEAD = {"router": CHOICE, "level": "token"}


@pytest.mark.parametrize("moe", [{}, {"n_experts": 3, "top_k": 1, "level": "sequence"}])
def test_the_report_is_written_and_has_no_paths(saved, tmp_path, capsys, moe):
    folder, file, png = saved(moe), tmp_path / "r.json", tmp_path / "r.png"
    argv = [folder, "--limit", "2", "--device", "cpu", "--router-images", "40", "--break-router"]
    router.main([*argv, "--json", str(file), "--png", str(png)])
    found = json.loads(file.read_text())
    assert found["broken"] and found["n_images"] == 6 and found["forced_routing"]["n_images"] == 2
    assert len(found["naming"]["confusion"]) == moe.get("n_experts", 4)
    assert str(tmp_path) not in file.read_text() and "NaN" not in file.read_text()
    assert png.stat().st_size > 1000
    assert "without an expert" in capsys.readouterr().out


def test_a_router_that_looks_ahead_gets_a_report_without_answers(saved, capsys):
    found = router.main([saved(LOOKS_AHEAD), "--device", "cpu", "--router-images", "40"])
    assert found["forced_routing"] is None and found["naming"]["n"] == 6
    assert "not done: a router that looks ahead" in capsys.readouterr().out


def test_images_without_modalities_leave_out_what_needs_them(saved, monkeypatch, capsys):
    plain = lambda *args, **kw: [replace(s, modality=None) for s in load_samples(*args, **kw)]  # noqa: E731
    monkeypatch.setattr(router, "load_samples", plain)
    monkeypatch.setattr(eval, "load_samples", plain)
    found = router.main([saved({}), "--device", "cpu"])
    parts = ("naming", "levels", "information", "left_out", "forced_routing")
    assert all(found[part] is None for part in parts) and found["unknown"]["noise"]["n"] == 6
    assert capsys.readouterr().out.count("no image has a known modality") == 4
    with pytest.raises(SystemExit, match="2"):
        router.main([saved({}), "--device", "cpu", "--break-router"])


def test_a_dense_checkpoint_is_one_line_and_code_2(saved, capsys):
    with pytest.raises(SystemExit, match="2"):
        router.main([saved(None)])
    assert "is dense, it has no router" in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_number_is_a_dash():
    assert percent(None) == percent({"mean": None, "ci95": None}) == "-"
    with pytest.raises(config.UserError, match="nothing to draw"):
        draw_reliability(None, "x.png")
