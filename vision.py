"""The CLIP vision tower, the projector behind it, and the pixels that go in.

The tower is a pre-norm ViT (Radford et al. 2021). LLaVA reads it before its last layer: hidden
state -2, without the CLS token and without the final LayerNorm. So the last layer is never built.

Shapes: B batch, S image side, P patches, W tower width, D decoder width, H heads, K head width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from config import VisionConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SIDE = 8192  # of the padded square; a longer image is shrunk first


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, x * sigmoid(1.702 x). Up to 0.02 away from F.gelu: not interchangeable."""
    return x * torch.sigmoid(1.702 * x)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(K) + attn_mask) v; q (B, H, T, K), k, v (B, H, C, K) -> (B, H, T, K).

    attn_mask (B, 1, T, C): 0 where a query may look, else -inf; None: everywhere.
    """
    if q.device.type == "cpu" and q.requires_grad:  # there the fused backward takes 4 times as long
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, C)
        if attn_mask is not None:
            scores = scores + attn_mask  # the mask is fp32, and so is the sum
        return scores.float().softmax(dim=-1).to(v.dtype) @ v
    mask = None if attn_mask is None else attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # the same, fused


class VisionBlock(nn.Module):
    """Pre-norm transformer block; every patch attends to every patch (no mask, no RoPE)."""

    def __init__(self, width: int, n_heads: int, d_ff: int):
        super().__init__()
        self.n_heads = n_heads
        self.ln_1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.ln_2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, d_ff)
        self.fc2 = nn.Linear(d_ff, width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # (B, H, P + 1, K) each  # fmt: skip
        y = attention(q, k, v)  # (B, H, P + 1, K)
        return self.o(y.transpose(1, 2).flatten(-2))  # (B, P + 1, W)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_1(x))  # (B, P + 1, W)
        return x + self.fc2(quick_gelu(self.fc1(self.ln_2(x))))


class VisionTower(nn.Module):
    """Images -> one feature vector per patch, as LLaVA and Med-MoE read CLIP."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size, width = config.patch_size, config.width
        self.patch_embed = nn.Conv2d(3, width, kernel_size=size, stride=size, bias=False)
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(config.n_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            VisionBlock(width, config.n_heads, config.d_ff) for _ in range(config.n_layers - 1)
        )

    def hidden(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, P + 1, W), the CLS token first: the published hidden_states[-2]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)  # (B, P + 1, W)
        x = self.ln_pre(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) CLIP-normalised -> (B, P, W)."""
        return self.hidden(images)[:, 1:]


class Projector(nn.Module):
    """Tower width -> decoder width: Linear, exact GELU, Linear (LLaVA's mlp2x_gelu)."""

    def __init__(self, width: int, d_model: int):
        super().__init__()
        self.fc1 = nn.Linear(width, d_model)
        self.fc2 = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # (B, P, D)


def square(image: Image.Image, size: int, pad: bool) -> Tensor:
    """An RGB image -> (3, S, S) uint8, S = size, by bicubic resizing.

    pad=True   the whole image, centred on a square of CLIP's mean colour
    pad=False  its central square: shortest edge to S, then a crop, as CLIPImageProcessor does
    Source: LLaVA expand2square (Med-MoE train.py:910-921 @148cbd6); the released code pads in
    phases 2 and 3 and crops in phase 1 and in evaluation.
    """
    if max(image.size) > MAX_SIDE:
        image = ImageOps.contain(image, (MAX_SIDE, MAX_SIDE))
    width, height = image.size
    if pad:
        side = max(width, height)
        canvas = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_MEAN))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas.resize((size, size), Image.Resampling.BICUBIC)
    else:
        short = min(width, height)
        width, height = size * width // short, size * height // short
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, S, S)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> float32, less CLIP's mean, divided by its standard deviation."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD], device=images.device)[..., None, None]
    return (images.float() / 255 - mean) / std
