"""LoRA: nothing at first, W + 2 B A in the end, and only A and B learn."""

import pytest
import torch
from torch.func import functional_call

import train
from config import TrainConfig
from engine.lora import add_lora, merge_lora
from engine.optim import cast_weights
from model import freeze_all_but
from routers import Hints
from tests.conftest import DECODERS, collate
from tests.test_model import ROWS

_batch = pytest.fixture(name="batch")(lambda: collate([ROWS[0], ROWS[2]]))
KINDS = pytest.mark.parametrize(("family", "number"), [(f, n) for f in DECODERS for n in (2, 3)])


def plain(build, family, number):
    return build(family, None if number == 2 else {"router": "topk", "n_experts": 3})


def hidden(model, batch):
    return model(batch.ids, batch.mask, batch.images, Hints())[0][batch.mask]


def layers(family, number):
    """The names of what gets LoRA."""
    names = ("fc1", "fc2") if family == "phi" else ("gate", "up", "down")
    places = [f"decoder.blocks.{i}.mlp" for i in range(3)]
    if number == 3:
        places = [f"decoder.blocks.{i}.mlp.{p}" for i in (0, 2) for p in ("meta", "experts")]
    return {f"{place}.{name}" for place in places for name in names}


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
def test_it_computes_learns_and_merges_as_weights_written_out(build, batch, family, number, rank):
    batch = batch._replace(images=batch.images.double())
    before = plain(build, family, number).double()
    model = adapted(plain(build, family, number), number, rank).double()
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    exact, y = written_out(params, layers(family, number)), hidden(model, batch)
    expected = functional_call(before, exact, (batch.ids, batch.mask, batch.images, Hints()))[0]
    expected = expected[batch.mask]
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)
    grads = torch.autograd.grad(y.sin().sum(), [*added(model).values()])
    wanted = torch.autograd.grad(expected.sin().sum(), [params[n] for n in added(model)])
    torch.testing.assert_close(grads, wanted, atol=1e-8, rtol=1e-8)
    merge_lora(model)
    assert str(model) == str(before)  # plain layers again
    found = dict(model.named_parameters())
    assert [*found] == [n for n, _ in before.named_parameters()]
    for name, param in found.items():
        torch.testing.assert_close(param, exact[name], atol=1e-12, rtol=0)
    torch.testing.assert_close(hidden(model, batch), y, atol=1e-10, rtol=0)


@KINDS
def test_only_lora_and_projector_or_router_learn_beside_bf16_weights(build, batch, family, number):
    model, flags = plain(build, family, number), TrainConfig(lora_rank=4, router="topk")
    exact = model.loss(batch).total.detach()
    cast_weights(model, torch.bfloat16)
    add_lora(model, 4, number)
    assert {p.dtype for p in added(model).values()} == {torch.float32}  # not bf16
    a = next(p for n, p in added(model).items() if n.endswith("lora_a"))  # as nn.Linear's
    assert a.abs().max().item() == pytest.approx(a.shape[-1] ** -0.5, rel=0.1)
    freeze_all_but(model, train.trained_patterns(flags, number, model.config))
    with torch.autocast("cpu", torch.bfloat16):
        total = model.loss(batch).total
    total.backward()
    torch.testing.assert_close(total.detach(), exact, atol=0, rtol=0.02)  # nothing is added yet
    expected = {f"{name}.lora_{x}" for name in layers(family, number) for x in "ab"}
    other = "projector." if number == 2 else ".router."
    expected |= {n for n, _ in model.named_parameters() if other in n}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected
    model = adapted(model, number)
    params = {n: p.detach().float() for n, p in model.named_parameters()}
    merge_lora(model)
    expected = written_out(params, layers(family, number))
    for name, found in model.named_parameters():
        torch.testing.assert_close(found.float(), expected[name], atol=1e-6, rtol=2**-8, msg=name)
        assert found.dtype == (torch.float32 if ".router." in name else torch.bfloat16)
