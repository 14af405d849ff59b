"""Routes: recorded, kept in a file, and replayed to the last bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from config import UserError
from engine import routes
from routers import Routing
from tests.mini import same

MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()


def test_recorded_are_a_samples_own_positions_and_they_are_replayed_to_its_end():
    torch.manual_seed(0)  # a prompt of four positions and two tokens; 2 samples, layers; 3 experts
    steps = [[Routing(*torch.rand(2, 2, t, 3)) for _ in range(2)] for t in (4, 1, 1)]
    first, second = routes.record(steps, MASK)
    assert first.values.shape == (2, 4, 2, 3) and second.values.shape == (2, 6, 2, 3)
    shorter = routes.Route(first.values[:, :3], 2)  # the first sample ended a step earlier
    replayed = routes.replay([shorter, second], MASK)
    found = [next(replayed) for _ in range(4)]
    for layer, kind in ((0, 0), (0, 1), (1, 0), (1, 1)):  # gates, logits
        made, (a, b, c, d) = ([s[layer][kind] for s in part] for part in (steps, found))
        assert torch.equal(first.values[kind, :, layer], torch.cat(made, dim=1)[0, 2:])
        assert torch.equal(a, made[0] * MASK[..., None]) and torch.equal(b, made[1])
        assert torch.equal(c[0], b[0]) and torch.equal(c[1], made[2][1])
        assert torch.equal(d, c)  # the last again, and again
    with pytest.raises(UserError, match="4 positions, 3"):
        next(routes.replay([first, second._replace(n_prompt=3)], MASK))


def test_eval_records_and_then_replays_what_the_file_says(phase3, tmp_path):
    """Every gate in the file is moved to the last expert: all tokens go there."""
    file, moved, again = (tmp_path / f"{name}.safetensors" for name in ("r", "moved", "again"))
    common = [str(phase3), "--limit", "3", "--max-new", "2", "--dtype", "float32"]
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


def test_an_answer_longer_than_its_route_is_refused(build):
    recorder = routes.RouteRecorder(build(moe={}), ["p", "q"], None, None)
    recorder.routes = [routes.Route(torch.zeros(2, n, 2, 4), 5) for n in (9, 7)]
    steps = [routes.Generated(torch.tensor([4, token]), []) for token in (4, 5, 6, 0)]
    for fits in (steps[:3], [*steps[:2], steps[3], steps[3]]):  # the last token needs no route
        recorder.record(fits, [0, 1], None, eos_id=0)
    with pytest.raises(UserError, match="--replay-routes: the answer to q became longer"):
        recorder.record(steps, [0, 1], None, eos_id=0)


def test_a_file_keeps_routes_and_what_is_damaged_or_does_not_fit_is_refused(tmp_path):
    path, values = tmp_path / "r.safetensors", torch.rand(2, 5, 3, 4)
    routes.save_routes(path, {"q": routes.Route(values.flip(0), 5), "r": routes.Route(values, 3)})
    r, q = routes.load_routes(path, ["r", "q"], (3, 4))
    assert (q.n_prompt, r.n_prompt) == (5, 3)
    assert torch.equal(q.values, values.flip(0)) and torch.equal(r.values, values)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(path.read_bytes()[:-9])
    save_file({"q": values}, outside := tmp_path / "outside", {"q": "6"})
    for file, ids, shape in ((path, ["q", "s"], (3, 4)), (path, ["q"], (4, 3)),
                             (damaged, ["q"], (3, 4)), (outside, ["q"], (3, 4))):  # fmt: skip
        with pytest.raises(UserError, match=f"--replay-routes {file}"):
            routes.load_routes(file, ids, shape)
    with pytest.raises(UserError, match=f"--record-routes {path / 'r'}"):
        routes.save_routes(path / "r", {"q": routes.Route(values, 5)})
    with pytest.raises(UserError, match="1 of 2 questions are not in it: s"):
        routes.load_routes(path, ["q", "s"], (3, 4))
