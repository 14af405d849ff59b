"""Top-k with a capacity (Lepikhin et al. 2020): an expert serves so many tokens and no more.

Nobody waits for a slow expert: it has 1.25 times the seats of an even load, and a token that
finds none left goes without. The meta expert serves it still.
"""

import math

from routers import TopKRouter, top_k_gates


class Capacity(TopKRouter):
    sums_to_one = False  # not where a visit was dropped
    factor = 1.25

    def gate(self, logits, mask, x):
        gates = top_k_gates(logits.softmax(dim=-1), self.top_k)
        wanted = ((gates != 0) & mask[..., None]).flatten(0, 1)  # (B * T, E)
        seats = math.ceil(self.factor * self.top_k * int(mask.sum()) / gates.shape[-1])
        place = wanted.long().cumsum(dim=0)  # 1 for the first who comes
        served = (wanted & (place <= seats)).view_as(gates)
        return gates.masked_fill(~served, 0.0)
