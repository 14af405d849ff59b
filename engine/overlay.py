"""Where the tokens of one answer were routed: a table, and the image with its patches.

Shapes: S image side, P patches, T positions, E experts.
"""

import math
from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from config import IMAGE_ID, ModelConfig, UserError
from data import Batch, Text
from engine.cli import check_outputs
from metrics import expert_names
from model import Generated, sparse_layers

COLOURS = ("#3178d6", "#c2560c", "#1f8a43", "#a04ad9", "#d0388f", "#0c8599", "#8a7400", "#75808b")
SIDE, GAP, LINE = 336, 8, 22  # pixels: of a tile at least, between tiles, of a line of text
ROW = 4  # tiles
MOST = 8  # tokens of an answer in the table
FONT = "white", "black"  # of a number, and of its edge


def draw_patches(image: Tensor, gates: Tensor | None = None) -> Image.Image:
    """The image (3, S, S) uint8; with its patches' gates (P, E), each one's first expert on it.

    A patch is tinted by its expert's colour, the more the larger the gate; "-": routed to none.
    """
    n = 1 if gates is None else math.isqrt(len(gates))
    cell = max(SIDE // n, 14)
    tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((n * cell, n * cell))
    if gates is None:
        return tile
    largest, first = (t.reshape(n, n).tolist() for t in gates.float().max(dim=1))
    tints = np.zeros((n, n, 4), np.uint8)  # red, green, blue, opacity
    for y, x in np.ndindex(n, n):
        if largest[y][x]:
            rgb = bytes.fromhex(COLOURS[first[y][x] % len(COLOURS)][1:])
            tints[y, x] = *rgb, round(255 * (0.15 + 0.4 * largest[y][x]))
    tint = Image.fromarray(tints).resize(tile.size, Image.Resampling.NEAREST)
    tile.paste(tint, mask=tint)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(max(9, cell // 3))
    for y, x in np.ndindex(n, n):
        number = str(first[y][x]) if largest[y][x] else "-"
        at = ((x + 0.5) * cell, (y + 0.5) * cell)
        draw.text(at, number, FONT[0], font, "mm", stroke_width=1, stroke_fill=FONT[1])
    return tile


def overlay(
    image: Tensor, gates: Sequence[Tensor], blocks: Sequence[int], names: Sequence[str]
) -> Image.Image:
    """image (3, S, S) uint8; of each sparse block the patches' gates (P, E); the experts' names."""
    titles = ["image", *(f"block {block}" for block in blocks)]
    tiles = [draw_patches(image, part) for part in (None, *gates)]
    wide, high = max(t.width for t in tiles) + GAP, max(t.height for t in tiles) + GAP + LINE
    columns = min(ROW, len(tiles))
    font, x, y = ImageFont.load_default(13), GAP, GAP + math.ceil(len(tiles) / columns) * high
    key = []  # below the tiles: place, text, colour of each expert
    for e, name in enumerate(names if gates else ()):
        text = name if name == f"expert {e}" else f"{e} {name}"
        width = font.getlength(text)
        if x + width > columns * wide:
            x, y = GAP, y + LINE
        key.append(((x, y), text, COLOURS[e % len(COLOURS)]))
        x += width + 2 * GAP
    page = Image.new("RGB", (GAP + columns * wide, y + LINE), "white")
    draw = ImageDraw.Draw(page)
    for place, text, colour in key:
        draw.text(place, text, colour, font)
    for i, (title, tile) in enumerate(zip(titles, tiles, strict=True)):
        x, y = GAP + i % columns * wide, GAP + i // columns * high
        draw.text((x, y), title, "black", font)
        page.paste(tile, (x, y + LINE))
    return page


def shares(gates: Tensor, which: Tensor) -> list[float]:
    """gates (T, E), which (T,) bool -> each expert's share of those tokens."""
    routed = (gates[which] != 0).float().sum(dim=0)  # (E,)
    return (routed / routed.sum().clamp(min=1)).tolist()


def check_png(file: str, image: str | None) -> None:
    """Raise UserError for a --show that is no PNG, cannot be written, or is the image itself."""
    if not file.endswith(".png"):
        raise UserError(f"--show {file}: must be a FILE.png")
    check_outputs((file,), (image,))


class Routes:
    """The experts of one answer: of the image's patches, the question and each answer token.

    batch: the prompt, alone; steps: what generate() gave for it.
    """

    def __init__(self, config: ModelConfig, batch: Batch, steps: Sequence[Generated]):
        self.steps, moe = steps, config.moe
        self.is_patch = batch.ids[0] == IMAGE_ID  # (T,)
        self.names = expert_names(moe.n_experts, moe.router) if moe else []
        self.blocks = sparse_layers(config, moe) if moe else []

    def table(self, text: Text) -> str:
        """Block by block, after an empty line; "" for a dense model."""
        if not self.names:
            return ""
        lines = ["", "experts             " + "  ".join(f"{name:>7}" for name in self.names)]
        for block, routing in zip(self.blocks, self.steps[0].routings, strict=True):
            for kind, which in (("image", self.is_patch), ("question", ~self.is_patch)):
                cells = zip(shares(routing.gates[0], which), self.names, strict=True)
                line = "  ".join(f"{share:{max(7, len(name))}.1%}" for share, name in cells)
                lines += [f"  block {block:<2} {kind:<8} {line}"] * bool(which.any())
        for before, step in islice(pairwise(self.steps), MOST):
            token = text.decode([int(before.tokens[0])])
            chosen = []
            for block, routing in zip(self.blocks, step.routings, strict=True):
                experts = routing.gates[0, 0].nonzero().flatten().tolist()
                chosen.append(f"block {block}: " + "+".join(self.names[e] for e in experts))
            lines.append(f"  answer {token!r:<14} " + "  ".join(chosen))
        if (more := len(self.steps) - 1 - MOST) > 0:
            lines.append(f"  ... and {more} more tokens")
        return "\n".join(lines) + "\n"

    def overlay(self, image: Tensor) -> Image.Image:
        """The image (3, S, S) uint8 and, for each sparse block, its patches' first experts."""
        gates = [r.gates[0][self.is_patch].cpu() for r in self.steps[0].routings]  # (P, E) each
        return overlay(image, gates, self.blocks, self.names)
