"""The language models by hand: Phi-2 (parallel blocks), StableLM-2 and Llama (sequential blocks).

Shapes: B batch, T new positions, C all positions a query can look at (cached + new), D d_model,
H heads, G heads of keys and values (G = H except for Llama), K head width, E experts.
"""

import torch
from torch import Tensor, nn

from config import DecoderConfig
from moe import MLP, GatedMLP
from routers import Hints, Routing
from vision import attention


class LayerCache:
    """What one block keeps of the positions so far."""

    def __init__(self):
        self.keys: Tensor | None = None  # (B, G, C, K)
        self.values: Tensor | None = None  # (B, G, C, K)
        self.routing: Routing | None = None  # (B, 1, E) of the last position

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, G, T, K); returns all of them, (B, G, C, K)."""
        if self.keys is not None:
            k, v = torch.cat([self.keys, k], dim=2), torch.cat([self.values, v], dim=2)
        self.keys, self.values = k, v
        return k, v


class Cache:
    """Keys, values and last routings of every block, so that a new token costs one position."""

    def __init__(self, n_layers: int):
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.mask: Tensor | None = None  # (B, C) bool


def rope(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, rotary_dim) in fp32 (Su et al. 2021).

    Channels are paired across halves, as in GPT-NeoX; sin is negative for the first half.
    """
    channel = torch.arange(0, rotary_dim, 2, device=positions.device)
    frequency = theta ** (-channel.float() / rotary_dim)  # (rotary_dim / 2,)
    angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, rotary_dim / 2)
    angle = torch.cat([-angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim channels of x (B, H, T, K); the others pass through.

    With a and b their halves: (a cos - b sin, b cos + a sin); sin carries the minus already.
    """
    n = cos.shape[-1]
    rotated, passed = x[..., :n].float(), x[..., n:]
    rotated = rotated * cos + rotated.roll(n // 2, dims=-1) * sin
    return torch.cat([rotated.to(x.dtype), passed], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with partial rotary embedding.

    With fewer heads of keys and values than of queries, H / G neighbours share one (Ainslie et
    al. 2023).
    """

    def __init__(self, config: DecoderConfig, qkv_bias: bool, o_bias: bool):
        super().__init__()
        width, self.head_width = config.d_model, config.d_model // config.n_heads
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        kv_width = self.n_kv_heads * self.head_width  # G * K
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k, self.v = (nn.Linear(width, kv_width, bias=qkv_bias) for _ in range(2))
        self.o = nn.Linear(width, width, bias=o_bias)

    def forward(
        self, x: Tensor, attn_mask: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None
    ) -> Tensor:
        """x (B, T, D), attn_mask (B, 1, T, C) 0 or -inf, cos and sin of the T -> (B, T, D)."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )  # fmt: skip  (B, H or G, T, K)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, G, C, K)
        if (n_shared := self.n_heads // self.n_kv_heads) > 1:
            k, v = (t.repeat_interleave(n_shared, dim=1) for t in (k, v))  # (B, H, C, K)
        y = attention(q, k, v, attn_mask)  # (B, H, T, K)
        return self.o(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """What the families share: an FFN that is dense, or a moe.MoE after upcycling."""

    is_sparse = False

    def feed_forward(self, x: Tensor, mask: Tensor, hints: Hints) -> tuple[Tensor, Routing | None]:
        if self.is_sparse:
            return self.mlp(x, mask, hints)
        return self.mlp(x), None


class PhiBlock(Block):
    """x + attn(ln(x)) + mlp(ln(x)): one LayerNorm, branches side by side, biases everywhere."""

    norm = nn.LayerNorm

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.ln = self.norm(config.d_model, config.norm_eps)
        self.attn = Attention(config, qkv_bias=True, o_bias=True)
        self.mlp = MLP(config.d_model, config.d_ff)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask, attn_mask, cos, sin, cache, hints) -> tuple[Tensor, Routing | None]:
        h = self.ln(x)  # (B, T, D)
        y, routing = self.feed_forward(h, mask, hints)
        return x + self.drop(self.attn(h, attn_mask, cos, sin, cache)) + self.drop(y), routing


class StableLMBlock(Block):
    """x = x + attn(ln_1(x)); x + mlp(ln_2(x)): biases in q, k, v and the LayerNorms only."""

    norm, qkv_bias = nn.LayerNorm, True

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.ln_1 = self.norm(config.d_model, config.norm_eps)
        self.attn = Attention(config, self.qkv_bias, o_bias=False)
        self.ln_2 = self.norm(config.d_model, config.norm_eps)
        self.mlp = GatedMLP(config.d_model, config.d_ff)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask, attn_mask, cos, sin, cache, hints) -> tuple[Tensor, Routing | None]:
        x = x + self.drop(self.attn(self.ln_1(x), attn_mask, cos, sin, cache))  # (B, T, D)
        y, routing = self.feed_forward(self.ln_2(x), mask, hints)
        return x + self.drop(y), routing


class LlamaBlock(StableLMBlock):
    """The same two steps with RMSNorm and without any bias."""

    norm, qkv_bias = nn.RMSNorm, False


BLOCKS = {"phi": PhiBlock, "stablelm": StableLMBlock, "llama": LlamaBlock}


class Decoder(nn.Module):
    """Token embedding, blocks, final norm, and the head that scores the vocabulary."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(BLOCKS[config.family](config) for _ in range(config.n_layers))
        self.ln_f = BLOCKS[config.family].norm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.family == "phi")
        self.tie()

    def tie(self) -> None:
        """Let the head share the embedding's weight, where the published model does."""
        if self.config.tied:
            self.lm_head.weight = self.embed.weight

    def forward(
        self, x: Tensor, mask: Tensor, hints: Hints, cache: Cache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """x (B, T, D) embeddings, mask (B, T) True = real -> hidden (B, T, D), routings.

        Positions count real tokens only, so padding on either side changes nothing. The routings
        are those of the sparse blocks, in order. With a cache, x continues what it holds.
        """
        real = mask if cache is None or cache.mask is None else torch.cat([cache.mask, mask], dim=1)
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -x.shape[1] :]  # (B, T)
        cos, sin = rope(positions, self.config.rotary_dim, self.config.rope_theta)
        attn_mask = causal_mask(real, x.shape[1])  # (B, 1, T, C)
        routings = []
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layers[i]
            if layer is not None:
                hints = hints._replace(previous=layer.routing)
            x, routing = block(x, mask, attn_mask, cos, sin, layer, hints)
            if routing is not None:
                routings.append(routing)
                hints = hints._replace(first=routings[0])
                if layer is not None:
                    layer.routing = Routing(routing.gates[:, -1:], routing.logits[:, -1:])
        if cache is not None:
            cache.mask = real
        return self.ln_f(x), routings


def causal_mask(real: Tensor, n_new: int) -> Tensor:
    """real (B, C) bool, False = padding -> (B, 1, T, C) fp32: 0 where a query may look, else -inf.

    Each position may look at itself, so that padding has something to attend to and stays finite.
    """
    n_all = real.shape[1]
    row = torch.arange(n_all - n_new, n_all, device=real.device)[:, None]  # (T, 1)
    column = torch.arange(n_all, device=real.device)  # (C,)
    allowed = (real[:, None, None] & (column <= row)) | (column == row)
    return torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, float("-inf"))
