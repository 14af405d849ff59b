"""Top-k with a temperature: below 1 the likeliest expert gets a larger gate."""

from routers import Router, top_k_gates


class Sharp(Router):
    temperature = 0.7

    def gate(self, logits, mask, x):
        probs = (logits / self.temperature).softmax(dim=1)
        return top_k_gates(probs, self.top_k)
