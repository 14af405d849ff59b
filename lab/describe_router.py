"""The weights of a trained router: the norms of its rows, and the angles between them.

    python -m lab.describe_router FILE...

FILE is Med-MoE's phi_router.pth or stablelm_router.pth (fc1.weight (E, D), fc1.bias (E)), or our
router.safetensors (weight, bias). Angles are in degrees; rows at random in D channels are at 90.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import MODALITIES, UserError, argument, flag
from engine.cli import parse, user_errors, write_json
from sources.tensorfiles import open_tensors


@dataclass(frozen=True)
class DescribeConfig:
    """Describe a router's weights."""

    file: str = argument("router FILE")
    json: str | None = flag(None, "also write what is printed to this FILE")


def read_router(path: Path) -> dict[str, Tensor]:
    """-> {"weight": (E, D), "bias": (E,)}, fp32. Raises UserError for any other content."""
    tensors = {name.removeprefix("fc1."): t.float() for name, t in open_tensors(path)}
    if tensors.keys() != {"weight", "bias"}:
        raise UserError(f"{path}: has {sorted(tensors)}, not a router's weight and bias")
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.dim() != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{path}: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}")
    return tensors


def describe(router: dict[str, Tensor]) -> dict:
    weight = router["weight"].double()  # (E, D)
    norms = weight.norm(dim=1)  # (E,)
    unit = weight / norms[:, None]
    angles = (unit @ unit.T).clamp(-1, 1).acos() * 180 / math.pi  # (E, E) degrees
    return {
        "experts": len(weight),
        "d_model": weight.shape[1],
        "norms": norms.tolist(),
        "bias": router["bias"].tolist(),
        "angles": (angles - torch.diag(angles.diag())).tolist(),
    }


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(DescribeConfig, argv, "python -m lab.describe_router")
    found = describe(read_router(Path(flags.file)))
    n = found["experts"]
    print(f"{flags.file}: {n} experts, {found['d_model']} channels")
    names = MODALITIES if n == len(MODALITIES) else range(n)
    print("expert" + " " * 14 + "norm    bias   degrees to each (modalities in our order)")
    for e in range(n):
        row = "".join(f"{angle:8.1f}" for angle in found["angles"][e])
        print(f"{e} {names[e]!s:<14}{found['norms'][e]:8.3f}{found['bias'][e]:8.4f}{row}")
    if flags.json:
        write_json(Path(flags.json), found)
    return found


if __name__ == "__main__":
    main()
