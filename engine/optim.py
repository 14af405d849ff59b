"""AdamW without decay (Loshchilov and Hutter 2019), also for weights that are kept in bf16.

bf16 has 8 significant bits: rounded to the nearest, a step below 1/512 of its weight is lost. At
the paper's rate, 2e-5, Adam's steps are as large at most, and every weight above 0.01 would stay
as it is. --weights names two ways out; in bytes a trained weight:

                      weight  gradient  moments  copy
    float32                4         4        8     -   torch's own
    bf16                   2         2        8     4   the copy in fp32 learns, the weight is
                                                        the copy rounded
    bf16-stochastic        2         2        8     -   rounded up or down by chance, so that it
                                                        is right on average
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ops import local

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults


def make_optimizer(
    named: dict[str, nn.Parameter], lr: float, weights: str
) -> torch.optim.Optimizer:
    """AdamW for flags.weights; the caller sets the rate of each step in param_groups."""
    if weights == "float32":
        groups: dict[object, list[nn.Parameter]] = {}
        for param in named.values():  # fused, it takes parameters that are spread alike
            groups.setdefault(getattr(param, "device_mesh", None), []).append(param)
        alike = [{"params": params} for params in groups.values()]
        return torch.optim.AdamW(alike, lr=lr, weight_decay=0.0, fused=True)
    return NarrowAdamW(named.values(), lr, by_chance=weights == "bf16-stochastic")


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep every weight in dtype, but for the routers': they decide in fp32."""
    for name, param in model.named_parameters():
        if ".mlp.router." not in name:
            param.data = param.data.to(dtype)


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW whose arithmetic and moments are fp32 whatever the parameters are.

    by_chance: False keeps an fp32 copy, "master", of each narrower parameter; True keeps none and
    rounds by chance. A parameter in fp32 is its own copy.

    torch's load_state_dict would make the state as narrow as the parameters: engine/run.py puts
    it back tensor by tensor.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, by_chance: bool):
        super().__init__(params, {"lr": lr})
        self.by_chance = by_chance

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group["lr"])

    def update(self, param: nn.Parameter, lr: float) -> None:
        """One step of one parameter."""
        state, is_narrow = self.state[param], param.dtype != torch.float32
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        if is_narrow and not self.by_chance and "master" not in state:
            state["master"] = param.float()
        state["step"] = state["step"].cpu() + 1  # on a GPU, reading it would wait for all before
        seen = [1 - beta ** state["step"].item() for beta in BETAS]  # the moments began at 0
        mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        grad = local(param.grad).float()
        mean.lerp_(grad, 1 - BETAS[0])
        square.lerp_(grad.square(), 1 - BETAS[1])
        exact = local(state.get("master", param)).float()  # the very same tensor where it is fp32
        exact.addcdiv_(mean, (square / seen[1]).sqrt_().add_(EPS), value=-lr / seen[0])
        if is_narrow:
            local(param).copy_(round_by_chance(exact) if self.by_chance else exact)


def round_by_chance(x: Tensor) -> Tensor:
    """fp32 -> bf16, one of the two neighbours, the nearer one the likelier; x on average.

    A bf16 is the upper half of an fp32. A random number added to the lower half carries into the
    upper one with just the right probability, in either sign; what is left below is cut off.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    cut = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isnan(), x, cut).bfloat16()  # a NaN's bits could carry into its sign
