"""Small charts as inline SVG, for pages that need neither a server nor a script.

Every function returns markup that stands inside HTML. A chart is one image to a screen reader:
role=img with a title and a description. Colours are classes, s0 to s7, and series differ in dash
patterns or symbols as well; CSS has the stylesheet, for light and dark pages and for print.
Lengths are units of the chart's viewBox, WIDTH across. Arguments are plain text: it is escaped.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import count
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44  # of the plotting area
DASHES = ("", "8 4", "2 4", "10 4 2 4", "14 5", "5 3", "2 2", "10 3 2 3 2 3")
_names = count()  # for identifiers that no other chart of a page has

CSS = """
.chart{width:100%;height:auto;display:block;color:var(--ink)}
.chart text{fill:currentColor;font:13px system-ui,sans-serif}
.chart .axis{stroke:var(--line);stroke-width:1;fill:none}
.chart .grid{stroke:var(--line);stroke-width:1;opacity:.5}
.chart .series{stroke:var(--c,var(--s0));fill:none;stroke-width:2.2;stroke-linejoin:round}
.chart .bar{fill:var(--c,var(--s0));fill-opacity:.28;stroke:var(--c,var(--s0));stroke-width:1.4}
.chart .mark{fill:var(--card);stroke:var(--c,var(--s0));stroke-width:2.4}
.chart .whisker{stroke:currentColor;stroke-width:1.6;fill:none}
.chart .ideal{stroke:var(--muted);stroke-dasharray:4 5;stroke-width:1.4;fill:none}
.key{display:inline-block;white-space:nowrap;margin:0 1.1em .2em 0}
.key svg{width:34px;height:10px;margin-right:.4em;vertical-align:middle}
.key line{stroke:var(--c);stroke-width:2.4}
""" + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(8))


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """One bar with its interval; low and high are None where none is known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def number(value: float) -> str:
    """Up to two decimals, without the zeros at the end."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if "." in f"{value:.2f}" else f"{value:.2f}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from low to high, about as many as wanted."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def figure(body: str, title: str, description: str, width: float = WIDTH, height: float = HEIGHT,
           style: str = "chart") -> str:  # fmt: skip
    """The <svg> around a body; title and description are its text alternative."""
    name = f"svg{next(_names)}"
    return (
        f'<svg class="{style}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'style="max-width:{1.1 * width:.0f}px" '
        f'aria-labelledby="{name}t {name}d"><title id="{name}t">{escape(title)}</title>'
        f'<desc id="{name}d">{escape(description)}</desc>{body}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


class Frame:
    """Axes: from values to positions in the chart."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], width=WIDTH):
        self.xs, self.ys, self.width = xs, ys, width

    def x(self, value: float) -> float:
        low, high = self.xs
        return LEFT + (value - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_title: str, y_title: str) -> str:
        bottom, right, middle = HEIGHT - BOTTOM, self.width - RIGHT, (HEIGHT - BOTTOM + TOP) / 2
        parts = [line(LEFT, bottom, right, bottom, "axis")]
        for value in ticks(*self.ys):
            parts.append(line(LEFT, self.y(value), right, self.y(value), "grid"))
            parts.append(text(LEFT - 7, self.y(value) + 4, number(value), "end"))
        for value in ticks(*self.xs):
            parts.append(text(self.x(value), bottom + 18, number(value)))
        parts.append(text((LEFT + right) / 2, HEIGHT - 6, x_title))
        group = f'<g transform="translate(13 {middle:.1f}) rotate(-90)">'
        return "".join([*parts, group, text(0, 0, y_title), "</g>"])


def key(names: Sequence[str]) -> str:
    """The legend: a sample of each line with its name."""
    return '<p class="keys">' + "".join(
        f'<span class="key s{i % 8}"><svg viewBox="0 0 34 10" aria-hidden="true">'
        f'<line x1="1" y1="5" x2="33" y2="5" stroke-dasharray="{DASHES[i % 8]}"/></svg>'
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    ) + "</p>"  # fmt: skip


def lines(series: Sequence[Series], title: str, description: str, x_title: str, y_title: str,
          ys: tuple[float, float] | None = None) -> str:  # fmt: skip
    """A line chart with its legend. ys: ends of the y axis; else from 0 to the largest value."""
    points = [p for s in series for p in s.points]
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    top = max(p[1] for p in points)
    frame = Frame((low, high), ys or (min(0.0, *(p[1] for p in points)), top * 1.04 or 1.0))
    body = [frame.axes(x_title, y_title)]
    for i, one in enumerate(series):
        at = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in one.points)
        dash = f' stroke-dasharray="{DASHES[i % 8]}"' if DASHES[i % 8] else ""
        body.append(f'<polyline class="series s{i % 8}"{dash} points="{at}"/>')
        if len(one.points) < 12:
            body += [f'<circle class="mark s{i % 8}" r="4" cx="{frame.x(x):.1f}" '
                     f'cy="{frame.y(y):.1f}"/>' for x, y in one.points]  # fmt: skip
    legend = key([s.name for s in series]) if len(series) > 1 else ""
    return figure("".join(body), title, description) + legend


def bars(rows: Sequence[Bar], title: str, description: str, ends: tuple[float, float],
         unit="") -> str:  # fmt: skip
    """Horizontal bars from 0 with their 95 % intervals, names above them; ends: of the axis."""
    step, height = 46, 46 * len(rows) + 30
    span = (ends[1] - ends[0]) or 1

    def x(value: float) -> float:
        return 10 + (min(max(value, ends[0]), ends[1]) - ends[0]) / span * (WIDTH - 90)

    body = []
    for value in ticks(*ends):
        body.append(line(x(value), 4, x(value), height - 24, "grid"))
        body.append(text(x(value), height - 6, number(value) + unit))
    zero = x(0.0)
    for i, row in enumerate(rows):
        y = step * i
        left, right = sorted((zero, x(row.value)))
        body.append(text(10, y + 16, row.name, "start"))
        body.append(f'<rect class="bar" x="{left:.1f}" y="{y + 22:.1f}" height="14" '
                    f'width="{max(right - left, 1):.1f}"/>')  # fmt: skip
        end = right
        if row.low is not None and row.high is not None:
            y0, end = y + 29, max(right, x(row.high))
            body.append(line(x(row.low), y0, x(row.high), y0, "whisker"))
            body += [line(x(v), y0 - 5, x(v), y0 + 5, "whisker") for v in (row.low, row.high)]
        body.append(text(end + 8, y + 34, number(row.value) + unit, "start"))
    return figure("".join(body), title, description, WIDTH, height)


def reliability(bins: Sequence[dict], title: str, description: str) -> str:
    """Accuracy over confidence, of the bins that are not empty.

    bins  {"low", "high", "n", "confidence", "accuracy"} each; a bar is a bin, its dot the mean.
    The dashed diagonal is perfect calibration.
    """
    width = 420
    frame = Frame((0.0, 1.0), (0.0, 1.0), width)
    body = [frame.axes("confidence: softmax of the likeliest expert", "accuracy")]
    for b in bins:
        x, y = frame.x(b["low"]), frame.y(b["accuracy"])
        body.append(f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" '
                    f'width="{frame.x(b["high"]) - x - 2:.1f}" '
                    f'height="{frame.y(0) - y:.1f}"/>')  # fmt: skip
    body.append(line(frame.x(0), frame.y(0), frame.x(1), frame.y(1), "ideal"))
    for b in bins:
        body.append(f'<circle class="mark s1" r="4.5" cx="{frame.x(b["confidence"]):.1f}" '
                    f'cy="{frame.y(b["accuracy"]):.1f}"/>')  # fmt: skip
    return figure("".join(body), title, description, width)


def patches(image: str, side: float, cells: Sequence[tuple[int, float]], title: str,
            description: str) -> str:  # fmt: skip
    """An image under a grid of its patches: the expert's number on each, tinted by its gate.

    image  a reference to the image: markup for the lower layer, side x side units
    cells  (expert, gate) row by row, a square number of them; expert -1: routed to none
    """
    per_row = math.isqrt(len(cells))
    assert per_row**2 == len(cells), f"{len(cells)} patches do not form a square"
    step = side / per_row
    body = [image]
    for i, (expert, gate) in enumerate(cells):
        x, y = i % per_row * step, i // per_row * step
        tone = f"e{expert % 8}" if expert >= 0 else "none"
        body.append(f'<rect class="patch {tone}" x="{x:.2f}" y="{y:.2f}" width="{step:.2f}" '
                    f'height="{step:.2f}" fill-opacity="{0.06 + 0.36 * gate:.2f}"/>')  # fmt: skip
        name = str(expert) if expert >= 0 else "-"
        body.append(f'<text class="mark" x="{x + step / 2:.2f}" y="{y + step * 0.68:.2f}" '
                    f'font-size="{step * 0.52:.2f}">{name}</text>')  # fmt: skip
    return figure("".join(body), title, description, side, side, "overlay")
