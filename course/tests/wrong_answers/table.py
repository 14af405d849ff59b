"""Wrong answers: words of the check that fails, the member of the solution, what replaces it."""

import torch

from course.tests.solutions.a7 import entropy
from routers import pool, top_k_gates


def right(self):
    """The solution's own methods."""
    return super(type(self), self)


def top_k(self, z):
    return top_k_gates(z.softmax(dim=-1), self.top_k)


def rescaled(gates):
    return gates / gates.sum(dim=-1, keepdim=True)


def not_rescaled(self, z, *more):
    return z.softmax(dim=-1) * (right(self).gate(z, *more) != 0)


def of_one(self, *args):
    return (right(self).gate(*args) != 0).float()


def over_the_batch(self, *args):
    return right(self).gate(*(t.flatten(0, 1)[None] for t in args)).view_as(args[0])


def padded(name):
    """With a mask that is true everywhere."""
    return lambda self, *args: getattr(right(self), name)(*args[:-2], args[-2] | True, args[-1])


def not_a_buffer(name):
    def init(self, *args, **kwargs):
        right(self).__init__(*args, **kwargs)
        vars(self)[name] = self._buffers.pop(name)

    return init


def drop_late(self, z, mask, x):
    gates = top_k_gates(z.softmax(dim=-1), 1) * mask[..., None]
    capacity = (self.capacity_factor * mask.sum(dim=1) / gates.shape[-1]).ceil()  # (B,)
    return gates * ((gates != 0).cumsum(dim=1) <= capacity[:, None, None])


def share_after_the_drop(self, gates, z, mask, x):
    share = (gates != 0).float().sum(dim=(0, 1)) / mask.sum()
    return self.weight * len(share) * (share * z[mask].softmax(dim=-1).mean(dim=0)).sum()


def softmax_over_tokens(self, z, mask, x):
    probs = z.masked_fill(~mask[..., None], -1e9).softmax(dim=1)
    return probs * (right(self).gate(z, mask, x) != 0)


def update_in_gate(self, z, mask, x):
    gates = right(self).gate(z, mask, x)
    self.update((gates[mask] != 0).float().mean(dim=0))
    return gates


def route_each_token(self, z, mask, x, prompt, previous):
    return top_k(self, z) if previous is None else previous.gates.expand_as(z)


def softmax_first(self, z, mask, x, prompt, previous):
    pooled = pool(z.softmax(dim=-1), mask if prompt is None else mask & prompt)
    return (top_k_gates(pooled, self.top_k) if previous is None else previous.gates).expand_as(z)


def add_global_entropy(self, gates, z, mask, x):
    probs = z[mask].softmax(dim=-1)
    return self.weight * (entropy(probs).mean() + entropy(probs.mean(dim=0)))


WRONG = {  # assignment -> its wrong answers; z are logits, g gates
    1: [
        ("There is noise in evaluation", "gate", lambda self, *a: right(self.train()).gate(*a)),
        ("is softplus(x W_noise)", "gate", lambda self, z, mask, x:
         top_k(self, z + torch.randn_like(z) * self.noise(x) * self.training)),
        ("At k = 1 every gate is 1", "gate", lambda self, *a: rescaled(right(self).gate(*a))),
        ("It is not over the k = 2 kept logits", "gate", not_rescaled),
        ("not of token counts", "penalty", lambda self, g, *a:
         right(self).penalty((g != 0).float(), *a)),
    ],
    2: [
        ("the gate is the raw probability, not 1", "gate", of_one),
        ("In evaluation no token is dropped", "gate", lambda self, *a:
         right(self.train()).gate(*a)),
        ("at most ceil(capacity_factor * real / E) tokens", "gate", lambda self, z, mask, x:
         top_k_gates(z.softmax(dim=-1), 1)),
        ("The capacity counts real tokens only", "gate", padded("gate")),
        ("The capacity is per sample", "gate", over_the_batch),
        ("The least probable tokens are dropped first", "gate", drop_late),
        ("f_e the share of top-1 choices", "penalty", lambda self, g, z, mask, x:
         self.weight * z.shape[-1] * z[mask].softmax(dim=-1).mean(dim=0).square().sum()),
        ("before any is dropped", "penalty", share_after_the_drop),
    ],
    3: [
        ("rescaled to sum to 1 if k > 1", "gate", not_rescaled),
        ("of the logits themselves", "penalty", lambda self, g, z, *a:
         right(self).penalty(g, z.softmax(dim=-1), *a)),
        ("The penalty counts padding", "penalty", padded("penalty")),
        ("The penalty overflows", "penalty", lambda self, g, z, mask, x:
         self.weight * z[mask].exp().sum(dim=-1).log().square().mean()),
    ],
    4: [
        ("padding is selected", "gate", padded("gate")),
        ("Select among the positions of one sample", "gate", over_the_batch),
        ("not over the tokens", "gate", softmax_over_tokens),
        ("a gate of 1, or a detached one, has none", "gate", of_one),
        ("has to declare causal = False", "causal", True),
    ],
    5: [
        ("neither a softmax nor rescaled", "gate", lambda self, z, *a:
         right(self).gate(z.softmax(dim=-1).logit(), *a)),
        ("`bias` is not a buffer", "__init__", not_a_buffer("bias")),
        ("added to the scores, not to the logits", "gate", lambda self, z, *a:
         z.sigmoid() * (top_k(self, z + self.bias) != 0)),
        ("The bias is in the gates", "gate", lambda self, *a:
         (g := right(self).gate(*a)) + self.bias * (g != 0)),
        ("The bias changed in `gate`", "gate", update_in_gate),
        ("The sign is wrong", "update", lambda self, load: right(self).update(-load)),
        ("Add rate * sign(mean load - load)", "update", lambda self, load:
         self.bias.add_(self.rate * (load.mean() - load))),
    ],
    6: [
        ("At k = 1 every gate is 1", "gate", lambda self, *a: rescaled(right(self).gate(*a))),
        ("Divide by the sum over the k kept, not over all", "gate", lambda self, z, *a:
         rescaled(z.sigmoid()) * (right(self).gate(z, *a) != 0)),
        ("a softmax gives other values", "gate", lambda self, z, *a: top_k(self, z)),
        ("sums_to_one does not match the gates", "sums_to_one", False),
    ],
    7: [
        ("A generated token gets gates of its own", "gate", lambda self, *a, prompt, previous:
         right(self).gate(*a, prompt, None)),
        ("Answer tokens change the route", "gate", lambda self, *a, prompt, previous:
         right(self).gate(*a, None, previous)),
        ("Padding changes the route", "gate", lambda self, z, mask, x, prompt, previous:
         right(self).gate(z, mask if prompt is None else prompt, x, prompt, previous)),
        ("Positions of a sample have different gates", "gate", route_each_token),
        ("the softmax after the mean", "gate", softmax_first),
        ("With prompt = None", "gate", lambda self, z, mask, x, prompt, previous: right(self).gate(
            z, mask, x, mask.cumsum(dim=1) == 1 if prompt is None else prompt, previous)),
        ("+ log E - entropy of the mean", "penalty", add_global_entropy),
    ],
    8: [
        ("there is no top-k and no rescaling", "gate", lambda self, z, *a:
         z.relu() * (top_k(self, z) != 0)),
        ("The penalty counts padding", "penalty", padded("penalty")),
        ("`coefficient` is not a buffer", "__init__", not_a_buffer("coefficient")),
        ("coefficient *= factor^sign(sum of load - k)", "update", lambda self, load:
         self.coefficient.mul_(self.factor ** (self.top_k - load.sum()).sign())),
        ("has to declare at_most_k = False", "at_most_k", True),
    ],
}  # fmt: skip
