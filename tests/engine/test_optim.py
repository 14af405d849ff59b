"""AdamW for weights kept in bf16, and stochastic rounding."""

import copy
import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import eval as scoring_script
import train
from checkpoint import load_model
from config import IGNORE, IMAGE_ID, DecoderConfig, ModelConfig, TrainConfig, UserError
from engine.optim import cast_weights, make_optimizer, stochastic_round
from model import MedMoE
from sources.tensorfiles import open_tensors
from tests.one_step import stopped_after_a_checkpoint

MODES = ("float32", "bf16", "bf16-stochastic")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def neighbours(x):
    """The bf16 values below and above fp32 x, in order: by cutting, and one step away from 0."""
    cut = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    further = ((x.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    return torch.minimum(cut, further), torch.maximum(cut, further)


def test_copies_follow_torchs_adamw_and_the_weights_are_the_copies_rounded():
    shapes = {"matrix": (5, 7), "stacked": (2, 3, 4), "bias": (6,)}
    start = {n: normal(*s, seed=i).bfloat16() for i, (n, s) in enumerate(shapes.items())}
    ours = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    ours["wide"] = nn.Parameter(normal(4, 4, seed=8))  # a router's weight, or an addition's
    theirs = {n: nn.Parameter(p.detach().float()) for n, p in ours.items()}
    narrow = make_optimizer(ours, 1e-3, "bf16")
    exact = make_optimizer(theirs, 1e-3, "float32")
    assert type(exact) is torch.optim.AdamW and exact.defaults["weight_decay"] == 0
    for i in range(50):
        for optimizer in (narrow, exact):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 50)
        for j, name in enumerate(ours):
            grad = normal(*ours[name].shape, seed=100 * i + j).to(ours[name].dtype)
            ours[name].grad, theirs[name].grad = grad, grad.float()
        narrow.step()
        exact.step()
    assert all(not torch.equal(ours[n], t) for n, t in start.items())
    for name, param in ours.items():
        state, reference = narrow.state[param], exact.state[theirs[name]]
        master = state.get("master", param)
        torch.testing.assert_close(master, theirs[name], atol=1e-6, rtol=0)
        assert torch.equal(param, master.to(param.dtype))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert state[key].dtype == torch.float32
            torch.testing.assert_close(state[key], reference[key], atol=1e-6, rtol=1e-5)
        assert ("master" in state) == (name != "wide")


def test_stochastic_the_first_step_is_adams_rounded_to_a_neighbour_and_no_copy_is_kept():
    start, grad = normal(1000).bfloat16(), normal(1000, seed=1).bfloat16()
    narrow, wide, theirs = (nn.Parameter(t) for t in (start.clone(), start.float(), start.float()))
    narrow.grad, wide.grad, theirs.grad = grad, grad.float(), grad.float()
    optimizer = make_optimizer({"narrow": narrow, "wide": wide}, 1e-2, "bf16-stochastic")
    torch.manual_seed(0)
    optimizer.step()
    make_optimizer({"w": theirs}, 1e-2, "float32").step()
    torch.testing.assert_close(wide, theirs, atol=1e-6, rtol=0)
    below, above = neighbours(wide.detach())
    moved = narrow.detach().float()
    assert ((moved == below) | (moved == above)).all()
    assert 300 < (moved == below).sum() < 700
    assert set(optimizer.state[narrow]) == {"step", "exp_avg", "exp_avg_sq"}


def test_copies_are_made_where_a_run_with_stochastic_rounding_goes_on_with_them():
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    first = make_optimizer({"w": param}, 1e-4, "bf16-stochastic")
    first.step()
    second = make_optimizer({"w": param}, 1e-4, "bf16")
    second.state[param] |= first.state[param]
    second.step()
    assert (second.state[param]["master"] < param).all()  # the step that param cannot show


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([1.0001, -1.0001, 1.003, -0.0123456, 3.14159, 1e-30, -7e8, 65504.1])
    below, above = neighbours(x)
    torch.manual_seed(0)
    n = 40000
    found = stochastic_round(x.expand(n, -1).contiguous()).double()
    assert ((found == below) | (found == above)).all()  # never further than one step
    share = (x.double() - below) / (above.double() - below)  # how likely it is rounded up
    deviation = (above.double() - below) * (share * (1 - share) / n).sqrt()
    assert ((found.mean(dim=0) - x).abs() < 4 * deviation).all()
    assert share.min() < 0.05 and share.max() > 0.7  # near either end, and between


def test_what_bf16_can_hold_stays_as_it_is():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    every = every.repeat(30)  # 2 million roundings
    torch.manual_seed(0)
    found = stochastic_round(every.float())  # zeros of both signs, infinities, NaNs, denormals
    assert torch.equal(found.isnan(), every.isnan()) and every.isnan().any()
    number = ~every.isnan()
    assert torch.equal(found.view(torch.int16)[number], every.view(torch.int16)[number])


def test_nans_stay_nans_and_numbers_beyond_the_largest_round_to_it_or_to_infinity():
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    torch.manual_seed(0)
    assert stochastic_round(nans.view(torch.float32).repeat(1000)).isnan().all()
    largest = torch.finfo(torch.float32).max
    found = stochastic_round(torch.full((5000,), -largest))
    assert (
        set(found.tolist()) == {-math.inf, -torch.finfo(torch.bfloat16).max} or found.isinf().all()
    )


def test_another_seed_rounds_otherwise_and_the_same_seed_alike():
    x, found = normal(1000), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(stochastic_round(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_steps_too_small_for_bf16_add_up_with_copies_or_stochastic_rounding_but_not_without():
    """Adam's steps are the rate where the gradient is constant: 1000 of 1e-4 from weights of 1."""
    ended = {}
    for mode in (*MODES, "plain"):
        dtype = torch.float32 if mode == "float32" else torch.bfloat16
        param = nn.Parameter(torch.ones(500, dtype=dtype))
        if mode == "plain":
            optimizer = torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0)
        else:
            optimizer = make_optimizer({"w": param}, 1e-4, mode)
        torch.manual_seed(0)
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ended[mode] = param.detach().float()
    assert torch.equal(ended["plain"], torch.ones(500))  # nothing was learnt
    torch.testing.assert_close(ended["float32"], torch.full((500,), 0.9), atol=1e-4, rtol=0)
    torch.testing.assert_close(ended["bf16"], torch.full((500,), 0.9), atol=2e-3, rtol=0)
    stochastic = ended["bf16-stochastic"]
    assert stochastic.mean().item() == pytest.approx(0.9, abs=2e-3)
    assert 0.005 < stochastic.std() < 0.03  # a walk: each weight by itself is less exact


def weights_and_routers(model):
    return {n: p for n, p in model.named_parameters() if ".router." not in n}, {
        n: p for n, p in model.named_parameters() if ".router." in n
    }


def test_all_weights_are_cast_but_the_routers(build):
    model = build("phi", {"router": "topk"})
    before = copy.deepcopy(model)
    cast_weights(model, torch.bfloat16)
    weights, routers = weights_and_routers(model)
    assert routers and all(torch.equal(p, before.get_parameter(n)) for n, p in routers.items())
    assert all(p.dtype == torch.float32 for p in routers.values())
    assert all(torch.equal(p, before.get_parameter(n).bfloat16()) for n, p in weights.items())


def test_a_tied_head_stays_tied(build):
    decoder = DecoderConfig("llama", 64, 32, 1, 4, 48, rotary_dim=8, tied=True)
    model = MedMoE(ModelConfig(build().config.vision, decoder))
    cast_weights(model, torch.bfloat16)
    assert model.decoder.lm_head.weight is model.decoder.embed.weight


@pytest.fixture
def batch(collate):
    image = [IMAGE_ID] * 4
    rows = [[1, *image, 7, 8, 9, 10, 2], [1, 5, 3, 12, 4, 2], [1, *image, 11, 6, 2]]
    return collate([(ids, [IGNORE if i == IMAGE_ID else i for i in ids]) for ids in rows])


@pytest.mark.parametrize(
    ("family", "moe"),
    [("phi", {"router": "topk"}), ("stablelm", None), ("llama", {"layers": (0, 1, 2)})],
)
def test_every_family_learns_alike_in_every_mode(build, batch, family, moe):
    """30 steps on one batch, matmuls in bf16: the loss falls as far, and almost as fast."""
    losses = {}
    for mode in MODES:
        model = build(family, moe)
        for param in model.parameters():
            param.data *= 0.5  # nearer to what a network begins with
        if mode != "float32":
            cast_weights(model, torch.bfloat16)
        named = dict(model.named_parameters())
        optimizer = make_optimizer(named, 3e-3, mode)
        torch.manual_seed(0)
        losses[mode] = []
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                out = model.loss(batch)
            (out.total / out.n_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(out.total.item() / out.n_tokens)
        kinds = {n: p.dtype for n, p in named.items() if ".router." not in n}
        wanted = torch.float32 if mode == "float32" else torch.bfloat16
        assert set(kinds.values()) == {wanted}
    exact = torch.tensor(losses["float32"])
    assert exact[-1] < 0.5 * exact[0]
    for mode in MODES[1:]:
        torch.testing.assert_close(torch.tensor(losses[mode]), exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_goes_on_bit_for_bit_from_its_saved_tensors(mode):
    """As engine/run.py keeps them: every tensor of every parameter's state by its name."""

    def run(param, optimizer, steps):
        for i in steps:
            param.grad = normal(40, seed=i).to(param.dtype)
            optimizer.step()

    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    param = nn.Parameter(normal(40).to(dtype))
    optimizer = make_optimizer({"w": param}, 1e-2, mode)
    torch.manual_seed(0)
    run(param, optimizer, range(5))
    weight, rng = param.detach().clone(), torch.get_rng_state()
    saved = {k: t.clone() for k, t in optimizer.state[param].items()}
    run(param, optimizer, range(5, 10))
    again = nn.Parameter(weight)
    optimizer_again = make_optimizer({"w": again}, 1e-2, mode)
    optimizer_again.state[again] |= saved
    torch.set_rng_state(rng)
    run(again, optimizer_again, range(5, 10))
    assert torch.equal(param, again)
    for key, tensor in optimizer.state[param].items():
        assert torch.equal(tensor, optimizer_again.state[again][key])


@pytest.mark.parametrize("mode", MODES[1:])
def test_parameters_that_fsdp_has_split_are_updated_alike(mode):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, found = init_device_mesh("cpu", (1,)), []
        for split in (False, True):
            tensors = [normal(6, 4, seed=s).bfloat16() for s in (0, 1, 2)]
            if split:
                tensors = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]
            param = nn.Parameter(tensors[0])
            optimizer = make_optimizer({"w": param}, 1e-2, mode)
            torch.manual_seed(0)
            for grad in tensors[1:]:
                param.grad = grad
                optimizer.step()
            state = optimizer.state[param]
            assert all(isinstance(t, DTensor) == split for k, t in state.items() if k != "step")
            found.append(param.full_tensor() if split else param.detach())
        assert torch.equal(*found) and not torch.equal(found[0], normal(6, 4).bfloat16())
    finally:
        dist.destroy_process_group()


def run(out, *argv):
    train.main(["--data", "phantoms:24", "--out", str(out), "--batch-size", "8", "--no-eval",
                "--router-images", "20", "--dtype", "bfloat16", *argv])  # fmt: skip


def test_a_run_in_bf16_leaves_checkpoints_in_bf16_that_can_be_scored(tmp_path):
    run(tmp_path, "--steps", "2", "--weights", "bf16-stochastic", "--router", "topk")
    for number in (1, 2, 3):
        stored = dict(open_tensors(tmp_path / f"phase{number}" / "model.safetensors"))
        kinds = {t.dtype for n, t in stored.items() if ".router." not in n}
        assert kinds == {torch.bfloat16}
    routers = {n: t for n, t in stored.items() if ".router." in n}
    assert routers and all(t.dtype == torch.float32 for t in routers.values())
    model, _, _ = load_model(tmp_path / "phase3", torch.device("cpu"))
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    assert all(p.dtype == stored[n].dtype for n, p in model.named_parameters())
    for dtype in ("bfloat16", "float32"):
        file = tmp_path / f"{dtype}.json"
        scoring_script.main([str(tmp_path / "phase3"), "--data", "phantoms:24", "--limit", "8",
                             "--dtype", dtype, "--json", str(file)])  # fmt: skip
        assert json.loads(file.read_text())["n"] == 8


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, mode):
    run(tmp_path / "one", "--phase", "1", "--steps", "1")
    argv = ("--init", str(tmp_path / "one" / "phase1"), "--phase", "2", "--steps", "3",
            "--save-every", "2", "--weights", mode)  # fmt: skip
    run(tmp_path / "whole", *argv)
    modes = []
    monkeypatch.setattr(
        train, "make_optimizer", lambda *a: modes.append(a[2]) or make_optimizer(*a)
    )
    with stopped_after_a_checkpoint(), pytest.raises(SystemExit):
        run(tmp_path / "halves", *argv)
    run(tmp_path / "halves", *argv, "--resume")
    assert modes == [mode, mode]
    whole, halves = (
        dict(open_tensors(tmp_path / name / "phase2" / "model.safetensors"))
        for name in ("whole", "halves")
    )
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[n], halves[n]) for n in whole)


@pytest.mark.parametrize("mode", MODES[1:])
def test_bf16_weights_with_matmuls_in_float32_are_refused(mode):
    with pytest.raises(UserError, match=f"--weights {mode}: needs --dtype bfloat16"):
        train.resolve(TrainConfig(phase=1, dtype="float32", weights=mode))
    assert train.resolve(TrainConfig(phase=1, dtype="bfloat16", weights=mode)).weights == mode
