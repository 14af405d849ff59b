"""Top-k with the balance loss of the Switch Transformer (Fedus et al. 2021, equation 4)."""

from routers import TopKRouter


class Balanced(TopKRouter):
    def penalty(self, gates, logits, mask, x):
        n_tokens = (gates != 0).float().sum(dim=(0, 1))  # (E,)
        share = n_tokens / n_tokens.sum().clamp(min=1)
        mean_p = logits.softmax(dim=-1).mean(dim=(0, 1))  # (E,)
        return gates.shape[-1] * (share * mean_p).sum()
