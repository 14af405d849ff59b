"""For answering: the same model, computed faster; and answers that are chosen, not generated.

Shapes: B batch, T positions, C options, n tokens of an option, D, F widths, V vocabulary; H heads
and G heads of keys and values of width K, as in decoder.py.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from data import Batch
from decoder import Attention, Cache, apply_rope
from model import MedMoE
from moe import Experts
from ops import use_sorted_experts
from routers import Hints
from vision import attention


class FusedAttention(Attention):
    """Attention whose q, k and v are parts of one matrix: one product computes all three.

    Only without gradients, and until the weights are moved or cast; then it is Attention again.
    """

    fused: dict[str, Tensor]  # weight (D + 2GK, D) and perhaps bias

    def _apply(self, *args, **kwargs):
        self.fused = {}
        return super()._apply(*args, **kwargs)

    def forward(self, x, attn_mask, cos, sin, cache) -> Tensor:
        if not self.fused or torch.is_grad_enabled():
            return super().forward(x, attn_mask, cos, sin, cache)
        n, m = self.n_heads, self.n_kv_heads
        qkv = F.linear(x, **self.fused).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        qk, v = qkv.split([n + m, m], dim=1)  # (B, H + G, T, K), (B, G, T, K)
        q, k = apply_rope(qk, cos, sin).split([n, m], dim=1)
        if cache is not None:
            k, v = cache.extend(k, v)
        if n > m:
            k, v = (t.repeat_interleave(n // m, dim=1) for t in (k, v))
        return self.o(attention(q, k, v, attn_mask).transpose(1, 2).flatten(-2))


@torch.no_grad()
def fuse_qkv(attn: Attention) -> None:
    """q, k and v become views of one matrix; their names and values stay."""
    attn.__class__, attn.fused = FusedAttention, {}
    for key, _ in attn.q.named_parameters():
        params = [getattr(layer, key) for layer in (attn.q, attn.k, attn.v)]
        attn.fused[key] = torch.cat(params)
        for param, part in zip(params, attn.fused[key].split([*map(len, params)]), strict=True):
            param.data = part


def cast_matmuls(model: MedMoE, dtype: torch.dtype) -> None:
    """Once, what autocast would do for every token; same results. Not the routers, which use fp32.

    Tied heads stay too: the embedding needs them.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | Experts) and ".router" not in name:
            for param in module.parameters():
                if param is not model.decoder.embed.weight:
                    param.data = param.data.to(dtype)


def prepare(model: MedMoE, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a loaded model to the device and make it fast there. Same answers, to rounding."""
    if dtype not in (None, torch.float32):
        cast_matmuls(model, dtype)
    model.eval().to(device)
    use_sorted_experts(model)
    for block in model.decoder.blocks:
        fuse_qkv(block.attn)


def compile_blocks(model: MedMoE) -> None:
    """Compile every block in place, so that parameters keep their names.

    Of a sparse block only attention and meta expert: how many tokens each expert gets is known at
    run time only. Raises UserError where torch cannot compile, as without a C++ compiler.
    """
    torch.compiler.reset()  # the phase before compiled the same code for other tensors
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:  # each backend has its own
        raise UserError(f"--compile: torch cannot compile here: {error}") from error
    for block in (*model.vision.blocks, *model.decoder.blocks):
        is_sparse = getattr(block, "is_sparse", False)
        for part in filter(None, [block.attn, block.mlp.meta] if is_sparse else [block]):
            part.compile(dynamic=True)


def copy_cache(cache: Cache) -> Cache:
    """A cache that is extended on its own; no tensor is copied, as they are only replaced."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@torch.no_grad()
def option_likelihoods(model: MedMoE, batch: Batch, options: Sequence[Sequence[int]]) -> Tensor:
    """Log-likelihood of each option (token ids that end with the end token), (B, C) fp32.

    batch is padded on the left. The prompt is computed once; each option continues its cache.
    """
    cache = Cache(len(model.decoder.blocks))
    hints = Hints(prompt=batch.mask, modality=batch.modality)
    hidden, _ = model(batch.ids, batch.mask, batch.images, hints, cache)
    first = model.decoder.lm_head(hidden[:, -1]).float().log_softmax(dim=-1)  # (B, V)
    scores = []
    for option in options:
        ids = torch.tensor(option, device=first.device).expand(len(first), -1)  # (B, n)
        total = first.gather(1, ids[:, :1])  # (B, 1)
        if len(option) > 1:
            known, real = ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool)
            later = hints._replace(prompt=None)
            hidden, _ = model(known, real, batch.images[:0], later, copy_cache(cache))
            logs = model.decoder.lm_head(hidden).float().log_softmax(dim=-1)  # (B, n - 1, V)
            total = total + logs.gather(2, ids[:, 1:, None]).sum(dim=1)
        scores.append(total)
    return torch.cat(scores, dim=1)
