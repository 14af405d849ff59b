"""lab.router: statistics by their definitions, and what is in the report."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from config import MODALITIES, MoEConfig
from eval import Prediction
from lab import router
from lab.controls import ByModality
from lab.router import bootstrapped, ece, mutual_information
from router_training import one_per_image, train_router
from sources import load
from sources.load import load_samples
from tests.conftest import build
from tests.mini import checkpoint


def test_the_statistics_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 200)
    right, gaps = rng.random(200) < confidence**2, []
    for b in range(2, 10):
        inside = (b / 10 < confidence) & (confidence <= (b + 1) / 10)
        gaps.append(inside.mean() * abs(right[inside].mean() - confidence[inside].mean()))
    assert ece(confidence, right, 10) == pytest.approx(sum(gaps))
    # classes 0, 1, 2: precision 1/2, 2/3, none; recall 1/2, 1, 0; the fourth does not occur
    f1 = router.macro_f1([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], list("abcd"))
    assert f1 == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    p = np.random.default_rng(0).dirichlet(np.ones(12)).reshape(3, 4)
    bits = p * np.log2(p / np.outer(p.sum(axis=1), p.sum(axis=0)))
    assert mutual_information(9 * p) == pytest.approx(bits.sum())
    value, low, high = bootstrapped(lambda rows: rows.mean(), 101)
    assert value == 50 and low == pytest.approx(44.3, abs=1) and high == pytest.approx(55.7, abs=1)


def test_averages_by_image_of_prompts_and_of_single_tokens_by_hand():
    """Image a is asked about twice, b once and c, of unknown modality, once."""
    sample = load_samples(["phantoms"], "vqa", "test")[0]
    asked = zip("abac", ("MRI", "CT", "MRI", None), strict=True)
    samples = [replace(sample, image=image, modality=name) for image, name in asked]
    logits = torch.tensor([[0.0, 2], [1, 5], [4, 0], [9, 9]])[:, None]  # (4, 1, 2)
    best = torch.zeros(4, 1, 4, 2)
    best[:, 0, 1] = torch.tensor([[1.0, 3], [1, 0], [2, 2], [9, 9]])  # patches alone
    truth, found = router.by_image(samples, router.Probe(logits, best, best[:, :, 1]))
    assert truth.tolist() == [1, 0] and found.logits.tolist() == [[[2, 1]], [[1, 5]]]
    row = router.levels(truth, found, [6])["block 6"]
    assert row["pooled over the prompt"].value == 0 and row["answer"] is None
    assert row["image"].value == pytest.approx((5 / 8 + 1) / 2)
    assert row["bits"].value == pytest.approx(mutual_information(np.array([[1, 0], [3, 5]])))


def test_scores_with_forced_routes_are_those_of_the_routed_expert():
    """Experts answer with their modality, and its own router chooses the first one always."""
    model = build("phi", {})
    samples = load_samples(["phantoms:80"], "vqa", "test")
    samples = [replace(s, turns=(("Which?", s.modality),), answer_type="open") for s in samples]

    def answer(samples):
        chosen = model.decoder.blocks[0].mlp.router
        first = getattr(chosen, "shift", 0) + getattr(chosen, "expert", 0)
        is_moved = isinstance(chosen, ByModality)
        experts = [first + is_moved * MODALITIES.index(s.modality) for s in samples]
        return [Prediction(MODALITIES[expert % 4], None, None) for expert in experts]

    flags = router.RouterConfig(checkpoint="x", limit=12)
    found = router.answers(SimpleNamespace(model=model, answer=answer), samples, flags)
    assert found["images"] == 12
    alone = [[cell.value for cell in found["alone"][m].values()] for m in MODALITIES]
    assert alone == np.eye(4).tolist()
    ends = ("true expert first", "true expert alone", "wrong expert first")
    assert [found[name]["mean"].value for name in ends] == [1, 1, 0]
    assert found["true expert alone"]["minus own"].value == 1 - found["own routing"].value < 1


def test_the_report_of_a_router_of_shuffled_labels_is_written(tmp_path, monkeypatch):
    train = Mock(side_effect=train_router)
    monkeypatch.setattr(router, "train_router", train)
    monkeypatch.setattr(load, "N_TEST", 6)
    monkeypatch.setattr(router, "bootstrapped", lambda f, n, draws=0: bootstrapped(f, n, 20))
    folder, file = checkpoint(tmp_path / "c", MoEConfig(n_experts=3, top_k=1)), tmp_path / "r.json"
    router.main([str(folder), "--limit", "2", "--device", "cpu", "--data", "phantoms:40",
                 "--break-router", "--json", str(file)])  # fmt: skip
    images = one_per_image(load_samples(["phantoms:40"], "vqa", "train"), 40, 0)
    labels = [MODALITIES.index(sample.modality) for sample in images]
    seen = train.call_args.args[0][2].tolist()
    assert seen != labels and sorted(seen) == sorted(labels)
    found = json.loads(file.read_text())
    assert found["n_images"] == 6 and found["forced_routing"]["images"] == 2
    assert "NaN" not in file.read_text()
