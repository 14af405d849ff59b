"""Bits about the modality, and facts that single experts know, on made cases."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import MODALITIES
from data import Sample
from engine import experts
from model import MedMoE
from routers import OracleRouter, Routing
from sources import signs
from tests.conftest import build, collate

CPU = torch.device("cpu")


def test_a_route_that_is_the_modality_tells_two_bits_and_a_constant_one_none(monkeypatch):
    rows, model = [([5, 6, 7], [-100, -100, 7])] * 5, build(moe={"top_k": 1})
    batch = collate(rows, modality=[0, 1, 2, 3, 3])

    def forward(self, ids, mask, images, hints):
        assert not self.training
        own = torch.nn.functional.one_hot(hints.modality, 4)[:, None].expand(5, 3, 4).clone()
        own[:, 2] = own[0, 2]  # the answer: no part of a prompt
        dropped = own * torch.tensor([1, 0, 1])[:, None]  # a token that is routed to no expert
        constant = torch.nn.functional.one_hot(torch.zeros(5, 3).long(), 4)
        return None, [Routing(gates, gates) for gates in (own, dropped, constant)]

    monkeypatch.setattr(MedMoE, "forward", forward)
    sample = Sample("", "", "", None, (), "CT")
    data = SimpleNamespace(samples=[sample] * 5, batch=lambda rows: batch)
    expected = -(3 * 0.2 * torch.tensor(0.2).log2() + 0.4 * torch.tensor(0.4).log2()).item()
    bits = experts.information(model.train(), data, CPU, torch.float32)
    assert bits == pytest.approx([expected, expected, 0.0]) and model.training
    none = SimpleNamespace(samples=[Sample("", "", "", None, ())])
    assert experts.information(model, none, CPU, torch.float32) == []
    assert experts.information(build(), data, CPU, torch.float32) == []


def test_facts_are_asked_of_the_true_expert_and_of_each_wrong_one():
    """Experts that know the meanings of their own modality, all of them."""

    class Predictor:
        model = build(moe={})

        def answer(self, samples):
            blocks = [b for b in self.model.decoder.blocks if b.is_sparse]
            assert all(type(b.mlp.router) is OracleRouter for b in blocks) and len(blocks) == 2
            return [SimpleNamespace(answer=signs.meaning(int(s.id), MODALITIES.index(s.modality)))
                    for s in samples]  # fmt: skip

    known = signs.known(64)
    asked = [Sample(str(i), "", "", None, ((signs.name(i), signs.meaning(i, 1)),), "MRI", "open",
                    "sign") for i in known]  # fmt: skip
    answers = [s.turns[0][1] if i % 2 else "x" for i, s in enumerate(asked)]
    other = Sample("y", "", "", None, (("", "yes"),), "CT", "closed", "sign")
    found = experts.facts_by_expert(Predictor(), [*asked, other], [*answers, "yes"])
    table = signs.table()[:, known]
    common = [np.bincount(column).argmax() for column in table.T]
    assert found == {"n": 64, "own": 0.5, "majority": pytest.approx((common == table[1]).mean())}
    found = experts.facts_by_expert(Predictor(), [*asked, other], [*answers, "yes"], 65 * ["x"])
    wrong = (table[[0, 2, 3]] == table[1]).mean()
    assert found["wrong"] == pytest.approx(wrong) and 0.12 < wrong < 0.2
    assert (found["true"], found["blind"]) == (1, 0) and 0.2 < found["majority"] < 0.6
    assert type(Predictor.model.decoder.blocks[0].mlp.router) is not OracleRouter
    assert experts.facts_by_expert(Predictor(), [other], ["yes"]) == {}


def test_the_dense_models_number_stands_beside_those_of_the_default_run_only(monkeypatch, tmp_path):
    shares = {"dense-activated": 0.123, "dense-total": 0.234}
    rows = [{"row": row, "facts": {"mean": share}} for row, share in shares.items()]
    (tmp_path / "facts.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(experts, "MEASURED", tmp_path / "facts.json")
    facts = {"n": 64, "own": 0.5, "majority": 0.4}
    said = experts.show_facts(facts, {"preset": "tiny", "data": ["phantoms"]})
    assert "50.0% of 64" in said and "12.3% with" in said and "23.4% with" in said
    for flags in (
        {"preset": "tiny", "data": ["phantoms:9"]},
        {"preset": "x", "data": ["phantoms"]},
    ):
        assert "12.3%" not in experts.show_facts(facts, flags)
