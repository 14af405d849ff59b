"""Wrong answers: words of the check that fails, the member of the solution, what replaces it."""

import torch
import torch.nn.functional as F

from course.tests.solutions.a7 import entropy
from routers import pool, top_k_gates


def right(self):
    """The solution's own methods."""
    return super(type(self), self)


def top_k(self, z):
    return top_k_gates(z.softmax(dim=-1), self.top_k)


def rescaled(self, *args):
    gates = right(self).gate(*args)
    return gates / gates.sum(dim=-1, keepdim=True)


def not_rescaled(self, z, *more):
    return z.softmax(dim=-1) * (right(self).gate(z, *more) != 0)


def padded(name):
    """With a mask that is true everywhere."""
    return lambda self, *args: getattr(right(self), name)(*args[:-2], args[-2] | True, args[-1])


def share_after_the_drop(self, gates, z, mask, x):
    share = (gates != 0).float().sum(dim=(0, 1)) / mask.sum()
    return self.weight * len(share) * (share * z[mask].softmax(dim=-1).mean(dim=0)).sum()


def softmax_first(self, z, mask, x, prompt, previous):
    pooled = pool(z.softmax(dim=-1), mask if prompt is None else mask & prompt)
    return (top_k_gates(pooled, self.top_k) if previous is None else previous.gates).expand_as(z)


def dropped(rank_of):  # Switch, with another rank of the tokens, from gates (B, T, E)
    def gate(self, z, mask, x):
        gates = top_k_gates(z.softmax(dim=-1), 1) * mask[..., None]
        capacity = (self.capacity_factor * mask.sum(dim=1) / gates.shape[-1]).ceil()
        keep = (rank_of(gates) < capacity[:, None, None]) | (not self.training)
        return torch.where(keep, gates, 0.0)

    return gate


WRONG = {  # assignment -> its wrong answers; r is the router, z are logits, g gates
    1: [("is softplus(x W_noise)", "gate", lambda r, z, mask, x:
         top_k(r, z + torch.randn_like(z) * r.noise(x) * r.training)),
        ("nothing is detached", "gate", lambda r, z, mask, x:
         top_k(r, z + torch.randn_like(z) * F.softplus(r.noise(x)).detach() * r.training)),
        ("Softmax over the k kept logits", "gate", not_rescaled),
        ("not of token counts", "penalty", lambda r, g, *a: right(r).penalty(1.0 * (g != 0), *a))],
    2: [("raw probability, not 1", "gate", lambda r, *a: (right(r).gate(*a) != 0).float()),
        ("8 tokens, factor 1.0", "gate", lambda r, z, *a: top_k_gates(z.softmax(dim=-1), 1)),
        ("The capacity counts real tokens only", "gate", padded("gate")),
        ("The capacity is per sample", "gate", lambda r, *args:
         right(r).gate(*(t.flatten(0, 1)[None] for t in args)).view_as(args[0])),
        ("Is it one argsort?", "gate", dropped(lambda g: g.argsort(1, descending=True))),
        ("in its own expert's queue", "gate", dropped(lambda g:
         g.amax(dim=2, keepdim=True).argsort(1, descending=True).argsort(1))),
        ("The least probable tokens are dropped first", "gate",
         dropped(lambda g: (g != 0).cumsum(dim=1) - 1)),
        ("before any is dropped", "penalty", share_after_the_drop)],
    3: [("rescaled to sum to 1 if k > 1", "gate", not_rescaled),
        ("logits them", "penalty", lambda r, g, z, *a: right(r).penalty(g, z.softmax(-1), *a)),
        ("The penalty counts padding", "penalty", padded("penalty")),
        ("The penalty overflows", "penalty", lambda r, g, z, mask, x:
         r.weight * z[mask].exp().sum(dim=-1).log().square().mean())],
    4: [("padding is selected", "gate", padded("gate")),
        ("over the tokens", "gate", lambda r, z, *a: z.softmax(1) * (right(r).gate(z, *a) != 0))],
    5: [("neither a softmax", "gate", lambda r, z, *a: right(r).gate(z.softmax(-1).logit(), *a)),
        ("to the scores, ", "gate", lambda r, z, *a: z.sigmoid() * (top_k(r, z + r.bias) != 0)),
        ("is in the gates", "gate", lambda r, *a: (g := right(r).gate(*a)) + r.bias * (g != 0)),
        ("The sign is wrong", "update", lambda r, load: right(r).update(-load)),
        ("After 1 updates", "update", lambda r, load: r.bias.add_(r.rate * (load.mean() - load)))],
    6: [("At k = 1 every gate is 1", "gate", rescaled),
        ("a softmax gives other values", "gate", lambda r, z, *a: top_k(r, z)),
        ("sums_to_one does not match the gates", "sums_to_one", False)],
    7: [("A generated", "gate", lambda r, *a, prompt, previous: right(r).gate(*a, prompt, None)),
        ("Answer token", "gate", lambda r, *a, prompt, previous: right(r).gate(*a, None, previous)),
        ("Padding changes the route", "gate", lambda r, z, mask, x, prompt, previous:
         right(r).gate(z, mask if prompt is None else prompt, x, prompt, previous)),
        ("All positions are", "gate", lambda r, z, mask, x, prompt, previous: top_k(r, z)),
        ("the softmax after the mean", "gate", softmax_first),
        ("+ log E - entropy of the mean", "penalty", lambda r, g, z, mask, x: r.weight
         * (entropy(p := z[mask].softmax(dim=-1)).mean() + entropy(p.mean(dim=0))))],
    8: [("there is no top-k", "gate", lambda r, z, *a: z.relu() * (top_k(r, z) != 0)),
        ("The penalty counts padding", "penalty", padded("penalty")),
        ("From 0.5, with 3.4 experts", "update", lambda r, load:
         r.coefficient.mul_(r.factor ** (r.top_k - load.sum()).sign()))]}  # fmt: skip
