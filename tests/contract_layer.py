"""What every router has to keep, part 4: at work in the sparse layer and in the whole model."""

import pytest
import torch
from conftest import build, collate, shake
from contract import MASK, PROMPT, Case, randn
from torch.func import functional_call

from config import IGNORE, IMAGE_ID, UserError
from model import generate
from moe import MLP, MoE, upcycle
from routers import Hints

HINTS = Hints(prompt=PROMPT, modality=torch.arange(3))


def layer(case: Case, k: int) -> MoE:
    return shake(upcycle(MLP(16, 24), case.router(k=k), 4, "released"))


def a_task_gradient_reaches_the_router(case: Case) -> None:
    if case.cls.frozen:
        pytest.skip("frozen = True: nothing is to be learned")
    for k in (1, 2):
        moe = layer(case, k).train()
        torch.manual_seed(0)
        y, _ = moe(randn(*MASK.shape, 16), MASK, HINTS)
        (y * randn(*y.shape, seed=2)).sum().backward()
        slopes = [p.grad.abs().max() for p in moe.router.parameters() if p.grad is not None]
        assert slopes and max(slopes) > 1e-4, (
            f"With k = {k} the loss of the task has no gradient in the router: a gate that is "
            "always 1 teaches nothing. Declare it frozen, or keep the probability."
        )


def the_layer_is_its_definition(case: Case) -> None:
    for k in (1, 2):
        moe, x = layer(case, k).eval(), randn(*MASK.shape, 16)
        torch.manual_seed(0)
        y, routing = moe(x, MASK, HINTS)
        stacked = dict(moe.experts.named_parameters())
        for b, t in MASK.nonzero().tolist():
            wanted = moe.meta(x[b, t])
            for e in range(4):
                expert = {name: weights[e] for name, weights in stacked.items()}
                wanted = wanted + routing.gates[b, t, e] * functional_call(
                    moe.meta, expert, x[b, t]
                )
            assert torch.allclose(y[b, t], wanted, atol=1e-4), (
                "The layer is not meta(x) + sum over e of gates[e] * expert_e(x)."
            )


def tiny(case: Case):
    return build(moe={"router": case.spec, "level": case.level})


def examples(side: str):
    prompt = [5, *[IMAGE_ID] * 4, 9, 11]
    rows = [([*prompt, 12, 13], [IGNORE] * 7 + [12, 13]), ([7, 8, 9], [IGNORE, 8, 9])]
    return collate(rows, modality=[3, 0], side=side)


def activation_checkpointing_changes_nothing(case: Case) -> None:
    found = []
    for recompute in (False, True):
        model = tiny(case).train()
        model.decoder.recompute = recompute
        torch.manual_seed(0)
        loss = model.loss(examples("right"))
        price = sum(torch.as_tensor(r.penalty) for r in loss.routings)
        (loss.total + price).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((grads, dict(model.named_buffers())))
    for what, (plain, again) in zip(("gradient", "buffer"), zip(*found, strict=True), strict=True):
        assert plain.keys() == again.keys(), f"Activation checkpointing loses a {what}."
        for name, value in plain.items():
            assert torch.allclose(value, again[name], atol=1e-5, rtol=1e-4), (
                f"With activation checkpointing the {what} of {name} differs: gate is computed "
                "twice for one step there, so it must leave nothing behind."
            )


@torch.no_grad()
def it_generates_or_is_refused(case: Case) -> None:
    model, batch = tiny(case), examples("left")
    if not case.cls.causal:
        with pytest.raises(UserError, match="cannot generate"):
            next(generate(model, batch, eos_id=1))
        return
    tokens = torch.stack([s.tokens for s in generate(model, batch, eos_id=-1, max_new=3)], dim=1)
    n = batch.ids.shape[1]
    ids = torch.cat([batch.ids, tokens], dim=1)
    mask = torch.cat([batch.mask, torch.ones_like(tokens).bool()], dim=1)
    prompt = mask.clone()
    prompt[:, n:] = False
    hidden, _ = model(ids, mask, batch.images, Hints(prompt=prompt, modality=batch.modality))
    wanted = model.decoder.lm_head(hidden[:, n - 1 : -1]).argmax(dim=-1)
    assert torch.equal(tokens, wanted), (
        "What is generated with the KV cache is not what one pass over all positions says."
    )
