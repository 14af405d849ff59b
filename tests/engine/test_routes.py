"""Routes: recorded, kept in a file, and replayed to the last bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import metrics
from checkpoint import load_model
from config import UserError
from engine import routes
from engine.routes import Route, RouteRecorder
from eval import Predictor
from model import Generated
from routers import Hints, Routing, TopKRouter
from sources.load import load_samples
from tests import mini
from tests.mini import same

MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two sparse layers and four experts, top-2."""
    return mini.checkpoint(tmp_path_factory.mktemp("routes") / "phase3")


@pytest.fixture
def predictor(folder):
    model, text, _ = load_model(folder, torch.device("cpu"))
    return Predictor(model, text, torch.device("cpu"), torch.float32, batch_size=4, max_new=5)


def steps_of(n, seed=0):
    """Routings of a prompt of four positions and n - 1 tokens: 2 samples, 2 layers, 3 experts."""
    torch.manual_seed(seed)
    return [[Routing(*torch.rand(2, 2, t, 3)) for _ in range(2)] for t in (4, *[1] * (n - 1))]


def test_a_route_has_gates_and_logits_of_a_samples_own_positions_in_order():
    steps = steps_of(3)
    first, second = routes.record(steps, MASK)
    assert (first.n_prompt, second.n_prompt) == (2, 4)
    assert first.values.shape == (2, 4, 2, 3) and second.values.shape == (2, 6, 2, 3)
    for b, (route, pad) in enumerate(((first, 2), (second, 0))):
        for layer in (0, 1):
            for kind in (0, 1):  # gates, logits
                whole = torch.cat([step[layer][kind][b] for step in steps])  # (6, 3)
                assert torch.equal(route.values[kind, :, layer], whole[pad:])


def test_replayed_are_the_same_routings_with_zeros_for_padding_and_the_last_again_at_the_end():
    steps = steps_of(3)
    recorded = routes.record(steps, MASK)
    shorter = Route(recorded[0].values[:, :3], 2)  # the first sample ended a step earlier
    replayed = routes.replay([shorter, recorded[1]], MASK)
    found = [next(replayed) for _ in range(5)]
    for layer in (0, 1):
        for kind in (0, 1):
            a, b, c, d, e = (step[layer][kind] for step in found)
            assert torch.equal(a, steps[0][layer][kind] * MASK[..., None])
            assert torch.equal(b, steps[1][layer][kind])
            assert torch.equal(c[0], b[0]) and torch.equal(c[1], steps[2][layer][kind][1])
            assert torch.equal(d, c) and torch.equal(e, c)
    with pytest.raises(UserError, match="4 positions, 3"):
        next(routes.replay([recorded[0], recorded[1]._replace(n_prompt=3)], MASK))


def test_the_router_does_not_run_where_its_routings_are_replayed():
    class Never(TopKRouter):
        def gate(self, logits, mask, x):
            raise AssertionError

    known = Routing(torch.rand(1, 3, 4), torch.rand(1, 3, 4))
    router = routes.Replayed(Never(8, 4, level="sequence"), iter([known]))
    assert router(torch.rand(1, 3, 8), torch.ones(1, 3).bool(), Hints(previous=known)) is known


def test_routers_are_put_back_even_after_an_error(predictor):
    layers = [block.mlp for block in predictor.model.decoder.blocks if block.is_sparse]
    before, other = [mlp.router for mlp in layers], [TopKRouter(16, 4) for _ in layers]
    with pytest.raises(ZeroDivisionError), routes.replaced_routers(predictor.model, other):
        assert [mlp.router for mlp in layers] == other
        raise ZeroDivisionError
    assert [mlp.router for mlp in layers] == before and len(before) == 2


def test_a_file_of_routes_gives_the_same_logits_to_the_last_bit_whatever_the_routers(
    predictor, tmp_path
):
    samples = load_samples(["phantoms:8"], "vqa", "test")[:6]  # two batches, with padding
    ids, model, found = [s.id for s in samples], predictor.model, []
    model.decoder.lm_head.register_forward_hook(lambda m, x, y: found[-1].append(y.clone()))

    def logits(read, written):
        read, written = (file and str(tmp_path / file) for file in (read, written))
        recorder = RouteRecorder(model, ids, read, written)
        found.append([])
        predictor.answer(samples, recorder=recorder)
        recorder.save()
        return found[-1]

    before = logits(None, "a.safetensors")
    for block in model.decoder.blocks[::2]:
        torch.nn.init.normal_(block.mlp.router.proj.weight)  # other decisions
    again, otherwise = logits("a.safetensors", "b.safetensors"), logits(None, None)
    assert len(before) == 10 and all(map(torch.equal, before, again))
    assert not all(map(torch.equal, before, otherwise))
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert same(a, b) and a.keys() == {*ids} and len(samples) == 6
    for sample in samples[:2]:  # alone, without padding, it takes the same routes
        recorder = RouteRecorder(model, [sample.id], str(tmp_path / "a.safetensors"), "unused")
        predictor.answer([sample], recorder=recorder)
        assert torch.equal(recorder.taken[0].values, a[sample.id])
        assert ((a[sample.id][0] != 0).sum(dim=-1) == 2).all()


def test_eval_records_and_then_replays_what_the_file_says(folder, tmp_path, monkeypatch):
    """Every gate in the file is moved to the last expert: all tokens go there."""
    monkeypatch.setattr(metrics.bootstrap, "__defaults__", (10,))  # intervals are not looked at
    file, moved, again = (tmp_path / f"{name}.safetensors" for name in ("r", "moved", "again"))
    common = [str(folder), "--limit", "3", "--max-new", "2", "--dtype", "float32"]
    evaluation.main([*common, "--record-routes", str(file)])
    tensors = load_file(file)
    for values in tensors.values():
        values[0] = torch.tensor([0, 0, 0, 1.0])
    with routes.safe_open(file, "pt") as opened:
        save_file(tensors, moved, opened.metadata())
    found = evaluation.main([*common, "--replay-routes", str(moved), "--record-routes", str(again)])
    loads = [layer for layers in found["load"].values() for layer in layers]
    assert loads and all(layer == [0, 0, 0, 1] for layer in loads)
    assert len(tensors) == 3 and all(same(load_file(f), tensors) for f in (moved, again))


def test_dense_models_have_no_routes_and_files_of_answers_neither(folder, tmp_path, capsys):
    dense = mini.checkpoint(tmp_path / "phase2", None)
    for what, named in ((str(dense), "dense"), ("--predictions=x.jsonl", "only for a checkpoint")):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main([what, "--limit", "1", "--record-routes", str(tmp_path / "r")])
        assert stopped.value.code == 2 and named in capsys.readouterr().err


def stored(n_prompt, *shape):
    return lambda path: save_file({"q": torch.zeros(shape)}, path, {"q": n_prompt})


@pytest.mark.parametrize(
    "write",
    [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9]),
     lambda path: save_file({"r": torch.zeros(2, 5, 3, 4)}, path, {"r": "2"}),
     lambda path: save_file({"q": torch.zeros(2, 5, 3, 4)}, path),
     stored("two", 2, 5, 3, 4), stored("0", 2, 5, 3, 4), stored("6", 2, 5, 3, 4),
     stored("0", 2, 0, 3, 4), stored("2", 1, 10, 3, 4), stored("2", 2, 5, 4, 3),
     stored("2", 5, 3, 4)],
)  # fmt: skip
def test_a_file_that_is_damaged_or_does_not_fit_is_refused(tmp_path, write):
    path, values = tmp_path / "r.safetensors", torch.rand(2, 5, 3, 4)
    routes.save_routes(path, {"q": Route(values.flip(0), 5), "r": Route(values, 3)})
    r, q = routes.load_routes(path, ["r", "q"], (3, 4))
    assert (q.n_prompt, r.n_prompt) == (5, 3)
    assert torch.equal(q.values, values.flip(0)) and torch.equal(r.values, values)
    write(path)
    with pytest.raises(UserError, match=f"--replay-routes {path}"):
        routes.load_routes(path, ["q"], (3, 4))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--record-routes {tmp_path / 'no' / 'r'}"):
        routes.save_routes(tmp_path / "no" / "r", {"q": Route(torch.ones(2, 5, 3, 4), 5)})


def test_an_answer_longer_than_its_route_is_refused(predictor):
    recorder = RouteRecorder(predictor.model, ["q"], None, None)
    recorder.routes = [Route(torch.zeros(2, 7, 2, 4), 5)]  # an answer of two tokens

    def check(*tokens):
        recorder.record([Generated(torch.tensor([t]), []) for t in tokens], [0], None, eos_id=0)

    check(4, 5, 0, 0)
    check(4, 5, 6)  # cut off, as it was before
    with pytest.raises(UserError, match="longer"):
        check(4, 5, 6, 0)
