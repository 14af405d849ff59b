"""Routes on disk, recorded and replayed: python -m pytest tests/engine/test_routes.py"""

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from checkpoint import load_model
from config import PRESETS, UserError
from engine import routes
from eval import Predictor
from model import Generated, generate
from routers import Hints, Routing, TopKRouter
from sources.load import load_samples
from tests.mini import mini

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routes")
    PRESETS["mini"] = mini(folder / "parts")
    train.main(["--preset", "mini", "--data", "phantoms:16", "--out", str(folder / "run"),
                "--steps", "2", "--batch-size", "4", "--no-eval", "--router-images", "8",
                "--dtype", "float32"])  # fmt: skip
    yield folder / "run" / "phase3"
    del PRESETS["mini"]


@pytest.fixture
def predictor(checkpoint):
    model, text, _ = load_model(checkpoint, CPU)
    return Predictor(model, text, CPU, torch.float32, batch_size=4, max_new=5)


def forget(model):
    """Other router weights: decisions by these would differ."""
    generator = torch.Generator().manual_seed(3)
    for block in model.decoder.blocks:
        if block.is_sparse:
            for param in block.mlp.router.parameters():
                param.data = torch.randn(param.shape, generator=generator)


def logits_of(model, batch):
    """Of every step -> logits, routings."""
    heads, hook = [], model.decoder.lm_head.register_forward_hook(lambda m, x, y: heads.append(y))
    rounds = list(generate(model, batch, 0, 5))
    hook.remove()
    return heads, [step.routings for step in rounds]


def test_replayed_routes_give_the_same_logits_to_the_last_bit(predictor):
    samples = load_samples(["phantoms:16"], "vqa", "test")[:4]
    ((_, batch),) = predictor.batches(samples, "")
    assert not batch.mask.all()  # there is padding
    before, routings = logits_of(predictor.model, batch)
    recorded = routes.record(routings, batch.mask)
    forget(predictor.model)
    otherwise, _ = logits_of(predictor.model, batch)
    assert not all(torch.equal(a, b) for a, b in zip(before, otherwise, strict=True))
    recorder = routes.RouteRecorder.__new__(routes.RouteRecorder)
    recorder.routes = recorded
    with recorder.replay(predictor.model, range(len(recorded)), batch):
        again, replayed = logits_of(predictor.model, batch)
    assert len(again) == len(before) == 5
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    for mine, theirs in zip(routes.record(replayed, batch.mask), recorded, strict=True):
        assert torch.equal(mine.values, theirs.values)


def test_a_route_holds_a_samples_real_positions_only(predictor):
    samples = load_samples(["phantoms:16"], "vqa", "test")[:9]

    def recorded(some):
        ids = [s.id for s in some]
        recorder = routes.RouteRecorder(predictor.model, ids, None, "unused")
        predictor.answer(some, recorder=recorder)
        return [recorder.taken[i] for i in range(len(some))]

    for route, alone in zip(recorded(samples), samples, strict=True):
        (own,) = recorded([alone])
        assert route.n_prompt == own.n_prompt
        gates, own_gates = route.values[0], own.values[0]
        n = min(len(own_gates), len(gates))
        assert n >= own.n_prompt and gates.shape[1:] == (2, 4)
        torch.testing.assert_close(gates[:n], own_gates[:n], atol=1e-5, rtol=0)
        assert (gates != 0).sum(dim=-1).eq(2).all()  # padding would be routed nowhere


def test_eval_records_and_replays(checkpoint, tmp_path, capsys):
    file, common = str(tmp_path / "r.safetensors"), [str(checkpoint), "--dtype", "float32"]
    common += ["--limit", "20", "--max-new", "4"]
    first = evaluation.main([*common, "--record-routes", file])
    again = evaluation.main([*common, "--replay-routes", file, "--record-routes",
                             str(tmp_path / "again.safetensors")])  # fmt: skip
    assert first["answers"] == again["answers"] and first["load"] == again["load"]
    before, after = load_file(file), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_replayed_routes_win_over_the_router(checkpoint, tmp_path):
    """Every gate in the file moved to the last expert: all tokens go there."""
    file, moved = tmp_path / "r.safetensors", tmp_path / "moved.safetensors"
    common = [str(checkpoint), "--limit", "6", "--max-new", "3", "--dtype", "float32"]
    evaluation.main([*common, "--record-routes", str(file)])
    tensors = load_file(file)
    for values in tensors.values():
        values[0] = torch.nn.functional.one_hot(torch.full(values.shape[1:3], 3), 4)
    with routes.safe_open(file, "pt") as opened:
        save_file(tensors, moved, opened.metadata())
    found = evaluation.main([*common, "--replay-routes", str(moved)])
    assert all(layer == [0, 0, 0, 1] for layers in found["load"].values() for layer in layers)


def test_the_router_does_not_run_where_its_routings_are_replayed():
    class Never(TopKRouter):
        def gate(self, logits, mask, x):
            raise AssertionError

    known = Routing(torch.rand(1, 3, 4), torch.rand(1, 3, 4))
    router = routes.Replayed(Never(8, 4, level="sequence"), iter([known]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert router(torch.rand(1, 3, 8), mask, Hints(previous=known)) is known


def test_what_does_not_fit_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    file = tmp_path / "r.safetensors"
    common = [str(checkpoint), "--dtype", "float32", "--max-new", "3"]
    evaluation.main([*common, "--limit", "4", "--record-routes", str(file)])
    tensors = load_file(file)

    def refused(words, *more, limit="4"):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main([*common, "--limit", limit, *map(str, more)])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and words in error, error

    def written(change=lambda values: values, more=0):
        path, header = tmp_path / "bad.safetensors", {}
        with routes.safe_open(file, "pt") as opened:
            header = {name: str(int(n) + more) for name, n in opened.metadata().items()}
        save_file({k: change(v).contiguous() for k, v in tensors.items()}, path, header)
        return path

    refused("1 of 5 questions are not in it", "--replay-routes", file, limit="5")
    refused("cannot be read", "--replay-routes", tmp_path / "none.safetensors")
    file.with_name("torn.safetensors").write_bytes(file.read_bytes()[:-9])
    refused("cannot be read", "--replay-routes", tmp_path / "torn.safetensors")
    refused(
        "not of 2 sparse layers and 4 experts", "--replay-routes", written(lambda v: v[..., :3])
    )
    refused("not of 2 sparse", "--replay-routes", written(lambda v: v[:, :0]))
    refused("not of 2 sparse", "--replay-routes", written(lambda v: v[0]))
    refused("not of 2 sparse", "--replay-routes", written(more=10**6))
    refused("a prompt has", "--replay-routes", written(more=1))
    dense = checkpoint.with_name("phase2")
    with pytest.raises(SystemExit):
        evaluation.main([str(dense), "--limit", "4", "--record-routes", str(file)])
    assert "dense model has no routes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluation.main(["--predictions", "x.jsonl", "--replay-routes", str(file)])
    assert "only for a checkpoint" in capsys.readouterr().err


def test_an_answer_longer_than_its_route_is_refused():
    route = routes.Route(torch.zeros(2, 7, 2, 4), 5)  # an answer of two tokens
    recorder = routes.RouteRecorder.__new__(routes.RouteRecorder)
    recorder.routes, recorder.file = [route], None

    def check(tokens):
        steps = [Generated(torch.tensor([token]), []) for token in tokens]
        recorder.record(steps, [0], None, eos_id=0)

    check([4, 5, 0, 0])
    with pytest.raises(UserError, match="longer"):
        check([4, 5, 6, 0])
    check([4, 5, 6])  # cut off, as it was before
