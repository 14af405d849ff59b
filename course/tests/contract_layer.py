"""The router contract, part 4: the router in the sparse layer and in the whole model."""

import pytest
import torch
from torch.func import functional_call

from config import IGNORE, IMAGE_ID, UserError
from course.tests.contract import MASK, PROMPT, Case, randn
from engine.run import checkpoint_blocks
from model import generate
from moe import MLP, MoE, upcycle
from routers import Hints
from tests.conftest import build, collate, shake

HINTS = Hints(prompt=PROMPT, modality=torch.arange(3))


def sparse_layer(case: Case, k: int) -> MoE:
    return shake(upcycle(MLP(16, 24), case.router(k=k), 4, "released"))


def the_task_loss_has_a_gradient_in_the_router(case: Case) -> None:
    if case.cls.frozen:
        pytest.skip("frozen = True: phase 3 does not train the router")
    for k in (1, 2):
        moe = sparse_layer(case, k).train()
        torch.manual_seed(0)
        y, _ = moe(randn(*MASK.shape, 16), MASK, HINTS)
        (y * randn(*y.shape, seed=2)).sum().backward()
        slopes = [p.grad.abs().max() for p in moe.router.parameters() if p.grad is not None]
        assert slopes and max(slopes) > 1e-4, (
            f"With top_k = {k} the task loss has no gradient in the router. A gate that is always "
            "1 has no gradient: use the raw probability at top_k = 1, or set frozen = True."
        )


def the_layer_matches_its_definition(case: Case) -> None:
    for k in (1, 2):
        moe, x = sparse_layer(case, k).eval(), randn(*MASK.shape, 16)
        torch.manual_seed(0)
        y, routing = moe(x, MASK, HINTS)
        stacked = dict(moe.experts.named_parameters())
        for b, t in MASK.nonzero().tolist():
            expected = moe.meta(x[b, t])
            for e in range(4):
                expert = {name: weights[e] for name, weights in stacked.items()}
                expected = expected + routing.gates[b, t, e] * functional_call(
                    moe.meta, expert, x[b, t]
                )
            assert torch.allclose(y[b, t], expected, atol=1e-4), (
                "The layer's output is not meta(x) + sum over e of gates[e] * expert_e(x)."
            )


def tiny(case: Case):
    return build(moe={"router": case.spec, "level": case.level})


def examples(side: str):
    prompt = [5, *[IMAGE_ID] * 4, 9, 11]
    rows = [([*prompt, 12, 13], [IGNORE] * 7 + [12, 13]), ([7, 8, 9], [IGNORE, 8, 9])]
    return collate(rows, modality=[3, 0], side=side)


def activation_checkpointing_changes_nothing(case: Case) -> None:
    found = []
    for is_checkpointing in (False, True):
        model = tiny(case).train()
        if is_checkpointing:
            checkpoint_blocks(model)
        torch.manual_seed(0)
        loss = model.loss(examples("right"))
        penalty = sum(torch.as_tensor(r.penalty) for r in loss.routings)
        (loss.total + penalty).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((grads, dict(model.named_buffers())))
    for kind, (plain, again) in zip(("gradient", "buffer"), zip(*found, strict=True), strict=True):
        assert plain.keys() == again.keys(), f"With activation checkpointing a {kind} is missing."
        for name, value in plain.items():
            assert torch.allclose(value, again[name], atol=1e-5, rtol=1e-4), (
                f"With activation checkpointing the {kind} of {name} differs. It runs `gate` twice "
                "per step, so `gate` must not change the router's state."
            )


@torch.no_grad()
def generation_works_or_is_refused(case: Case) -> None:
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
    expected = model.decoder.lm_head(hidden[:, n - 1 : -1]).argmax(dim=-1)
    assert torch.equal(tokens, expected), (
        "The tokens generated with the KV cache are not those of one forward pass over all "
        "positions."
    )
