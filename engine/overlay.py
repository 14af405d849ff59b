"""Where the tokens of one answer were routed: a table, and the image with its patches.

Shapes: S image side, P patches, T positions, E experts.
"""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
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


def opacity(gate: float) -> float:
    """Of an expert's colour on a patch or a token that it has with this gate."""
    return 0.15 + 0.4 * min(gate, 1.0) if gate else 0.0


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
            tints[y, x] = *rgb(first[y][x]), round(255 * opacity(largest[y][x]))
    tint = Image.fromarray(tints).resize(tile.size, Image.Resampling.NEAREST)
    tile.paste(tint, mask=tint)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(max(9, cell // 3))
    for y, x in np.ndindex(n, n):
        number = str(first[y][x]) if largest[y][x] else "-"
        at = ((x + 0.5) * cell, (y + 0.5) * cell)
        draw.text(at, number, FONT[0], font, "mm", stroke_width=1, stroke_fill=FONT[1])
    return tile


def png(image: Image.Image, colours: int = 200) -> bytes:
    """In at most so many colours; 0: in its own."""
    if colours:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


class Token(NamedTuple):
    """A piece of the question or of the answer, with its first expert in one sparse block."""

    text: str
    expert: int
    gate: float  # 0: routed to none


def places(widths: Sequence[float], y: int, width: float) -> list[tuple[float, int]]:
    """Where pieces of these widths begin, line by line, the first at y."""
    found, x = [], GAP
    for w in widths:
        if x + w > width and x > GAP:
            x, y = GAP, y + LINE
        found.append((x, y))
        x += w
    return found


def overlay(
    image: Tensor, gates: Sequence[Tensor], blocks: Sequence[int], names: Sequence[str],
    tokens: Sequence[Sequence[Token]],
) -> Image.Image:  # fmt: skip
    """The image (3, S, S) uint8, and for each sparse block its patches; below, names and tokens.

    gates: of each block the patches' (P, E). tokens: of each block the question's and the answer's.
    """
    headings = ["image", *(f"block {block}" for block in blocks)]
    tiles = [draw_patches(image, part) for part in (None, *gates)]
    wide, high = max(t.width for t in tiles) + GAP, max(t.height for t in tiles) + GAP + LINE
    columns = min(ROW, len(tiles))
    width, y = columns * wide, GAP + math.ceil(len(tiles) / columns) * high
    font, pieces = ImageFont.load_default(13), []  # place, text, its colour, that behind it
    texts = [title(e, name) for e, name in enumerate(names)]
    key = places([font.getlength(text) + 2 * GAP for text in texts], y, width)
    for e, (place, text) in enumerate(zip(key, texts, strict=True)):
        pieces.append((place, text, COLOURS[e % len(COLOURS)], None))
    for heading, row in zip(headings[1:], tokens, strict=True):
        y = max([y, *(place[1] for place, *_ in pieces)]) + LINE
        row = [Token(f"{heading}  ", 0, 0.0), *(t._replace(text=shown_token(t.text)) for t in row)]
        spots = places([font.getlength(t.text) for t in row], y, width)
        for place, token in zip(spots, row, strict=True):
            behind = (*rgb(token.expert), round(255 * opacity(token.gate)))
            pieces.append((place, token.text, "black", behind))
    y = max([y, *(place[1] for place, *_ in pieces)])
    page = Image.new("RGB", (GAP + width, y + LINE + GAP), "white")
    draw = ImageDraw.Draw(page, "RGBA")  # colours are laid over what is there
    for (x, y), text, colour, behind in pieces:
        if behind:
            draw.rectangle((x, y, x + font.getlength(text) - 1, y + LINE - 4), behind)
        draw.text((x, y), text, colour, font)
    for i, (heading, tile) in enumerate(zip(headings, tiles, strict=True)):
        x, y = GAP + i % columns * wide, GAP + i // columns * high
        draw.text((x, y), heading, "black", font)
        page.paste(tile, (x, y + LINE))
    return page


def title(expert: int, name: str) -> str:
    """Its number, as on the patches, and its name."""
    return name if name == f"expert {expert}" else f"{expert} {name}"


def rgb(expert: int) -> bytes:
    return bytes.fromhex(COLOURS[expert % len(COLOURS)][1:])


def shown_token(text: str) -> str:
    """A token on one line."""
    return "".join(c if c.isprintable() else " " for c in text)


def shares(gates: Tensor, which: Tensor) -> list[float]:
    """gates (T, E), which (T,) bool -> each expert's share of those tokens."""
    routed = (gates[which] != 0).float().sum(dim=0)  # (E,)
    return (routed / routed.sum().clamp(min=1)).tolist()


def check_png(file: str, image: str | None) -> None:
    """Raise UserError for a --save that is no PNG, cannot be written, or is the image itself."""
    if not file.endswith(".png"):
        raise UserError(f"--save {file}: must be a FILE.png")
    check_outputs((file,), (image,))


class Routes:
    """The experts of one answer: of the image's patches, the question and each answer token.

    batch: the prompt, alone; steps: what generate() gave for it, so far. The last token has no
    routing: nothing follows it.
    """

    def __init__(self, config: ModelConfig, batch: Batch, steps: Sequence[Generated]):
        self.steps, moe = steps, config.moe
        self.names = expert_names(moe.n_experts, moe.router) if moe else []
        self.blocks = sparse_layers(config, moe) if moe else []
        answer = [step.tokens[:1] for step in steps[:-1]]
        self.ids = torch.cat([batch.ids[0], *answer]).cpu()  # (T,) of all that was routed
        self.is_patch = self.ids == IMAGE_ID
        self.is_answer = torch.arange(len(self.ids)) >= batch.ids.shape[1]
        by_step = zip(*(step.routings for step in steps), strict=True)
        self.gates = [torch.cat([r.gates[0] for r in layer]).cpu() for layer in by_step]  # (T, E)

    def table(self, text: Text) -> str:
        """Block by block, after an empty line; "" for a dense model."""
        if not self.names:
            return ""
        lines = ["", "experts             " + "  ".join(f"{name:>7}" for name in self.names)]
        question = ~self.is_patch & ~self.is_answer
        for block, gates in zip(self.blocks, self.gates, strict=True):
            for kind, which in (("image", self.is_patch), ("question", question)):
                cells = zip(shares(gates, which), self.names, strict=True)
                line = "  ".join(f"{share:{max(7, len(name))}.1%}" for share, name in cells)
                lines += [f"  block {block:<2} {kind:<8} {line}"] * bool(which.any())
        answer = self.is_answer.nonzero().flatten().tolist()
        for t in answer[:MOST]:
            token = text.decode([int(self.ids[t])])
            chosen = []
            for block, gates in zip(self.blocks, self.gates, strict=True):
                experts = gates[t].nonzero().flatten().tolist()
                chosen.append(f"block {block}: " + "+".join(self.names[e] for e in experts))
            lines.append(f"  answer {token!r:<14} " + "  ".join(chosen))
        if (more := len(answer) - MOST) > 0:
            lines.append(f"  ... and {more} more tokens")
        return "\n".join(lines) + "\n"

    def tokens(self, text: Text) -> list[list[Token]]:
        """For each sparse block, those of the question and the answer."""
        rows, which = [], (~self.is_patch).nonzero().flatten()
        pieces = [text.decode([i]) for i in self.ids[which].tolist()]
        for gates in self.gates:
            largest, first = (t.tolist() for t in gates[which].max(dim=-1))
            rows.append([*map(Token, pieces, first, largest)])
        return rows

    def load(self) -> list[list[float]]:
        """For each sparse block, each expert's share of all routed tokens and patches."""
        return [shares(gates, torch.ones(len(gates), dtype=torch.bool)) for gates in self.gates]

    def probabilities(self) -> list[float]:
        """The router's, of each expert: softmax of its mean logits over prompt and blocks."""
        logits = torch.stack([r.logits[0] for r in self.steps[0].routings])  # (L, T, E)
        return logits.float().mean(dim=(0, 1)).softmax(dim=0).tolist()

    def patches(self) -> list[Tensor]:
        """For each sparse block, the gates of the image's patches, (P, E)."""
        return [gates[self.is_patch] for gates in self.gates]

    def overlay(self, image: Tensor, text: Text) -> Image.Image:
        """The image (3, S, S) uint8, its patches' first experts and those of the tokens."""
        return overlay(image, self.patches(), self.blocks, self.names, self.tokens(text))
