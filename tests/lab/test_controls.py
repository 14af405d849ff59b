"""Control routers and forced routes, on hand-made gates and on tiny models."""

from functools import partial

import pytest
import torch

from config import IMAGE_ID
from lab.controls import Alone, ByModality, Everyone, Hash, Wrong, forced
from model import generate
from moe import MLP, upcycle
from routers import Hints, TopKRouter


def test_everyone_is_one_wide_dense_ffn(shake):
    """meta and two experts with gate 1: their hidden units side by side in one FFN."""
    router = Everyone(16, 2, top_k=2)
    sparse = shake(upcycle(shake(MLP(16, 24)), router, 2, "fresh"))
    wide, meta, experts = MLP(16, 72), sparse.meta, sparse.experts
    wide.fc1.weight.data = torch.cat([meta.fc1.weight, *experts.fc1.weight])
    wide.fc1.bias.data = torch.cat([meta.fc1.bias, *experts.fc1.bias])
    wide.fc2.weight.data = torch.cat([meta.fc2.weight, *experts.fc2.weight], dim=1)
    wide.fc2.bias.data = meta.fc2.bias + experts.fc2.bias.sum(dim=0)
    x, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    y, routing = sparse(x, mask, Hints())
    assert routing.gates.eq(1).all() and router.at_most_k and not Everyone(16, 2, 1).at_most_k
    torch.testing.assert_close(y, wide(x), atol=1e-5, rtol=1e-5)


def hashed(ids):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Hash(8, 4, top_k=2)(torch.randn(*ids.shape, 8), mask, Hints(ids=ids)).gates[0]


def test_hash_depends_on_the_token_alone_and_of_a_patch_on_its_place():
    gates = hashed([5, IMAGE_ID, IMAGE_ID, 7, 5])
    assert torch.equal(gates, hashed([5, IMAGE_ID, IMAGE_ID, 7, 5]))
    assert torch.equal(gates[0], gates[4]) and not torch.equal(gates[1], gates[2])
    # Knuth: 5 * 2654435761 mod 2^32 = 386 276 917, a share of 0.09 of 2^32, so experts 0 and 1
    assert gates[0].tolist() == [0.5, 0.5, 0, 0]
    share = (hashed(list(range(1024))) != 0).float().mean(dim=0)  # of 2 in 4
    assert share.min() > 0.4 and share.max() < 0.6
    assert (hashed([IMAGE_ID] * 49) != 0).any(dim=0).all()


def test_wrong_routes_no_token_to_the_true_expert():
    x, mask = torch.randn(5, 3, 8), torch.ones(5, 3, dtype=torch.bool)
    gates = Wrong(8, 4)(x, mask, Hints(modality=torch.tensor([0, 1, 2, 3, -1]))).gates
    assert gates[:4].eq(torch.eye(4).roll(1, dims=1)[:, None]).all()
    assert gates[4].eq(0.25).all()  # unknown: all alike
    assert Wrong(8, 4)(x, mask, Hints()).gates.eq(0.25).all()


@pytest.mark.parametrize("n_experts, k", [(4, 2), (3, 2), (4, 1), (2, 2)])
def test_forced_by_modality_moves_the_gates_and_keeps_their_values(n_experts, k):
    torch.manual_seed(0)
    logits = torch.randn(6, 5, n_experts)
    top = logits.softmax(-1).topk(k)
    gates = torch.zeros_like(logits).scatter(-1, top.indices, top.values)
    modality, inner = torch.tensor([0, 1, 2, 3, 1, -1]), TopKRouter(8, n_experts, k)
    assert n_experts > 1
    for shift in range(n_experts):
        change = ByModality(inner, shift).change
        moved = change(gates, logits, modality)
        for b in range(5):
            true, wanted = int(modality[b]) % n_experts, (int(modality[b]) + shift) % n_experts
            for t in range(5):
                by_choice = logits[b, t].argsort(descending=True).tolist()
                rest = [e for e in by_choice if e not in (true, wanted)]
                order = [wanted, *rest, *([true] if shift else [])]
                assert moved[b, t, order].tolist() == gates[b, t].sort(descending=True)[0].tolist()
        assert torch.equal(moved[5], gates[5])  # unknown: as it was
        assert torch.equal(change(moved, logits, modality), moved)
    assert torch.equal(ByModality(inner, 1).change(gates, logits, None), gates)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_forced_routing_holds_while_the_answer_is_generated(build, collate, level):
    model = build("phi", {"level": level})
    row = [1, 2, *[IMAGE_ID] * 4, 3, 4]
    batch = collate([(row, [-100] * 8), (row[1:], [-100] * 7)], side="left", modality=[2, 3])

    def routings():
        steps = list(generate(model, batch, eos_id=-1, max_new=4))
        assert len(steps) == 4
        return [r for step in steps for r in step.routings]

    own = routings()
    with forced(model, partial(ByModality, shift=1)):
        shifted = routings()
        for i, routing in enumerate(shifted):
            real = routing.gates if i >= 2 else routing.gates[:, 1:]  # without the padding
            assert (real.argmax(-1) == torch.tensor([[3], [0]])).all()
            assert (real[0, :, 2] == 0).all() and (real[1, :, 3] == 0).all()
            assert i >= 2 or routing.gates[1, 0].eq(0).all()
    with forced(model, partial(Alone, expert=1)):
        alone = routings()
    again = routings()  # its own routers are back
    assert len(shifted) == len(alone) == len(again) == len(own) == 8
    assert all((r.gates[:, -1] == torch.tensor([0, 1.0, 0, 0])).all() for r in alone)
    for a, b in zip(own, again, strict=True):
        assert torch.equal(a.gates, b.gates)
