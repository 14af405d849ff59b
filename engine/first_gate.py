"""The first call of a router's methods is checked; later calls cost nothing.

`gate`, `penalty` and `update` must not change their arguments, settings of torch or the state of
a random generator, and the first two not the router either. torch's default generators may
advance, as with noise on the logits, but nothing may be re-seeded: dropout would repeat its masks.
(The run's own seed is not noticed.) Those of Python and numpy may not even advance: activation
checkpointing, which calls `gate` and `penalty` twice, restores torch's only.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from model import MedMoE
from routers import OWN, Router, Routing


def check_routers(model: MedMoE) -> None:
    """Check the first calls of the model's routers, which raise UserError."""
    for block in model.decoder.blocks:
        if block.is_sparse:
            check_first_calls(block.mlp.router)


def check_first_calls(router: Router) -> Router:
    for name in ("gate", "penalty", "update", "forward"):
        vars(router)[name] = partial(first_call, router, name, getattr(router, name))
    return router


def first_call(router: Router, name: str, method: Callable, *args: Any, **hints: Any) -> Any:
    """Call the method of this name; raise UserError if it does what a router must not."""
    vars(router)[name] = method  # from now on
    where = getattr(sys.modules.get(type(router).__module__), "__file__", "?")
    who = f"router {type(router).__name__}, {where}: {name}"
    try:
        signature(method).bind(*args, **hints)
    except TypeError as error:
        raise UserError(f"{who} does not take what it is called with: {error}") from error
    # What is not given by place is given by name: hints.
    by_name = dict(zip(list(signature(getattr(Router, name)).parameters)[1:], args, strict=False))
    with unchanged(who, partial(state, router, name, by_name | hints)):
        result = method(*args, **hints)
    found = ""
    with torch.no_grad():  # activation checkpointing compares what is kept for backward
        if name == "gate":
            found = wrong_gates(router, result, args[0].shape, args[1])
        elif name == "penalty":
            found = wrong_penalty(result)
        elif name == "forward":  # Router's masks padding, but it may have been overridden
            found = wrong_routing(router, result, args[1])
        # Of weights or inputs that are NaN all of this is NaN: not the router's fault.
        if found and all(a.isfinite().all() for a in args if isinstance(a, Tensor)):
            raise UserError(f"{who} returned {found}")
    return result


def wrong_gates(router: Router, gates: Any, shape: tuple[int, ...], mask: Tensor) -> str:
    """What is wrong with these gates, in words; mask is True where they count. "": nothing."""
    if not isinstance(gates, Tensor):
        return f"{type(gates).__name__}, not a tensor"
    if gates.shape != shape:
        return f"shape {tuple(gates.shape)}, which must be that of the logits, {tuple(shape)}"
    if gates.dtype != torch.float32:
        return f"{gates.dtype}, which must be torch.float32"
    if gates.device != mask.device:
        return f"gates on {gates.device}, which must be on {mask.device}"
    gates = gates[mask]  # (n, E)
    if not gates.isfinite().all():
        return "gates that are NaN or infinite"
    if gates.lt(0).any():
        return f"negative gates, as {gates.min():.3g}"
    most = int(gates.count_nonzero(dim=-1).max()) if len(gates) else 0
    if router.at_most_k and most > router.top_k:
        return f"{most} experts for a token, which is above top_k = {router.top_k} (at_most_k)"
    if len(gates) and not most and not router.may_drop:
        return "gates that are all 0: no token has an expert (may_drop)"
    return ""


def wrong_routing(router: Router, routing: Any, mask: Tensor) -> str:
    if not isinstance(routing, Routing):
        return f"{type(routing).__name__}, not a Routing"
    shape = (*mask.shape, router.proj.out_features)
    if found := wrong_gates(router, routing.gates, shape, mask):
        return found
    return "gates on padding, which must be 0" if routing.gates[~mask].any() else ""


def wrong_penalty(penalty: Any) -> str:
    is_scalar = isinstance(penalty, int | float) or getattr(penalty, "shape", None) == ()
    if not is_scalar:
        shape = getattr(penalty, "shape", None)
        return f"{type(penalty).__name__} {tuple(shape or ())}, which must be one number"
    return "" if torch.as_tensor(penalty).isfinite() else f"{float(penalty)}, which must be finite"


def state(router: Router, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Copies of all that this method must not change, by their names in messages."""
    found = global_state()
    for key, value in args.items():
        if isinstance(value, Tensor):
            found[f"its argument {key}"] = value.detach().clone()
    if name != "update":
        for key, value in (*router.named_parameters(), *router.named_buffers()):
            found[f"self.{key}"] = value.detach().clone()
    return found


def global_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    found = {
        "the default dtype of torch": torch.get_default_dtype(),
        "the default device of torch": torch.get_default_device(),
        "gradient recording (torch.set_grad_enabled)": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "the random generator of Python": random.getstate(),
        "the random generator of numpy": (kind, keys.tobytes(), *rest),
        "the seed of torch": torch.initial_seed(),
    }
    if torch.cuda.is_initialized():
        found["the seed of torch.cuda"] = torch.cuda.initial_seed()
    return found


@contextmanager
def unchanged(who: str, read: Callable[[], dict[str, Any]] = global_state) -> Iterator[None]:
    """Raise UserError if `read` returns something else at the end of the block."""
    before = read()
    yield
    changed = [name for name, value in read().items() if not equal(before.get(name), value)]
    if changed:
        raise UserError(f"{who} changes {', '.join(changed)}: a router must not")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):  # whose NaN are equal
        return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b


@contextmanager
def own_errors() -> Iterator[None]:
    """What is raised in a router's own file, SystemExit too, becomes a UserError with its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        first = error.__cause__ or error  # make_router's UserError has a cause
        places = [(frame.f_code.co_filename, n) for frame, n in walk_tb(first.__traceback__)
                  if frame.f_globals.get("__name__", "").startswith(OWN)]  # fmt: skip
        if not places:
            raise
        file, line = places[-1]
        raise UserError(f"{file}, line {line}: {type(first).__name__}: {first}") from error
