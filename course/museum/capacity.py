"""Top-k with a capacity (Lepikhin et al. 2020): an expert takes a limited number of tokens.

The capacity is 1.25 times the load of an expert at perfect balance. A token beyond it is dropped
by that expert; the meta expert still computes it.
"""

import math

from routers import TopKRouter, top_k_gates


class Capacity(TopKRouter):
    sums_to_one = False  # not for a token that an expert drops
    factor = 1.25

    def gate(self, logits, mask, x):
        gates = top_k_gates(logits.softmax(dim=-1), self.top_k)
        chosen = ((gates != 0) & mask[..., None]).flatten(0, 1)  # (B * T, E)
        capacity = math.ceil(self.factor * self.top_k * int(mask.sum()) / gates.shape[-1])
        rank = chosen.long().cumsum(dim=0)  # 1 for the first token of an expert
        kept = (chosen & (rank <= capacity)).view_as(gates)
        return gates.masked_fill(~kept, 0.0)
