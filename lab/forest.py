"""A table of lab.ablate as a forest plot: each row's difference with its intervals.

Lengths are pixels at the final size; the plot is drawn twice as large and scaled down.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from config import UserError

INK, MUTED, LINE, DOT = "#1f2328", "#59636e", "#d0d7de", "#0a58ca"
WIDTH, LEFT, RIGHT, TOP, ROW = 1000, 400, 90, 56, 26
FINE = 2


class Pen:
    """Draws in final pixels on an image FINE times as large."""

    def __init__(self, height: int):
        self.image = Image.new("RGB", (WIDTH * FINE, height * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, fill: str = INK, anchor: str = "lm") -> None:
        font = ImageFont.load_default(14 * FINE)
        self.draw.text((x * FINE, y * FINE), words, fill=fill, font=font, anchor=anchor)

    def line(self, x0: float, y0: float, x1: float, y1: float, fill: str, width: float) -> None:
        ends = [v * FINE for v in (x0, y0, x1, y1)]
        self.draw.line(ends, fill=fill, width=round(width * FINE))

    def dot(self, x: float, y: float, radius: float) -> None:
        box = [v * FINE for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill=DOT)

    def save(self, file: Path) -> None:
        small = self.image.resize((WIDTH, self.image.height // FINE), Image.Resampling.LANCZOS)
        try:
            small.save(file)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from error


def step_of(span: float) -> float:
    """The finest of 0.1, 0.2, 0.5, 1, ... that divides span into at most ten."""
    sizes = (m * 10**p for p in range(-1, 3) for m in (1, 2, 5))
    return next(size for size in sizes if span / size <= 10)


def forest(result: dict, file: Path) -> None:
    """Points of difference to the row that each is compared with. Thick: by images, thin: by seeds.

    result: what lab.ablate writes. Rows that are compared with nothing are left out. An interval
    that leaves the plot is cut at its edge.
    """
    rows = [row for row in result["rows"] if row["against"]]
    ends = [100 * end for row in rows for end in row["against"]["ci95"]]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    step = step_of(high - low + 0.2)
    low, high = (low // step - 0.5) * step, (high // step + 1.5) * step
    pen = Pen(TOP + ROW * len(rows) + 40)
    bottom = TOP + ROW * len(rows)

    def at(points: float) -> float:
        share = (min(max(points, low), high) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    n = len(result["seeds"])
    pen.text(16, 20, f"All answers less Med-MoE's: percentage points, {n} seed{'s' * (n > 1)}")
    tick = round(low / step + 0.5) * step
    while tick < high:
        pen.line(at(tick), TOP - 8, at(tick), bottom, LINE if abs(tick) > 1e-9 else INK, 1)
        pen.text(at(tick), bottom + 14, f"{tick:+g}" if abs(tick) > 1e-9 else "0", MUTED, "mm")
        tick += step
    for i, row in enumerate(rows):
        y, other = TOP + ROW * (i + 0.5), row["against"]
        title = row["title"] + ("" if other["row"] == "medmoe" else f" (less {other['row']})")
        pen.text(16, y, title)
        for key, width in (("ci95_seeds", 1), ("ci95", 4)):
            if other[key]:
                pen.line(at(100 * other[key][0]), y, at(100 * other[key][1]), y, DOT, width)
        pen.dot(at(100 * other["difference"]), y, 5)
        pen.text(WIDTH - 16, y, f"{100 * other['difference']:+.1f}", anchor="rm")
    pen.text(16, bottom + 14, "thick: 95 % by images, thin: by seeds", MUTED)
    pen.save(file)
