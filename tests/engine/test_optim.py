"""AdamW is torch's Adam without decay, also for weights in bf16; stochastic rounding is right."""

import pytest
import torch
from torch import nn

import train
from config import PRESETS
from engine.optim import make_optimizer, stochastic_round
from tests.conftest import randn
from tests.mini import mini, same, weights
from tests.one_step import stopped_after_a_checkpoint

BF16 = torch.bfloat16


@pytest.mark.parametrize("mode", ["float32", "bf16", "bf16-stochastic"])
def test_it_is_torchs_adam_without_decay_whatever_the_weights_are(mode):
    dtype = torch.float32 if mode == "float32" else BF16
    ours = {"matrix": (5, 7), "stacked": (2, 3, 4), "bias": (6,), "router": (4, 4), "unused": (2,)}
    ours = {n: nn.Parameter(randn(*s, dtype=BF16).to(dtype)) for n, s in ours.items()}
    ours["router"] = nn.Parameter(randn(4, 4, seed=8))  # fp32 among the narrower ones
    theirs = {n: nn.Parameter(p.detach().clone().float()) for n, p in ours.items()}
    optimizer, adam = make_optimizer(ours, 1.0, mode), torch.optim.Adam(theirs.values())
    for i in range(50):
        adam.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 50)
        for j, name in enumerate(ours):
            if name != "unused":
                grad = randn(*ours[name].shape, seed=100 * i + j).to(ours[name].dtype)
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
        else:  # 50 times rounded, by 1/256 of itself at most
            torch.testing.assert_close(param.float(), theirs[name], atol=0.01, rtol=0.05)
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
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)  # what it can hold stays
    found = stochastic_round(every.float())
    torch.testing.assert_close(found, every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("flags", [
    ["--weights", "bf16"], ["--weights", "bf16-stochastic"], ["--lora-rank", "4"]])  # fmt: skip
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, flags):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "parts"))

    def run(name, *more):
        train.main(["--preset", "mini", "--data", "phantoms:8", "--out", str(tmp_path / name),
                    "--steps", "3", "--save-every", "2", "--no-eval", "--router-images", "8",
                    "--dtype", "bfloat16", "--router", "topk", *flags, *more])  # fmt: skip

    run("whole")
    with stopped_after_a_checkpoint(), pytest.raises(SystemExit):
        run("halves")
    run("halves", "--resume")
    one, two, three = (weights(tmp_path / "whole" / f"phase{n}") for n in (1, 2, 3))
    for number, whole in ((1, one), (2, two), (3, three)):
        assert same(whole, weights(tmp_path / "halves" / f"phase{number}"))
    assert one.keys() == two.keys()  # LoRA is merged at the end of its phase
    changed = {n: two[n].double() - one[n] for n in one if not torch.equal(one[n], two[n])}
    if "--lora-rank" in flags:
        ffns = {n for n in one if ".mlp." in n and n.endswith("weight")}
        assert {*changed} == ffns | {n for n in one if n.startswith("projector.")}
        assert len(ffns) == 6
        assert all(1 <= torch.linalg.matrix_rank(changed[n], rtol=1e-3) <= 4 for n in ffns)
    else:
        dtypes = {(".router." in n, tensor.dtype) for n, tensor in three.items()}
        assert dtypes == {(True, torch.float32), (False, BF16)}
