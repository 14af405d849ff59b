"""LoRA: nothing at first, W + 2 B A in the end, and only A and B learn."""

import pytest
import torch
from torch.func import functional_call

import train
from checkpoint import read_config
from config import IGNORE, IMAGE_ID, PRESETS, TrainConfig, UserError
from engine.lora import add_lora, merge_lora
from engine.optim import cast_weights
from model import freeze_all_but
from routers import Hints
from tests.mini import mini, same, weights
from tests.one_step import stopped_after_a_checkpoint

KINDS = pytest.mark.parametrize(
    ("family", "number"), [(f, n) for f in ("phi", "stablelm", "llama") for n in (2, 3)]
)
FFN = {"phi": ("fc1", "fc2"), "stablelm": ("gate", "up", "down"), "llama": ("gate", "up", "down")}


def plain(build, family, number):
    return build(family, None if number == 2 else {"router": "topk", "n_experts": 3})


@pytest.fixture
def batch(collate):
    image = [IMAGE_ID] * 4
    return collate([([1, *image, 7, 8, 9, 10], [IGNORE] * 6 + [8, 9, 10]), ([1, 5, 3],) * 2])


def hidden(model, batch):
    return model(batch.ids, batch.mask, batch.images, Hints())[0][batch.mask]


def layers(family, number):
    """The names of what gets LoRA."""
    places = [f"decoder.blocks.{i}.mlp" for i in range(3)]
    if number == 3:
        places = [f"decoder.blocks.{i}.mlp.{p}" for i in (0, 2) for p in ("meta", "experts")]
    return {f"{place}.{name}" for place in places for name in FFN[family]}


def added(model):
    return {n: p for n, p in model.named_parameters() if "lora" in n}


def adapted(model, number, rank=4):
    """With random B."""
    add_lora(model, rank, number)
    for name, param in added(model).items():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(param, std=0.1)
    return model


def written_out(params, names):
    """The definition: W + (alpha / r) B A in W's place, alpha = 2 r, for every expert by itself."""
    out = {k: v for k, v in params.items() if "lora" not in k}
    for name in names:
        a, b = params[f"{name}.lora_a"], params[f"{name}.lora_b"]
        pairs = zip(a.view(-1, *a.shape[-2:]), b.view(-1, *b.shape[-2:]), strict=True)
        change = torch.stack([2 * q @ p for p, q in pairs])
        out[f"{name}.weight"] = out[f"{name}.weight"] + change.view_as(out[f"{name}.weight"])
    return out


@KINDS
@pytest.mark.parametrize("rank", [3, 4])  # 3 is not on 16 bytes: grouped_linear goes another way
def test_it_computes_learns_and_is_merged_as_the_weights_written_out(
    build, batch, family, number, rank
):
    batch = batch._replace(images=batch.images.double())
    before = plain(build, family, number).double()
    model = adapted(plain(build, family, number), number, rank).double()
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    exact = written_out(params, layers(family, number))
    y = hidden(model, batch)
    expected = functional_call(before, exact, (batch.ids, batch.mask, batch.images, Hints()))[0]
    torch.testing.assert_close(y, expected[batch.mask], atol=1e-10, rtol=0)
    grads = torch.autograd.grad(y.sin().sum(), [*added(model).values()])
    wanted = torch.autograd.grad(
        expected[batch.mask].sin().sum(), [params[n] for n in added(model)]
    )
    torch.testing.assert_close(grads, wanted, atol=1e-8, rtol=1e-8)

    kept = dict(model.named_parameters())
    merge_lora(model)
    assert str(model) == str(before)  # plain layers again
    found = dict(model.named_parameters())
    assert [*found] == [n for n, _ in before.named_parameters()]
    for name, param in found.items():
        assert param is kept[name]
        torch.testing.assert_close(param, exact[name], atol=1e-12, rtol=0)
    torch.testing.assert_close(hidden(model, batch), y, atol=1e-10, rtol=0)


@KINDS
def test_at_first_nothing_changes_and_then_only_lora_and_projector_or_router_learn(
    build, batch, family, number
):
    model, flags = plain(build, family, number), TrainConfig(lora_rank=4, router="topk")
    before = hidden(model, batch)
    add_lora(model, 4, number)
    assert torch.equal(before, hidden(model, batch))
    freeze_all_but(model, train.trained_patterns(flags, number, model.config))
    model.loss(batch).total.backward()
    expected = {f"{name}.lora_{x}" for name in layers(family, number) for x in "ab"}
    assert {*added(model)} == expected
    other = "projector." if number == 2 else ".router."
    expected |= {n for n, _ in model.named_parameters() if other in n}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected
    copies = 3 if number == 2 else 2 * (3 + 1)  # blocks; sparse blocks times experts and meta
    size = copies * len(FFN[family]) * 4 * (32 + model.config.decoder.d_ff)
    assert sum(p.numel() for p in added(model).values()) == size


def test_a_tower_that_learns_in_phase_2_is_trained_whole_beside_them(build):
    trains = train.trained_patterns(TrainConfig(lora_rank=4, tune_vision=True), 2, build().config)
    assert trains == ("projector.*", "decoder.*.lora_[ab]", "vision.*")


def test_phase_1_gets_none_and_without_a_meta_expert_the_experts_alone(build):
    model = build("phi", {"router": "topk", "meta": False})
    add_lora(model, 4, 1)
    assert not added(model)
    add_lora(model, 4, 3)
    places = {n.rsplit(".", 2)[0] for n in added(model)}
    assert places == {f"decoder.blocks.{i}.mlp.experts" for i in (0, 2)}


def test_every_expert_has_its_own_lora_a_initialised_like_a_linear_layer(build):
    torch.manual_seed(0)
    model = build("phi", {"router": "topk", "n_experts": 3})
    cast_weights(model, torch.bfloat16)
    add_lora(model, 32, 3)
    for name, n_in, n_out in (("fc1", 32, 64), ("fc2", 64, 32)):
        layer = getattr(model.decoder.blocks[0].mlp.experts, name)
        a, b, bound = layer.lora_a.detach(), layer.lora_b, n_in**-0.5
        assert a.shape == (3, 32, n_in) and b.shape == (3, n_out, 32)
        assert a.dtype == b.dtype == torch.float32 and not b.any()
        assert 0.95 * bound < a.max() <= bound and -bound <= a.min() < -0.95 * bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not torch.equal(a[0], a[1]) and layer.lora_scale == 2


@KINDS
def test_beside_weights_in_bf16_it_learns_in_fp32_and_is_rounded_once_when_merged(
    build, batch, family, number
):
    model = plain(build, family, number)
    exact = model.loss(batch).total.detach()
    cast_weights(model, torch.bfloat16)
    add_lora(model, 8, number)
    with torch.autocast("cpu", torch.bfloat16):
        total = model.loss(batch).total
    total.backward()
    torch.testing.assert_close(total.detach(), exact, atol=0, rtol=0.02)
    grads = {n: p.grad for n, p in added(model).items()}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.any() == n.endswith("b") for n, g in grads.items())  # A's is through B, 0
    model = adapted(model, number)
    params = {n: p.detach().float() for n, p in model.named_parameters()}
    merge_lora(model)
    expected = written_out(params, layers(family, number))
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, merged in expected.items():
        found = model.get_parameter(name)
        torch.testing.assert_close(found.float(), merged, atol=1e-6, rtol=2**-8, msg=name)
        assert found.dtype == (torch.float32 if ".router." in name else torch.bfloat16)


@pytest.mark.parametrize("flags", [{"lora_rank": 129}, {"lora_rank": -1},
                                   {"lora_rank": 4, "trains": "released"}])  # fmt: skip
def test_what_cannot_be_trained_is_refused(flags):
    with pytest.raises(UserError, match="--lora-rank"):
        train.resolve(TrainConfig(phase=2, **flags))


def rank_of(matrix):
    """How many singular values stand out of fp32's rounding."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > 1e-3 * values[0]).sum())


def test_a_run_changes_ffns_by_low_rank_and_goes_on_bit_for_bit_after_an_interrupt(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "parts"))

    def run(name, *more):
        train.main(["--preset", "mini", "--data", "phantoms:8", "--out", str(tmp_path / name),
                    "--steps", "3", "--save-every", "2", "--no-eval", "--router-images", "8",
                    "--dtype", "float32", "--lora-rank", "4", *more])  # fmt: skip

    run("whole")
    one, two, three = (weights(tmp_path / "whole" / f"phase{n}") for n in (1, 2, 3))
    dense = {f"{n}.weight" for n in layers("phi", 2)}
    projector = {n for n in one if n.startswith("projector.")}
    assert {n for n in one if not torch.equal(one[n], two[n])} == dense | projector
    assert all(1 <= rank_of(two[n] - one[n]) <= 4 for n in dense)
    assert same(three, three | {n: t for n, t in two.items() if n in three})
    assert not [n for n in (*two, *three) if "lora" in n]
    assert read_config(tmp_path / "whole" / "phase3")[1]["flags"]["lora_rank"] == 4
    phase_2 = ("--phase", "2", "--init", str(tmp_path / "whole" / "phase1"))
    with stopped_after_a_checkpoint(), pytest.raises(SystemExit):
        run("halves", *phase_2)
    (unfinished,) = (tmp_path / "halves").glob("phase2-step*")
    assert sum("lora" in n for n in weights(unfinished)) == 2 * 2 * 3
    run("halves", *phase_2, "--resume")
    assert same(weights(tmp_path / "halves" / "phase2"), two)
