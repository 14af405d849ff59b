"""The CLIP vision tower, and the way from an image file to its input.

A pre-norm ViT (Radford et al. 2021). LLaVA reads it before its last layer: hidden state -2,
without the CLS token and without the final LayerNorm; so the last layer is never built.

Shapes: B batch, S image side, P patches, W tower width, H heads, K head width.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn

from config import UserError, VisionConfig
from ops import attend

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # the rest of Pillow's decoders stay shut
MAX_PIXELS = 50_000_000  # of an image file; 4 bytes each once decoded
MAX_RATIO = 100  # of its sides; a 1 x 100000 strip is no picture, and a huge square
MAX_SIDE = 8192  # of the square; a longer image is shrunk first
TURN = Image.Transpose
UPRIGHT = {  # EXIF orientation -> what undoes it
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, x * sigmoid(1.702 x). Up to 0.02 away from F.gelu: not interchangeable."""
    return x * torch.sigmoid(1.702 * x)


class VisionBlock(nn.Module):
    """Pre-norm transformer block; every patch attends to every patch (no mask, no rotation)."""

    def __init__(self, width: int, n_heads: int, d_ff: int):
        super().__init__()
        self.n_heads = n_heads
        self.ln_1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.ln_2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, d_ff)
        self.fc2 = nn.Linear(d_ff, width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, P + 1, K)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        y = attend(q, k, v)  # (B, H, P + 1, K)
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


def open_image(path: str | Path) -> Image.Image:
    """An image file -> an RGB picture, as a viewer shows it: first frame, upright, on black.

    Raises UserError with the file and the reason for whatever cannot be read or claims too much.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is not a file" if path.exists() else "no such file"
        raise UserError(f"image {path}: {reason}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size decides
            with Image.open(path, formats=FORMATS) as image:  # reads the header alone
                check_size(*image.size)
                image.load()
                return to_rgb(upright(image))
    except Image.UnidentifiedImageError:
        empty = path.stat().st_size == 0
        reason = "is empty" if empty else f"not a readable image ({', '.join(FORMATS)} are)"
    except Exception as error:  # a broken file makes a decoder raise anything, struct.error too
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise UserError(f"image {path}: {reason}")


def check_size(width: int, height: int) -> None:
    """Refuse what a header claims before memory is given to it."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"claims {width} x {height} pixels; at most {MAX_PIXELS} are allowed")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: a side is over {MAX_RATIO} times the other")


def upright(image: Image.Image) -> Image.Image:
    """Turn a photograph the way its camera was held; unreadable EXIF data turns nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> RGB: transparent is black, deep grey is stretched to 0 .. 255."""
    if image.mode.startswith(("I", "F")):  # convert("RGB") would clip them at 255
        return stretch(np.asarray(image, dtype=np.float32)).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert("RGB")


def stretch(grey: np.ndarray) -> Image.Image:
    """16-bit, 32-bit or float grey (H, W) -> 8 bits: its least value black, its largest white."""
    finite = np.isfinite(grey)
    values = grey[finite] if finite.any() else np.zeros(1)
    low, high = float(values.min()), float(values.max())
    unit = (np.where(finite, grey, low) - low) / ((high - low) or 1.0)  # (H, W) in 0 .. 1
    return Image.fromarray((unit * 255).round().astype(np.uint8))


def square(image: Image.Image, size: int, pad: bool) -> Tensor:
    """An RGB picture -> (3, S, S) uint8, S = size, by bicubic resizing.

    pad=True   the whole picture, centred on a square of CLIP's mean colour
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
    """(B, 3, S, S) uint8 -> float32 with CLIP's mean and deviation taken out."""
    mean, std = (
        torch.tensor(x, device=images.device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD)
    )
    return (images.float() / 255 - mean) / std


def jitter(images: Tensor) -> Tensor:
    """(B, 3, S, S) turned, zoomed, shifted and re-lit a little, each picture by its own chance.

    For a tower that learns from few images. Never mirrored: left has to stay left.
    """
    turn, zoom, dx, dy, gain, lift = torch.rand(6, len(images), 1, device=images.device) * 2 - 1
    turn, zoom = 0.15 * turn, 1 + 0.12 * zoom  # radians; grid_sample's units are half sides
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    rows = torch.cat([cos, -sin, 0.12 * dx, sin, cos, 0.12 * dy], dim=1)  # (B, 6)
    grid = F.affine_grid(rows.unflatten(1, (2, 3)), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved * (1 + 0.15 * gain[..., None, None]) + 0.15 * lift[..., None, None]
