"""Control routers and forced routes, on hand-made gates and on tiny models."""

import itertools
from functools import partial

import pytest
import torch

from config import IMAGE_ID
from engine.routes import Alone, forced
from lab.controls import ByModality, Everyone, FirstOnly, Hash, Wrong1, Wrong2, Wrong3
from model import generate
from routers import Hints, TopKRouter


def test_everyone_has_gate_1_and_wrong_routes_no_token_to_the_true_expert():
    x, mask = torch.randn(5, 3, 8), torch.ones(5, 3, dtype=torch.bool)
    assert Everyone(8, 4, top_k=4)(x, mask).gates.eq(1).all()
    assert Everyone(8, 4, top_k=4).at_most_k and not Everyone(8, 4, top_k=2).at_most_k
    hints = Hints(modality=torch.tensor([0, 1, 2, 3, -1]))
    gates = [wrong(8, 4)(x, mask, hints).gates for wrong in (Wrong1, Wrong2, Wrong3)]
    assert sum(gates)[:4].eq(1 - torch.eye(4)[:, None]).all()  # each other expert once
    assert gates[1][:4].eq(torch.eye(4).roll(2, dims=1)[:, None]).all()
    assert gates[0][4].eq(0.25).all()  # unknown: all alike


def test_hash_is_by_token_id_and_of_a_patch_by_its_place_and_uses_all_experts_alike():
    ids = torch.tensor([[5, *range(4000)], 4001 * [IMAGE_ID]])
    gates = Hash(8, 4)(torch.randn(*ids.shape, 8), ids == ids, Hints(ids=ids)).gates
    # 5 * 2654435761 mod 2^32 = 386 276 917, a share of 0.09 of 2^32: the first experts of four
    assert gates[0, 0].tolist() == gates[0, 6].tolist() == [0.5, 0.5, 0, 0]
    assert gates.mean(dim=1).sub(0.25).abs().max() < 0.01


@pytest.mark.parametrize("n_experts, k", [(4, 2), (3, 2), (4, 1)])
def test_forced_by_modality_moves_the_gates_and_keeps_their_values(n_experts, k):
    torch.manual_seed(0)
    logits = torch.randn(6, 5, n_experts)
    top = logits.softmax(-1).topk(k)
    gates = torch.zeros_like(logits).scatter(-1, top.indices, top.values)
    modality = torch.tensor([0, 1, 2, 3, 1, -1])
    for shift in (0, 1, 2):
        inner = TopKRouter(8, n_experts, k)
        inner.at_most_k, inner.may_drop, inner.causal = False, True, False
        outer = ByModality(inner, shift)
        assert (outer.at_most_k, outer.may_drop, outer.causal) == (False, True, False)
        change = outer.change
        moved = change(gates, logits, modality)
        for b, t in itertools.product(range(5), range(5)):
            true, wanted = int(modality[b]) % n_experts, (int(modality[b]) + shift) % n_experts
            rest = logits[b, t].argsort(descending=True).tolist()
            order = [wanted, *(e for e in rest if e not in (true, wanted)), true][:n_experts]
            assert moved[b, t, order].tolist() == gates[b, t].sort(descending=True)[0].tolist()
        assert torch.equal(moved[5], gates[5])  # unknown: as it was
        assert torch.equal(change(moved, logits, modality), moved)


def test_forced_routing_holds_while_the_answer_is_generated(build, collate):
    model = build("phi", {})
    rows = [(range(1, 9), [-100] * 8), (range(1, 8), [-100] * 7)]
    batch = collate(rows, side="left", modality=[2, 3])

    def gates():
        return [r.gates for s in generate(model, batch, eos_id=-1, max_new=4) for r in s.routings]

    own = gates()
    with forced(model, partial(ByModality, shift=1)):
        shifted = gates()
    with forced(model, partial(Alone, expert=1)):
        alone = gates()
    assert shifted[0][1, 0].eq(0).all()  # padding is routed nowhere
    for a, b, one, again in zip(own, shifted, alone, gates(), strict=True):
        assert (b[:, -4:].argmax(-1) == torch.tensor([[3], [0]])).all()  # of modalities 2 and 3
        assert one[:, -1].eq(torch.tensor([0, 1, 0, 0])).all() and torch.equal(a, again)


def test_the_first_expert_alone_has_gate_1_and_who_had_none_still_has_none():
    gates = torch.tensor([[[0.2, 0.3, 0.0], [0.0, 0.0, 0.9], [0.0, 0.0, 0.0]]])
    first = FirstOnly(TopKRouter(8, 3)).change(gates, gates, None)
    assert first.tolist() == [[[0, 1, 0], [0, 0, 1], [0, 0, 0]]]
