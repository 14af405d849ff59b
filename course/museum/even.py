"""Top-k with a penalty on uneven load: the squared coefficient of variation of the token counts.

After Shazeer et al. 2017, section 4: 0 if every expert gets the same number of tokens.
"""

from routers import TopKRouter


class Even(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        load = (gates > 0).float()[mask].sum(dim=0)  # (E,)
        return load.var(correction=0) / load.mean().clamp(min=1e-6) ** 2
