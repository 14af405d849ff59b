"""What the checks of the assignments share: routers with chosen logits, and comparisons.

A check is a function of a router class. Its AssertionError holds a sentence for the student.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from routers import Hints, Router, Routing

N_EXPERTS = 4
# Three samples of 8 positions: unpadded, padded on the left, padded on the right.
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


def route(
    router: Router, logits: Tensor, mask: Tensor = MASK, hints: Hints = Hints(),
    with_penalty: bool = False,
) -> Routing:  # fmt: skip
    """The routing for these logits. Without the penalty, since it may not be written yet."""
    if not with_penalty:
        router.penalty = lambda *_: 0.0
    routing = router(features(logits), mask, hints)
    vars(router).pop("penalty", None)
    return routing


def close(
    found: Tensor | float, expected: Tensor | float, message: str, atol: float = 1e-5
) -> None:
    found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected).detach()
    assert found.shape == expected.shape, (
        f"{message} It has the shape {tuple(found.shape)}, not {tuple(expected.shape)}."
    )
    gap = (found - expected).abs()
    is_close = torch.isfinite(found).all() and not (gap > atol).any()
    assert is_close, f"{message} Found {numbers(found)}, expected {numbers(expected)}."


def numbers(values: Tensor) -> str:
    """A few of them, for a message."""
    few = ", ".join(f"{v:.4g}" for v in values.flatten()[:8].tolist())
    return few if values.dim() == 0 else f"[{few}{', ...' if values.numel() > 8 else ''}]"


def same_experts(found: Tensor, expected: Tensor, message: str) -> None:
    """Whether the gates (B, T, E) are non-zero at the same places."""
    differ = ((found != 0) != (expected != 0)).nonzero().tolist()
    where = ", ".join(f"sample {b}, position {t}, expert {e}" for b, t, e in differ[:2])
    assert not differ, f"{message} The routing differs at {where}."


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
    cls: type[Router], definition: Callable[[Router, Tensor, Tensor], Tensor], equation: str,
    training: bool = True, top_k: int = 2,
) -> None:  # fmt: skip
    """Value, then gradient by the logits, against definition(router, gates, logits (B, T, E)).

    First without padding, so that with padding the message can name it as the mistake.
    """
    no_padding = torch.ones_like(MASK)
    for mask, message in ((no_padding, "The penalty differs from its equation"),
                          (MASK, "The penalty counts padding, or divides by it")):  # fmt: skip
        logits = 1.5 * randn(*MASK.shape, N_EXPERTS, seed=3)
        x = features(logits).requires_grad_()
        router = make(cls, top_k, training)
        gates = router.eval()(x, mask, Hints(prompt=mask)).gates  # eval: no noise, none dropped
        router.train(training)
        found = torch.as_tensor(router.penalty(gates, x[..., :N_EXPERTS], mask, x))
        expected = definition(router, gates[mask], x[..., :N_EXPERTS][mask])
        close(found, expected, f"{message}: {equation}.", atol=1e-4 * abs(expected.item()))
        assert found.requires_grad, f"The penalty has no gradient: {equation}."
        grad = torch.autograd.grad(found, x, retain_graph=True)[0]
        expected_grad = torch.autograd.grad(expected, x)[0]
        close(grad, expected_grad, "The gradient of the penalty differs from that of its "
              f"equation: {equation}.", atol=1e-4 * expected_grad.abs().max().item())  # fmt: skip


def check_buffer(cls: type[Router], name: str) -> None:
    router = make(cls)
    is_saved = name in router.state_dict() and name in dict(router.named_buffers())
    assert is_saved, (
        f"`{name}` is not a buffer, so a checkpoint does not hold it or the optimizer changes it. "
        "Use register_buffer in __init__."
    )
