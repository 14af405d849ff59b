"""f_e counts the tokens that are left after dropping."""

from solutions.a2 import Switch as Right


class Switch(Right):
    def penalty(self, gates, logits, mask, x):
        n = mask.sum()
        share = (gates != 0).float().sum(dim=(0, 1)) / n
        mean = logits[mask].softmax(dim=-1).mean(dim=0)
        return self.weight * len(mean) * (share * mean).sum()
