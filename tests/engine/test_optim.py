"""AdamW is torch's Adam without decay, also for weights in bf16; stochastic rounding is right."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import train
from checkpoint import load_model
from config import PRESETS, TrainConfig, UserError
from engine.optim import cast_weights, make_optimizer, stochastic_round
from ops import local
from tests.mini import mini, same, weights
from tests.one_step import stopped_after_a_checkpoint

NARROW = ("bf16", "bf16-stochastic")
BF16 = torch.bfloat16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["float32", *NARROW])
def test_it_is_torchs_adam_without_decay_whatever_the_weights_are(mode):
    dtype = torch.float32 if mode == "float32" else BF16
    ours = {"matrix": (5, 7), "stacked": (2, 3, 4), "bias": (6,), "router": (4, 4), "unused": (2,)}
    ours = {n: nn.Parameter(normal(*s).bfloat16().to(dtype)) for n, s in ours.items()}
    ours["router"] = nn.Parameter(normal(4, 4, seed=8))  # fp32 among the narrower ones
    theirs = {n: nn.Parameter(p.detach().clone().float()) for n, p in ours.items()}
    optimizer, adam = make_optimizer(ours, 1.0, mode), torch.optim.Adam(theirs.values())
    for i in range(50):
        adam.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 50)
        for j, name in enumerate(ours):
            if name != "unused":
                grad = normal(*ours[name].shape, seed=100 * i + j).to(ours[name].dtype)
                ours[name].grad, theirs[name].grad = grad, grad.float()
        optimizer.step()
        adam.step()
    assert torch.equal(ours["unused"], theirs["unused"]) and len(optimizer.state) == 4
    for name in ("matrix", "stacked", "bias", "router"):
        param, state, reference = ours[name], optimizer.state[ours[name]], adam.state[theirs[name]]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert state[key].dtype == torch.float32
            torch.testing.assert_close(state[key], reference[key], atol=1e-6, rtol=1e-5)
        if mode != "bf16-stochastic" or name == "router":
            exact = state.get("master", param)
            torch.testing.assert_close(exact, theirs[name], atol=1e-6, rtol=0)
            assert torch.equal(param, exact.to(param.dtype))
        assert ("master" in state) == (mode == "bf16" and name != "router")


def test_stochastic_rounding_is_right_on_average():
    x, n = torch.tensor([1.0001, -1.0001, 1.003, -0.0123456, 3.14159, 1e-30, -7e8, 65504.1]), 40000
    cut, further = (((x.view(torch.int32) >> 16) + i << 16).view(torch.float32) for i in (0, 1))
    below, above = torch.minimum(cut, further), torch.maximum(cut, further)  # of bf16's values
    torch.manual_seed(0)
    found = stochastic_round(x.expand(n, -1).contiguous()).double()
    assert ((found == below) | (found == above)).all()
    share = (x.double() - below) / (above.double() - below)  # how likely it is rounded up
    deviation = (above.double() - below) * (share * (1 - share) / n).sqrt()
    assert ((found.mean(dim=0) - x).abs() < 4 * deviation).all()
    assert share.min() < 0.05 and share.max() > 0.7  # near either end, and between


def test_what_bf16_can_hold_stays_nans_stay_nans_and_the_largest_rounds_to_infinity():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16).repeat(10)
    torch.manual_seed(0)
    found, is_nan = stochastic_round(every.float()), every.isnan()
    assert torch.equal(found.isnan(), is_nan) and is_nan.any()
    assert torch.equal(found.view(torch.int16)[~is_nan], every.view(torch.int16)[~is_nan])
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    assert stochastic_round(nans.view(torch.float32).repeat(1000)).isnan().all()
    found = stochastic_round(torch.full((5000,), -torch.finfo(torch.float32).max))
    assert {*found.tolist()} <= {-math.inf, -torch.finfo(BF16).max}


def test_steps_too_small_for_bf16_add_up_with_copies_or_stochastic_rounding_but_not_without():
    """Adam's steps are the rate where the gradient is constant: 1000 of 1e-4 from weights of 1."""
    ended = {}
    for mode in (*NARROW, "plain"):
        param = nn.Parameter(torch.ones(500, dtype=BF16))
        optimizer = (torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0) if mode == "plain"
                     else make_optimizer({"w": param}, 1e-4, mode))  # fmt: skip
        torch.manual_seed(0)
        for _ in range(1000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ended[mode] = param.detach().float()
    assert torch.equal(ended["plain"], torch.ones(500))  # nothing was learnt
    torch.testing.assert_close(ended["bf16"], torch.full((500,), 0.9), atol=2e-3, rtol=0)
    assert ended["bf16-stochastic"].mean().item() == pytest.approx(0.9, abs=2e-3)
    assert 0.005 < ended["bf16-stochastic"].std() < 0.03  # each by itself is a random walk


def test_copies_are_made_where_stochastic_steps_go_on_with_them():
    param = nn.Parameter(torch.ones(3, dtype=BF16))
    param.grad = torch.ones_like(param)
    first, second = (make_optimizer({"w": param}, 1e-4, mode) for mode in reversed(NARROW))
    first.step()
    second.state[param] |= first.state[param]
    second.step()
    assert (second.state[param]["master"] < param).all()  # the step that param cannot show


@pytest.mark.parametrize("mode", NARROW)
def test_parameters_that_fsdp_has_split_are_updated_alike(mode):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, found = init_device_mesh("cpu", (1,)), []
    try:
        for split in (lambda t: t, lambda t: distribute_tensor(t, mesh, [Shard(0)])):
            param = nn.Parameter(split(normal(6, 4).bfloat16()))
            optimizer = make_optimizer({"w": param}, 1e-2, mode)
            torch.manual_seed(0)
            for seed in (1, 2):
                param.grad = split(normal(6, 4, seed=seed).bfloat16())
                optimizer.step()
            found.append(local(param).detach())
    finally:
        dist.destroy_process_group()
    assert torch.equal(*found) and not torch.equal(found[0], normal(6, 4).bfloat16())


def test_all_weights_are_cast_but_the_routers(build):
    model = build("phi", {"router": "topk"})
    before = copy.deepcopy(model)
    cast_weights(model, BF16)
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"decoder.blocks.{i}.mlp.router.proj.{kind}" for i in (0, 2)
                    for kind in ("weight", "bias")}  # fmt: skip
    for name, param in model.named_parameters():
        assert torch.equal(param, before.get_parameter(name).to(param.dtype))


@pytest.mark.parametrize("mode", NARROW)
def test_an_interrupted_run_in_bf16_goes_on_bit_for_bit(tmp_path, monkeypatch, mode):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "parts"))

    def run(name, *more):
        train.main(["--preset", "mini", "--data", "phantoms:8", "--out", str(tmp_path / name),
                    "--steps", "3", "--save-every", "2", "--no-eval", "--router-images", "8",
                    "--dtype", "bfloat16", "--weights", mode, "--router", "topk",
                    *more])  # fmt: skip

    run("whole")
    with stopped_after_a_checkpoint(), pytest.raises(SystemExit):
        run("halves")
    run("halves", "--resume")
    for number in (1, 2, 3):
        whole, halves = (weights(tmp_path / n / f"phase{number}") for n in ("whole", "halves"))
        assert same(whole, halves)
        assert {t.dtype for n, t in whole.items() if ".router." not in n} == {BF16}
    routers = {n: t.dtype for n, t in whole.items() if ".router." in n}
    assert len(routers) == 4 and {*routers.values()} == {torch.float32}
    model, _, _ = load_model(tmp_path / "whole" / "phase3", torch.device("cpu"))
    assert same(dict(model.named_parameters()), whole)


@pytest.mark.parametrize("mode", NARROW)
def test_bf16_weights_with_matmuls_in_float32_are_refused(mode):
    with pytest.raises(UserError, match=f"--weights {mode}"):
        train.resolve(TrainConfig(phase=1, dtype="float32", weights=mode))
    assert train.resolve(TrainConfig(phase=1, dtype="bfloat16", weights=mode)).weights == mode
