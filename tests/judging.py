"""What the judges of the assignments share: routers whose logits are given, and comparisons.

A check is a function of a router class. It raises AssertionError with a sentence for the student.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from routers import Hints, Router, Routing

N_EXPERTS = 4
# Three samples of 8 positions: whole, padded on the left, padded on the right.
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]]
).bool()
PROMPT = torch.tensor(
    [[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
).bool()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(cls: type[Router], top_k: int = 2, training: bool = False) -> Router:
    """A router whose logits are the first E features of x; one more feature is free."""
    torch.manual_seed(0)
    router = cls(N_EXPERTS + 1, N_EXPERTS, top_k=top_k)
    with torch.no_grad():
        router.proj.weight.copy_(torch.eye(N_EXPERTS, N_EXPERTS + 1))
        nn.init.zeros_(router.proj.bias)
    return router.train(training)


def features(logits: Tensor, last: float = 1.0) -> Tensor:
    """logits (B, T, E) -> the x (B, T, E + 1) that has them."""
    return torch.cat([logits, torch.full_like(logits[..., :1], last)], dim=-1)


def decide(
    router: Router, logits: Tensor, mask: Tensor = MASK, hints: Hints = Hints(),
    with_penalty: bool = False,
) -> Routing:  # fmt: skip
    """What it decides on these logits; a penalty that is not written yet is in nobody's way."""
    if not with_penalty:
        router.penalty = lambda *_: 0.0
    routing = router(features(logits), mask, hints)
    vars(router).pop("penalty", None)
    return routing


def close(found: Tensor | float, wanted: Tensor | float, says: str, atol: float = 1e-5) -> None:
    found, wanted = torch.as_tensor(found).detach(), torch.as_tensor(wanted).detach()
    assert found.shape == wanted.shape, (
        f"{says} It has the shape {tuple(found.shape)}, not {tuple(wanted.shape)}."
    )
    gap = (found - wanted).abs()
    right = torch.isfinite(found).all() and not (gap > atol).any()
    assert right, f"{says} Found {numbers(found)}, wanted {numbers(wanted)}."


def numbers(values: Tensor) -> str:
    """A few of them, for a message."""
    few = ", ".join(f"{v:.4g}" for v in values.flatten()[:8].tolist())
    return few if values.dim() == 0 else f"[{few}{', ...' if values.numel() > 8 else ''}]"


def same_visits(found: Tensor, wanted: Tensor, says: str) -> None:
    differ = ((found != 0) != (wanted != 0)).nonzero().tolist()
    where = ", ".join(f"sample {b}, position {t}, expert {e}" for b, t, e in differ[:2])
    assert not differ, f"{says} It differs at {where}."


def top_k_of(scores: Tensor, k: int) -> Tensor:
    """The k largest of (B, T, E), token by token; 0 elsewhere."""
    kept = torch.zeros_like(scores)
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            for e in scores[b, t].argsort(descending=True)[:k]:
                kept[b, t, e] = scores[b, t, e]
    return kept


def on_real(values: Tensor, mask: Tensor = MASK) -> Tensor:
    return torch.where(mask[..., None], values, 0.0)


def check_penalty(
    cls: type[Router], definition: Callable[[Router, Tensor, Tensor], Tensor], where: str,
    training: bool = True, top_k: int = 2,
) -> None:  # fmt: skip
    """Value, then gradient by the logits, against definition(router, gates, logits (B, T, E)).

    Values first without padding, so that padding can be named as the mistake.
    """
    whole = torch.ones_like(MASK)
    for mask, says in ((whole, "The penalty is not its equation"),
                       (MASK, "The penalty lets padding count, or divides by it")):  # fmt: skip
        logits = 1.5 * randn(*MASK.shape, N_EXPERTS, seed=3)
        x = features(logits).requires_grad_()
        router = make(cls, top_k, training)
        gates = router.eval()(x, mask, Hints(prompt=mask)).gates  # eval: no noise, none dropped
        router.train(training)
        found = torch.as_tensor(router.penalty(gates, x[..., :N_EXPERTS], mask, x))
        wanted = definition(router, gates[mask], x[..., :N_EXPERTS][mask])
        close(found, wanted, f"{says}: {where}.", atol=1e-4 * abs(wanted.item()))
        assert found.requires_grad, f"The penalty has no gradient: {where}."
        ours = torch.autograd.grad(found, x, retain_graph=True)[0]
        theirs = torch.autograd.grad(wanted, x)[0]
        scale = theirs.abs().max().item()
        close(ours, theirs, f"The penalty's gradient is not that of its equation: {where}.",
              atol=1e-4 * scale)  # fmt: skip


def check_buffer(cls: type[Router], name: str) -> None:
    router = make(cls)
    is_saved = name in router.state_dict() and name in dict(router.named_buffers())
    assert is_saved, (
        f"`{name}` is not a buffer, so a checkpoint forgets it or the optimizer changes it: "
        "use register_buffer in __init__."
    )
