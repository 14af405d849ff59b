"""What a checkpoint's routers did while it answered: the modality, and the load of the experts.

Shapes: L sparse layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from config import MODALITIES
from data import Sample
from metrics import expert_names, router_report


def judge_router(samples: Sequence[Sample], predictions: Sequence[Any]) -> dict:
    """Accuracy of the likeliest expert, over an image's prompts and layers, as its modality.

    predictions: eval.Prediction, of which `votes` (E,) and `load` (L, E) are used here.
    """
    votes: dict = {}
    for s, p in zip(samples, predictions, strict=True):
        if s.modality and s.image is not None and len(p.votes):
            votes[s.image] = (s.modality, votes.get(s.image, (None, 0))[1] + p.votes)
    n_experts = len(predictions[0].votes)
    truth = [MODALITIES.index(name) % max(1, n_experts) for name, _ in votes.values()]
    predicted = [int(vote.argmax()) for _, vote in votes.values()]
    return router_report(truth, predicted, expert_names(n_experts or len(MODALITIES)))


def expert_load(samples: Sequence[Sample], predictions: Sequence[Any]) -> dict[str, list]:
    """Modality -> (L, E) share of a layer's routed tokens that each expert gets."""
    total: dict[str, Tensor] = {}
    for s, p in zip(samples, predictions, strict=True):
        name = s.modality or "unknown"
        total[name] = total.get(name, 0) + p.load.double()
    return {name: (t / t.sum(1, keepdim=True).clamp(min=1)).tolist()  # 0 where all are dropped
            for name, t in sorted(total.items())}  # fmt: skip


def show_load(load: dict[str, list], names: Sequence[str], blocks: Sequence[int]) -> str:
    """Expert load per sparse block and modality, in percent of the routed tokens."""
    lines = ["each expert's share of the routed tokens; with k experts per token at most 1/k",
             " " * 26 + "".join(f"{name:>10}" for name in names)]  # fmt: skip
    for layer, block in enumerate(blocks):
        for name, table in load.items():
            cells = "".join(f"{share:10.1%}" for share in table[layer])
            lines.append(f"  block {block:<4}{name:<14}{cells}")
    return "\n".join(lines)
