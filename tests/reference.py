"""The specification: what the model computes, in the plainest form, token by token.

Each function is an equation of a paper or of a published model. Letters as in config.py:
T positions, C positions that a query can look at, D, W widths, K head width, E experts, R real
tokens, V vocabulary. `real` (T,) is False on padding.
"""

import math

import torch
from torch import nn

from config import IGNORE, IMAGE_ID


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(layer, x):
    """LayerNorm, or RMSNorm (no mean, no bias)."""
    bias = 0.0
    if isinstance(layer, nn.LayerNorm):
        x, bias = x - x.mean(dim=-1, keepdim=True), layer.bias
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + layer.eps) * layer.weight + bias


def attention(q, k, v, allowed):
    """One head: softmax(q k' / sqrt(K)) v, q (T, K), k, v (C, K), allowed (T, C) bool."""
    rows = []
    for query, is_seen in zip(q, allowed, strict=True):
        scores = k[is_seen] @ query / math.sqrt(len(query))
        rows.append(scores.softmax(dim=0) @ v[is_seen])
    return torch.stack(rows)


def rope(x, positions, rotary_dim, theta):
    """One head, x (T, K): channel i is rotated with channel i + rotary_dim / 2 (Su et al. 2021)."""
    y, half = x.clone(), rotary_dim // 2
    for i in range(half):
        angle = positions * theta ** (-2 * i / rotary_dim)
        a, b = x[:, i], x[:, i + half]
        y[:, i] = a * angle.cos() - b * angle.sin()
        y[:, i + half] = b * angle.cos() + a * angle.sin()
    return y


def self_attention(attn, x, real, config):
    """Of the decoder, x (T, D): each position looks at itself, and at the real ones before it.

    Positions count real tokens. H / G neighbouring heads of queries share one of keys and values.
    """
    positions, t = (real.cumsum(dim=0) - 1).clamp(min=0), range(len(real))
    allowed = torch.tensor([[j == i or (j < i and bool(real[j])) for j in t] for i in t])
    width, heads = config.d_model // config.n_heads, []
    q, k, v = (layer(x).split(width, dim=-1) for layer in (attn.q, attn.k, attn.v))
    for h in range(len(q)):
        g = h // (len(q) // len(k))
        qk = [rope(t, positions, config.rotary_dim, config.rope_theta) for t in (q[h], k[g])]
        heads.append(attention(*qk, v[g], allowed))
    return attn.o(torch.cat(heads, dim=-1))


def ffn(weights, x):
    """fc2(gelu(fc1 x)) with biases, as in Phi-2; else down(silu(gate x) * up x)."""
    w = {name.removesuffix(".weight"): tensor for name, tensor in weights.items()}
    if "fc1" in w:
        return tanh_gelu(x @ w["fc1"].T + w["fc1.bias"]) @ w["fc2"].T + w["fc2.bias"]
    gate = x @ w["gate"].T
    return (gate / (1 + torch.exp(-gate)) * (x @ w["up"].T)) @ w["down"].T


def top_k(scores, k):
    """The k largest of each token's scores (..., E); 0 elsewhere."""
    rows = []
    for token in scores.flatten(0, -2):
        best = token.argsort(descending=True)[:k].tolist()
        rows.append(torch.stack([p if e in best else 0 * p for e, p in enumerate(token)]))
    return torch.stack(rows).view_as(scores)


def top_k_gates(probs, k):
    """Rescaled to sum to 1; but with k = 1 the gate is the probability itself."""
    kept = top_k(probs, k)
    return kept / kept.sum(dim=-1, keepdim=True) if k > 1 else kept


def router_gates(router, x, mask, prompt):
    """Of a TopKRouter, x (B, T, D) -> (B, T, E); of a sample: on the mean of the prompt."""
    if router.level != "token":
        seen = mask & prompt
        means = [x[b, seen[b]].sum(dim=0) / max(1, int(seen[b].sum())) for b in range(len(x))]
        x = torch.stack(means)[:, None].expand_as(x)
    logits = x.float() @ router.proj.weight.float().T + router.proj.bias.float()
    return torch.where(mask[..., None], top_k_gates(logits.softmax(dim=-1), router.top_k), 0.0)


def experts(stacked, x, gates):
    """sum over e of gates[e] * expert_e(x): x (N, D), gates (N, E), each weight (E, ...)."""
    rows = []
    for token, gate in zip(x, gates, strict=True):
        y = torch.zeros_like(token)
        for e in range(gates.shape[1]):
            expert = {name: weight[e] for name, weight in stacked.items()}
            y = y + gate[e].to(x.dtype) * ffn(expert, token)
        rows.append(y)
    return torch.stack(rows)


def sparse_layer(moe, x, gates):
    """y = meta(x) + sum over e of gates[e] * expert_e(x), x (B, T, D) (paper, equation 4)."""
    stacked = dict(moe.experts.named_parameters())
    y = experts(stacked, x.flatten(0, 1), gates.flatten(0, 1)).view_as(x)
    return y if moe.meta is None else y + ffn(dict(moe.meta.named_parameters()), x)


def load_balancing_loss(gates, logits):
    """E * sum over e of f_e P_e (Fedus et al. 2021, equation 4); both are (R, E)."""
    n_experts, total = gates.shape[1], 0.0
    for e in range(n_experts):
        f = (gates[:, e] != 0).sum() / (gates != 0).sum()  # share of the routed tokens
        total = total + f * sum(token.softmax(dim=0)[e] for token in logits) / len(logits)
    return n_experts * total


def z_loss(logits):
    """Mean of log(sum of exp(logits)) squared, logits (R, E) (Zoph et al. 2022, equation 5)."""
    return sum(token.exp().sum().log() ** 2 for token in logits) / len(logits)


def loss(logits, labels):
    """(B, T, V), (B, T) -> sum of -log p(label) over supervised tokens, and their number.

    Each is predicted from the position before; so the first has nothing to be predicted from.
    """
    terms = []
    for row, its_labels in zip(logits, labels.tolist(), strict=True):
        for t in range(1, len(its_labels)):
            if its_labels[t] != IGNORE:
                terms.append(-row[t - 1].float().log_softmax(dim=0)[its_labels[t]])
    return sum(terms), len(terms)


def tower(vision, image, n_heads):
    """CLIP before its last layer: (3, S, S) -> (P + 1, W), first the CLS token, then row by row."""
    kernel = vision.patch_embed.weight  # (W, 3, size, size)
    size, x = kernel.shape[-1], [vision.cls]
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            patch = image[:, top : top + size, left : left + size]
            x.append(kernel.flatten(1) @ patch.flatten())
    x = norm(vision.ln_pre, torch.stack(x) + vision.positions)
    everywhere = torch.ones(len(x), len(x)).bool()
    for block in vision.blocks:
        h = norm(block.ln_1, x)
        qkv = [layer(h).chunk(n_heads, dim=-1) for layer in (block.q, block.k, block.v)]
        heads = [attention(q, k, v, everywhere) for q, k, v in zip(*qkv, strict=True)]
        x = x + block.o(torch.cat(heads, dim=-1))
        h = block.fc1(norm(block.ln_2, x))
        x = x + block.fc2(h / (1 + torch.exp(-1.702 * h)))  # "quick GELU"
    return x


def decoder(model, x, real, prompt):
    """x (T, D) -> (T, D). Phi-2 runs attention and FFN side by side, on one norm."""
    decided = []
    for block in model.blocks:
        is_phi = model.config.family == "phi"
        first, second = (block.ln, block.ln) if is_phi else (block.ln_1, block.ln_2)
        y = x + self_attention(block.attn, norm(first, x), real, model.config)
        h = norm(second, x if is_phi else y)
        if hasattr(block.mlp, "router"):
            if not decided or block.mlp.router.level != "once":
                decided = [router_gates(block.mlp.router, h[None], real[None], prompt[None])]
            (gates,) = decided
            x = y + sparse_layer(block.mlp, h[None], gates)[0]
        else:
            x = y + ffn(dict(block.mlp.named_parameters()), h)
    return norm(model.ln_f, x)


def logits(model, ids, real, images, prompt):
    """ids (T,) and the sample's images (n, 3, S, S) -> (T, V)."""
    n_heads, projector = model.config.vision.n_heads, model.projector
    patches = [patch for image in images for patch in tower(model.vision, image, n_heads)[1:]]
    patches = iter([projector.fc2(gelu(projector.fc1(patch))) for patch in patches])
    x = [next(patches) if i == IMAGE_ID else model.decoder.embed(i) for i in ids]
    return model.decoder.lm_head(decoder(model.decoder, torch.stack(x), real, prompt))
