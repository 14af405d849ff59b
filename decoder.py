"""The language models by hand: Phi-2 (parallel blocks), StableLM-2 and Llama (sequential blocks).

Shapes: B batch, T new positions, C all positions a query can look at (cached + new), D d_model,
H heads, G heads of keys and values (G = H but for Llama), K head width, E experts, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import DecoderConfig
from moe import MLP, GatedMLP
from ops import attend
from routers import Hints, Routing


class Cache:
    """Keys, values and last routings of every block, so that a new token costs one position."""

    def __init__(self, n_layers: int):
        self.keys: list[Tensor | None] = [None] * n_layers  # (B, G, C, K)
        self.values: list[Tensor | None] = [None] * n_layers
        self.held: list[Routing | None] = [None] * n_layers  # (B, 1, E)
        self.mask: Tensor | None = None  # (B, C) bool

    def fork(self) -> "Cache":
        """A cache that goes its own way from here; nothing is copied, as keys are only added."""
        other = Cache(len(self.keys))
        other.keys, other.values, other.held = self.keys[:], self.values[:], self.held[:]
        other.mask = self.mask
        return other

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, G, T, K) of a layer; returns all of them, (B, G, C, K)."""
        if self.keys[layer] is not None:
            k = torch.cat([self.keys[layer], k], dim=2)
            v = torch.cat([self.values[layer], v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, rotary_dim) in fp32 (Su et al. 2021).

    Channels are paired across halves, as in GPT-NeoX; sin is negative for the first half.
    """
    channel = torch.arange(0, rotary_dim, 2, device=positions.device)
    frequency = theta ** (-channel.float() / rotary_dim)  # (rotary_dim / 2,)
    angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, rotary_dim / 2)
    angle = torch.cat([-angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first rotary_dim channels of x (B, H, T, K); the others pass through."""
    n = cos.shape[-1]
    turned, passed = x[..., :n].float(), x[..., n:]
    turned = turned * cos + turned.roll(n // 2, dims=-1) * sin
    return torch.cat([turned.to(x.dtype), passed], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with partial rotary embedding.

    With fewer heads of keys and values than of queries, H / G neighbours share one (Ainslie et
    al. 2023).
    """

    def __init__(self, config: DecoderConfig, qkv_bias: bool, o_bias: bool):
        super().__init__()
        width, self.head_width = config.d_model, config.d_model // config.n_heads
        n_kv_heads = config.n_kv_heads or config.n_heads
        narrow = n_kv_heads * self.head_width  # G * K
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k, self.v = (nn.Linear(width, narrow, bias=qkv_bias) for _ in range(2))
        self.o = nn.Linear(width, width, bias=o_bias)
        self.n_heads, self.n_kv_heads = config.n_heads, n_kv_heads
        self.fused: dict[str, Tensor] = {}  # weight and bias of q, k and v in one

    @torch.no_grad()
    def fuse(self) -> None:
        """For answering: q, k and v become parts of one matrix, and one product serves all three.

        Where gradients are needed they stay three; so they do once they are moved or cast.
        """
        layers = self.q, self.k, self.v
        for key in dict(self.q.named_parameters()):
            params = [getattr(layer, key) for layer in layers]
            self.fused[key] = torch.cat(params)
            for param, part in zip(params, self.fused[key].split([*map(len, params)]), strict=True):
                param.data = part

    def _apply(self, *args, **kwargs):
        self.fused = {}
        return super()._apply(*args, **kwargs)

    def heads(self, x: Tensor) -> Tensor:
        n = x.shape[-1] // self.head_width
        return x.view(*x.shape[:-1], n, self.head_width).transpose(1, 2)  # (B, n, T, K)

    def project(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, H, T, K), k and v (B, G, T, K); q and k are turned."""
        if not self.fused or torch.is_grad_enabled():
            q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
            return rotate(q, *turn), rotate(k, *turn), v
        both = self.n_heads + self.n_kv_heads
        qk, v = self.heads(F.linear(x, **self.fused)).split([both, self.n_kv_heads], dim=1)
        q, k = rotate(qk, *turn).split([self.n_heads, self.n_kv_heads], dim=1)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        visible: Tensor,
        turn: tuple[Tensor, Tensor],
        cache: Cache | None,
        layer: int,
    ) -> Tensor:
        """x (B, T, D), visible (B, 1, T, C) 0 or -inf, turn = rotary cos and sin -> (B, T, D)."""
        q, k, v = self.project(x, turn)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, C, K)
        if (n_shared := self.n_heads // self.n_kv_heads) > 1:
            k, v = (x.repeat_interleave(n_shared, dim=1) for x in (k, v))  # (B, H, C, K)
        y = attend(q, k, v, visible)  # (B, H, T, K)
        return self.o(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """What both families share: a feed-forward that is dense, or sparse after upcycling."""

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
        self.is_sparse = False

    def forward(self, x, mask, visible, turn, cache, layer, hints) -> tuple[Tensor, Routing | None]:
        h = self.ln(x)  # (B, T, D)
        y, routing = self.feed_forward(h, mask, hints)
        return x + self.drop(self.attn(h, visible, turn, cache, layer)) + self.drop(y), routing


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
        self.is_sparse = False

    def forward(self, x, mask, visible, turn, cache, layer, hints) -> tuple[Tensor, Routing | None]:
        x = x + self.drop(self.attn(self.ln_1(x), visible, turn, cache, layer))  # (B, T, D)
        y, routing = self.feed_forward(self.ln_2(x), mask, hints)
        return x + self.drop(y), routing


class LlamaBlock(StableLMBlock):
    """The same two steps with RMSNorm and without any bias."""

    norm, qkv_bias = nn.RMSNorm, False


BLOCKS = {"phi": PhiBlock, "stablelm": StableLMBlock, "llama": LlamaBlock}


class Decoder(nn.Module):
    """Token embedding, blocks, final LayerNorm and the head that scores the vocabulary."""

    recompute = False  # True: training computes activations again in backward, and keeps none

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(BLOCKS[config.family](config) for _ in range(config.n_layers))
        self.ln_f = BLOCKS[config.family].norm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.family == "phi")
        self.tie()

    def tie(self) -> None:
        """Let the head score with the embedding itself, where the published model does."""
        if self.config.tied:
            self.lm_head.weight = self.embed.weight

    def forward(
        self, x: Tensor, mask: Tensor, hints: Hints, cache: Cache | None = None,
        given: Sequence[Routing] = (),
    ) -> tuple[Tensor, list[Routing]]:  # fmt: skip
        """x (B, T, D) embeddings, mask (B, T) True = real -> hidden (B, T, D), routings.

        Positions count real tokens only, so padding on either side changes nothing. The routings
        are those of the sparse blocks, in order; given: what these take in place of deciding.
        With a cache, x continues what it holds.
        """
        seen = mask if cache is None or cache.mask is None else torch.cat([cache.mask, mask], dim=1)
        positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -x.shape[1] :]  # (B, T)
        turn = rotary_angles(positions, self.config.rotary_dim, self.config.rope_theta)
        visible = visible_positions(seen, x.shape[1])
        routings = []
        for layer, block in enumerate(self.blocks):
            if block.is_sparse:
                held = cache.held[layer] if cache is not None else None
                told = given[len(routings)] if given else None
                hints = hints._replace(held=held, given=told)
            args = x, mask, visible, turn, cache, layer, hints
            if self.recompute and self.training:  # dropout draws the same again
                x, routing = checkpoint(block, *args, use_reentrant=False)
            else:
                x, routing = block(*args)
            if routing is not None:
                routings.append(routing)
                if cache is not None:
                    cache.held[layer] = routing.last()
        if cache is not None:
            cache.mask = seen
        return self.ln_f(x), routings


def visible_positions(seen: Tensor, n_new: int) -> Tensor:
    """seen (B, C) bool, True = real -> (B, 1, T, C) fp32: 0 up to the query's own, else -inf.

    Each position may see itself, so that padding has something to attend to and stays finite.
    """
    n_all = seen.shape[1]
    row = torch.arange(n_all - n_new, n_all, device=seen.device)[:, None]  # (T, 1)
    column = torch.arange(n_all, device=seen.device)  # (C,)
    visible = (seen[:, None, None] & (column <= row)) | (column == row)
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, float("-inf"))
