"""lab.router: statistics by their definitions, and a broken router that every figure shows."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval
from config import ASSETS, IMAGE_ID, MODALITIES, MoEConfig, preset
from data import Text
from engine.published import load_published
from eval import Prediction, Predictor
from lab import router
from lab.router import Estimate, Probe, bootstrapped, detects, ece, mutual_information, reliability
from model import MedMoE, autocast, make_sparse
from routers import Hints
from sources import load
from sources.load import load_samples
from tests.mini import checkpoint

CPU = torch.device("cpu")


def test_ece_is_the_weighted_gap_of_the_bins():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 200)
    right = rng.random(200) < confidence**2
    slow, n_bins = 0.0, 0
    for b in range(10):
        if (inside := (b / 10 < confidence) & (confidence <= (b + 1) / 10)).any():
            n_bins += 1
            slow += inside.sum() / 200 * abs(right[inside].mean() - confidence[inside].mean())
    assert ece(confidence, right, 10) == pytest.approx(slow)
    assert len(reliability(confidence, right, 10)) == n_bins == 8


def test_f1_information_and_detection_are_those_of_their_definitions():
    # classes 0, 1, 2: precision 1/2, 2/3, none; recall 1/2, 1, 0; the fourth does not occur
    f1 = router.macro_f1([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], list("abcd"))
    assert f1 == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    joint = np.random.default_rng(0).integers(0, 9, (3, 4)).astype(float)
    p = joint / joint.sum()
    bits = [p[m, e] * math.log2(p[m, e] / (p[m].sum() * p[:, e].sum()))
            for m in range(3) for e in range(4) if p[m, e]]  # fmt: skip
    assert mutual_information(joint) == pytest.approx(sum(bits))
    assert mutual_information(np.eye(4)) == pytest.approx(2)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0)
    known, unknown = np.array([0.9, 0.8, 0.5]), np.array([0.7, 0.5])
    slow = np.mean([(k > u) + 0.5 * (k == u) for k in known for u in unknown])
    assert detects(known, unknown).value == pytest.approx(slow)
    assert detects(known, known - 0.45).value == 1


def test_an_estimate_has_an_interval_and_is_printed(capsys):
    assert bootstrapped(lambda rows: rows.mean(), 0) is router.share(np.zeros(0)) is None
    value, low, high = bootstrapped(lambda rows: rows.mean(), 101)
    assert value == 50 and low == pytest.approx(44.3, abs=1) and high == pytest.approx(55.7, abs=1)
    some = bootstrapped(lambda rows: 1.0 if 0 in rows else None, 5)
    assert some == (1, 1, 1)  # samples without row 0 are left out
    router.show("a", {"b": Estimate(0.5, 0.25, 0.75), "c": {"d": None, "e": 0.25}})
    assert capsys.readouterr().out.split()[1:6] == ["b", "0.500", "[0.250,", "0.750]", "c"]


def test_every_real_position_is_of_one_kind(collate):
    rows = [([1, 2, *[IMAGE_ID] * 4, 3, 4, 5, 6], [-100] * 8 + [5, 6]),
            ([1, *[IMAGE_ID] * 4, 3, 7], [-100] * 6 + [7])]  # fmt: skip
    batch = collate(rows)
    found = router.kinds(batch)
    assert torch.equal(found.sum(dim=0), batch.mask.long())
    assert found.sum(dim=-1).T.tolist() == [[2, 4, 2, 2], [1, 4, 1, 1]]


def test_by_image_and_by_block():
    """Image a is asked about twice, b once and c, of unknown modality, once."""
    sample = load_samples(["phantoms"], "vqa", "test")[0]
    asked = (("a", "MRI"), ("b", "CT"), ("a", "MRI"), ("c", None))
    samples = [replace(sample, image=image, modality=m) for image, m in asked]
    logits = torch.tensor([[0.0, 2], [1, 5], [4, 0], [9, 9]])[:, None]  # (4, 1, 2)
    best = torch.zeros(4, 1, 4, 2)
    best[0, 0, 1], best[2, 0, 1] = torch.tensor([1.0, 3]), torch.tensor([2.0, 2])  # a's patches
    best[1, 0, 1] = torch.tensor([1.0, 0])
    truth, found = router.by_image(samples, Probe(logits, best, best[:, :, 1]))
    assert truth.tolist() == [1, 0] and found.logits.tolist() == [[[2, 1]], [[1, 5]]]
    assert found.first.tolist() == [[[3, 5]], [[1, 0]]]
    row = router.levels(truth, found, [6])["block 6"]
    assert row["pooled over the prompt"].value == 0 and row["answer"] is None
    assert row["image"].value == pytest.approx((5 / 8 + 1) / 2)
    assert row["bits"].value == pytest.approx(mutual_information(np.array([[3, 5], [1, 0]])))


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
            for i, row in enumerate(rows):
                found[row] = Prediction(MODALITIES[int(named[i])], None, None)
        return [found[i] for i in range(len(samples))]


@pytest.fixture(scope="module")
def reports():
    """The report of a trained router and of one trained on shuffled labels."""
    torch.manual_seed(0)
    tiny, found = preset("tiny"), {}
    model = MedMoE(tiny.model)
    load_published(model, tiny.model, tiny.clip, tiny.llm)
    make_sparse(model.eval(), MoEConfig())
    predictor = Namer(model, Text(tiny.llm), CPU, torch.float32)
    several = load_samples(["phantoms:200"], "vqa", "test")
    samples = [replace(s, turns=(("Which modality is this?", s.modality),), answer_type="open")
               for s in list({s.image: s for s in several}.values())[:96]]  # fmt: skip
    for name in ("broken", "sound"):
        flags = router.RouterConfig(checkpoint="x", data=("phantoms:200",), break_router=True)
        with pytest.MonkeyPatch.context() as patch:
            if name == "sound":
                patch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
            found[name] = router.report(predictor, flags, samples)
    return found


@pytest.mark.slow
def test_a_broken_router_shows_in_every_figure(reports):
    sound, broken = (reports[name]["classification"] for name in ("sound", "broken"))
    assert sound["accuracy"] > 0.8 and broken["accuracy"] < 0.6
    assert sound["macro_f1"].low > broken["macro_f1"].high
    assert broken["confidence"] - broken["accuracy"] > sound["confidence"] - sound["accuracy"]
    sound, broken = reports["sound"], reports["broken"]
    assert len(sound["levels"]) == 2
    for block, row in sound["levels"].items():
        for part in ("pooled over the prompt", "image", "bits"):
            assert row[part].low > broken["levels"][block][part].high
    sound, broken = sound["forced_routing"], broken["forced_routing"]
    for found in (sound, broken):
        assert list(found["alone"]) == list(MODALITIES)
        for m, row in found["alone"].items():
            assert [cell.value for cell in row.values()] == [float(e == m) for e in MODALITIES]
        ends = ("true expert first", "true expert alone", "wrong expert first")
        assert [found[name]["mean"].value for name in ends] == [1, 1, 0]
    assert sound["own routing"].low > broken["own routing"].high
    assert broken["true expert first"]["minus own"].low > 0.3
    found = reports["sound"]["left out"]
    for name in MODALITIES:
        assert found[name]["goes_to"][name] < 0.05 and found[name]["known"].value > 0.8
        assert found[name]["confidence"] < found[name]["known_confidence"]


@pytest.fixture
def short(monkeypatch):
    """Six test images, 40 for training, and 20 samples for an interval."""
    monkeypatch.setattr(router, "N_TRAIN", 40)
    monkeypatch.setattr(load, "N_TEST", 6)
    monkeypatch.setattr(router, "bootstrapped", lambda f, n, draws=0: bootstrapped(f, n, 20))


def test_the_report_is_written_and_has_no_paths(tmp_path, short, capsys):
    moe = MoEConfig(n_experts=3, top_k=1, level="sequence")
    folder, file = checkpoint(tmp_path / "c", moe), tmp_path / "r.json"
    argv = [str(folder), "--limit", "2", "--device", "cpu"]
    router.main([*argv, "--break-router", "--json", str(file), "--data", "phantoms:40"])
    found = json.loads(file.read_text())
    assert found["n_images"] == 6 and found["unknown"]["noise"]["n"] == 6
    assert len(found["classification"]["confusion"]) == 3
    assert set(found["forced_routing"]["wrong expert first"]) == {"mean", "minus own"}
    assert str(tmp_path) not in file.read_text() and "NaN" not in file.read_text()
    assert found["forced_routing"]["images"] == 2 and "wrong expert" in capsys.readouterr().out


def test_what_cannot_be_is_left_out_or_refused(tmp_path, short, monkeypatch, capsys):
    plain = lambda *args, **kw: [replace(s, modality=None) for s in load_samples(*args, **kw)]  # noqa: E731
    ahead = f"{ASSETS.parents[1]}/course/museum/expert_choice.py:ExpertChoice"
    folder = str(checkpoint(tmp_path / "a", MoEConfig(router=ahead, level="token")))
    assert router.main([folder, "--device", "cpu"])["forced_routing"] is None
    monkeypatch.setattr(router, "load_samples", plain)
    monkeypatch.setattr(eval, "load_samples", plain)
    for moe, reason in ((MoEConfig(), "no image has a known modality"), (None, "it has no router")):
        with pytest.raises(SystemExit, match="2"):
            router.main([str(checkpoint(tmp_path / "b" / reason, moe)), "--device", "cpu"])
        assert reason in capsys.readouterr().err
