"""Top-k that pays for an uneven load: the squared coefficient of variation of the visits.

After Shazeer et al. 2017, section 4: 0 where every expert has the same number of visits.
"""

from routers import TopKRouter


class Even(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        load = (gates > 0).float()[mask].sum(dim=0)  # (E,)
        return load.var(correction=0) / load.mean().clamp(min=1e-6) ** 2
