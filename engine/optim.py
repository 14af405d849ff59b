"""AdamW without decay (Loshchilov and Hutter 2019), also for weights that are kept in bf16.

bf16 has 8 significant bits: rounded to nearest, an update below 1/512 of its weight is lost. At
the paper's rate, 2e-5, Adam's updates are at most that large, and no weight above 0.01 would ever
change. --weights offers two remedies; bytes per trained weight:

                      weight  gradient  moments  copy
    float32                4         4        8     -   torch's own
    bf16                   2         2        8     4   an fp32 copy is updated, then rounded
    bf16-stochastic        2         2        8     -   stochastic rounding: right on average
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ops import local

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults


def make_optimizer(named: dict[str, nn.Parameter], lr: float, weights: str) -> Optimizer:
    """AdamW for flags.weights; the caller sets the rate of each step in param_groups."""
    if weights != "float32":
        return NarrowAdamW(named.values(), lr, is_stochastic=weights == "bf16-stochastic")
    groups = defaultdict(list)
    for param in named.values():  # the fused kernel wants one device mesh a group
        groups[getattr(param, "device_mesh", None)].append(param)
    alike = [{"params": params} for params in groups.values()]
    return AdamW(alike, lr=lr, weight_decay=0.0, fused=True)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep every weight in dtype, except the routers', which stay in fp32."""
    for name, param in model.named_parameters():
        if ".mlp.router." not in name:
            param.data = param.data.to(dtype)


class NarrowAdamW(Optimizer):
    """AdamW whose arithmetic and moments are fp32 whatever the parameters are.

    is_stochastic: False keeps an fp32 copy, "master", of each narrower parameter; True keeps none
    and rounds stochastically. torch's load_state_dict would make the state as narrow as the
    parameters: engine/run.py puts it back tensor by tensor.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, is_stochastic: bool):
        super().__init__(params, {"lr": lr})
        self.is_stochastic = is_stochastic

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group["lr"])

    def update(self, param: nn.Parameter, lr: float) -> None:
        state, is_narrow = self.state[param], param.dtype != torch.float32
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        if is_narrow and not self.is_stochastic and "master" not in state:
            state["master"] = param.float()
        state["step"] = state["step"].cpu() + 1  # on a GPU, reading it would wait for all before
        bias = [1 - beta ** state["step"].item() for beta in BETAS]  # the moments began at 0
        mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        grad = local(param.grad).float()
        mean.lerp_(grad, 1 - BETAS[0])
        square.lerp_(grad.square(), 1 - BETAS[1])
        exact = local(state.get("master", param)).float()  # the very same tensor where it is fp32
        exact.addcdiv_(mean, (square / bias[1]).sqrt_().add_(EPS), value=-lr / bias[0])
        if is_narrow:
            local(param).copy_(stochastic_round(exact) if self.is_stochastic else exact)


def stochastic_round(x: Tensor) -> Tensor:
    """fp32 -> bf16, one of the two neighbours, the nearer one the likelier; x on average.

    A random number added to the lower half of an fp32 carries into the upper half, a bf16, with
    just the right probability, in either sign; what is left below is cut off.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    cut = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isnan(), x, cut).bfloat16()  # a NaN's bits could carry into its sign
