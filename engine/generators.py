"""The state of all random generators that a process has for all, as tensors, and back."""

import json
import random

import numpy as np
import torch
from torch import Tensor


def generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every random generator that this process has for all."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    for name, state in (("python", random.getstate()), ("numpy", (keys.tolist(), *rest))):
        text = bytearray(json.dumps(state).encode())  # its floats come back bit for bit
        states[f"rng.{name}"] = torch.frombuffer(text, dtype=torch.uint8)
    return states


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def set_generators(states: dict[str, Tensor], device: torch.device, seed: str) -> None:
    """The inverse of generators; one without a state begins anew, from the seed."""
    seed_all(random.Random(seed).getrandbits(32))
    if "rng.cpu" in states:
        torch.set_rng_state(states["rng.cpu"])
    if "rng.cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["rng.cuda"], device)
    if "rng.python" in states:
        version, keys, gauss = json.loads(bytes(states["rng.python"].tolist()))
        random.setstate((version, tuple(keys), gauss))
    if "rng.numpy" in states:
        keys, *rest = json.loads(bytes(states["rng.numpy"].tolist()))
        np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))  # noqa: NPY002
