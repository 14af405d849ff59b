"""Draw two figures of the README: a contact sheet of the phantoms and the system's diagram.

    python -m lab.figures --out figures

Lengths are pixels of a figure 1000 wide. The sheet shows phantoms of test seeds, picked by their
findings; the diagram is laid out by hand, in SVG. Both are on white, for light and dark pages.
"""

import argparse
import base64
import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sources import phantoms

WIDTH = 1000
# Each image of the sheet: its organ, how many findings it has, the kind of question below it.
SHOWN = {
    "head": (2, "location"),
    "abdomen": (1, "size"),
    "brain": (3, "count"),
    "knee": (2, "side"),
    "chest": (2, "side"),
    "hand": (0, "presence"),
    "colon": (1, "location"),
    "breast": (3, "height"),
}
INK, MUTED, LINE = "#1f2328", "#59636e", "#8c959f"
# Boxes are filled with the light colour of the phase that trains them first, badges with the dark.
PHASES = {0: ("#eceff2", MUTED), 1: ("#ddebff", "#0a58ca"), 2: ("#dcf5e3", "#17783a")}
PHASES[3] = ("#ffe6d5", "#bc4c00")
ROWS = (  # phase, name, data; whether projector, decoder, router, experts + meta are trained
    (1, "1 alignment", "captions", (1, 0, None, None)),
    (2, "2 instruction tuning", "instructions", (1, 1, None, None)),
    (2, "2 router, after that", "modality labels", (0, 0, 1, None)),
    (3, "3 MoE tuning", "questions and answers", (0, 0, 0, 1)),
)


def pick(organ: str, count: int, kind: str) -> tuple[int, phantoms.Question]:
    """The first test seed with this organ, this many findings and a question of this kind."""
    for seed in phantoms.SPLITS["test"]:
        truth = phantoms.plan(seed)[1]
        if (truth["organ"], truth["count"]) == (organ, count):
            questions = phantoms.questions(phantoms.draw(seed, 64))
            if found := [q for q in questions if q.kind == kind]:
                return seed, found[0]
    raise AssertionError("the split has a billion seeds")


def contact_sheet() -> Image.Image:
    """Two rows of four organs, each with its caption, one question and the answer."""
    side, step, row = 224, 246, 348
    sheet = Image.new("RGB", (WIDTH, 2 * row + 12), "white")
    pen = ImageDraw.Draw(sheet)
    plain, small = ImageFont.load_default(15), ImageFont.load_default(14)
    for i, (organ, (count, kind)) in enumerate(SHOWN.items()):
        seed, question = pick(organ, count, kind)
        phantom = phantoms.draw(seed, side)
        x, y = 18 + i % 4 * step, 16 + i // 4 * row
        sheet.paste(Image.fromarray(phantom.image), (x, y))
        y += side + 8
        for line in textwrap.wrap(phantoms.caption(phantom), 33):
            pen.text((x, y), line, INK, plain)
            y += 18
        y = 16 + i // 4 * row + side + 69
        for line in textwrap.wrap(question.question, 33):
            pen.text((x, y), line, MUTED, small)
            y += 17
        pen.text((x, y), question.answer, PHASES[1][1], plain)
    return sheet


class Svg:
    """SVG text, one element a line."""

    def __init__(self, height: int) -> None:
        self.height, self.lines = height, []

    def text(self, x, y, words, size=14, colour=INK, anchor="middle", bold=False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
            f"{weight}>{words}</text>"
        )

    def box(self, x, y, w, h, title="", notes=(), phase=0, dashed=False) -> None:
        """A rounded box with its title and notes in the middle."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        fill = "none" if dashed else PHASES[phase][0]
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}"'
            f' stroke="{PHASES[phase][1]}" stroke-width="1.2"{dash}/>'
        )
        middle = y + h / 2 + 5 - 8.5 * len(notes)
        if title:
            self.text(x + w / 2, middle, title, bold=True)
        for i, note in enumerate(notes):
            self.text(x + w / 2, middle + 17 * (i + 1), note, size=12, colour=MUTED)

    def arrow(self, *points: tuple[float, float], colour=LINE, dashed=False, head=True) -> None:
        path = " L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        end = ' marker-end="url(#head)"' if head else ""
        self.lines.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}{end}/>'
        )

    def circle(self, x, y, radius, edge, fill="#ffffff") -> None:
        self.lines.append(
            f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}" stroke="{edge}"'
            ' stroke-width="1.6"/>'
        )

    def badges(self, x, y, *phases: int) -> None:
        """The numbers of the phases that train a box, leftwards from x."""
        for i, phase in enumerate(reversed(phases)):
            at = x - 19 * i
            self.lines.append(f'<circle cx="{at}" cy="{y}" r="8.5" fill="{PHASES[phase][1]}"/>')
            self.text(at, y + 4, phase, size=11, colour="#ffffff", bold=True)

    def write(self) -> str:
        """The whole file, on a white card that keeps it readable on a dark page."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}"'
            ' font-family="Helvetica, Arial, sans-serif">'
        )
        marker = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6"'
            ' markerHeight="6" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>'
        )
        card = f'<rect width="{WIDTH}" height="{self.height}" rx="14" fill="#ffffff"/>'
        return "\n".join((head, marker, card, *self.lines, "</svg>", ""))


def thumbnail(seed: int) -> str:
    """A phantom as a PNG inside the SVG."""
    data = io.BytesIO()
    Image.fromarray(phantoms.draw(seed, 96).image).convert("L").save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def draw_flow(svg: Svg) -> None:
    """The top: from the image and the question to the answer."""
    seed, question = pick("chest", 1, "location")
    svg.lines.append(f'<image x="30" y="46" width="96" height="96" href="{thumbnail(seed)}"/>')
    svg.text(78, 160, "image", size=12, colour=MUTED)
    svg.box(160, 58, 136, 72, "CLIP tower", ("hidden state &#8722;2,", "no CLS"))
    svg.box(334, 58, 136, 72, "projector", ("Linear, GELU,", "Linear"), phase=1)
    svg.badges(461, 58, 1, 2)
    svg.box(334, 186, 136, 56, "embeddings", ("of the question",), phase=2)
    svg.badges(461, 186, 2)
    svg.text(302, 219, f"“{question.question}”", size=13, anchor="end")
    svg.box(508, 98, 136, 92, "splice", ("patches take the", "place of &lt;image&gt;"))
    svg.arrow((128, 94), (158, 94))
    svg.arrow((298, 94), (332, 94))
    svg.arrow((472, 94), (490, 94), (490, 128), (506, 128))
    svg.arrow((306, 214), (332, 214))
    svg.arrow((472, 214), (490, 214), (490, 160), (506, 160))
    svg.box(684, 30, 166, 232, phase=2, dashed=True)
    svg.text(767, 52, "decoder", bold=True)
    svg.badges(841, 30, 2)
    for i, kind in enumerate(("MoE", "dense", "MoE", "dense")):
        svg.box(698, 64 + 41 * i, 138, 33, f"{kind} block {i}", phase=3 if kind == "MoE" else 2)
    svg.text(767, 245, "… and so on in turn", size=12, colour=MUTED)
    svg.arrow((646, 144), (682, 144))
    svg.arrow((852, 144), (886, 144))
    svg.text(929, 141, "answer", bold=True)
    svg.text(929, 159, f"“{question.answer}”", size=13)


def draw_block(svg: Svg) -> None:
    """The middle: inside an MoE block."""
    top = 306
    svg.arrow((698, 162), (664, 176), (664, top), dashed=True, head=False)
    svg.box(30, top, 940, 252, phase=3, dashed=True)
    svg.text(48, top + 26, "inside an MoE block", anchor="start", bold=True)
    svg.text(48, top + 46, "(every second one; a dense block", 12, MUTED, "start")
    svg.text(48, top + 62, "has one such FFN and no router)", 12, MUTED, "start")
    middle = top + 123  # the height of the third expert, which is chosen
    svg.box(70, middle - 28, 120, 56, "attention", ("beside it in Phi-2",), phase=2)
    svg.arrow((34, middle), (68, middle))
    svg.arrow((192, middle), (282, middle))
    svg.text(236, middle - 10, "x")
    svg.box(284, middle - 28, 130, 56, "router", ("top 2 of 4",), phase=2)
    svg.badges(405, middle - 28, 2)
    gates = {"CT": "0.2", "X-ray": "0.8"}
    for i, modality in enumerate(phantoms.MODALITIES):
        y = middle + 44 * (i - 2)
        svg.box(500, y - 17, 178, 34, f"{modality} expert", phase=3)
        gate = gates.get(modality)
        svg.arrow((416, middle), (452, y), (498, y), dashed=not gate, head=bool(gate))
        if gate:
            svg.text(475, y - 6, gate, size=12, colour=PHASES[2][1])
    svg.badges(669, middle - 105, 3)
    svg.box(500, middle + 81, 178, 34, "meta expert", phase=3)
    svg.badges(669, middle + 81, 3)
    svg.arrow((236, middle), (236, middle + 98), (498, middle + 98))
    svg.text(330, middle + 91, "always on", size=12, colour=MUTED)
    svg.arrow((680, middle - 88), (756, middle - 88), (756, middle - 17))
    svg.arrow((680, middle), (739, middle))
    svg.arrow((680, middle + 98), (756, middle + 98), (756, middle + 17))
    svg.circle(756, middle, 15, LINE)
    svg.text(756, middle + 6, "+", size=18)
    svg.arrow((773, middle), (966, middle))
    svg.text(868, middle - 10, "y = meta(x)", size=13)
    svg.text(868, middle + 20, "+ Σ gate · expert(x)", size=13)


def draw_phases(svg: Svg) -> None:
    """The bottom: what each phase trains."""
    top, columns = 600, (520, 640, 752, 880)
    svg.text(30, top, "three phases", anchor="start", bold=True)
    svg.text(250, top, "on", 12, MUTED, "start")
    for x, name in zip(columns, ("projector", "decoder", "router", "experts + meta"), strict=True):
        svg.text(x, top, name, size=13)
    for i, (phase, name, data, trains) in enumerate(ROWS):
        y = top + 34 + 30 * i
        svg.arrow((30, y - 20), (970, y - 20), colour="#d8dee4", head=False)
        svg.text(30, y, name, 14, PHASES[phase][1], "start", bold=True)
        svg.text(250, y, data, 13, MUTED, "start")
        for x, mark in zip(columns, trains, strict=True):
            if mark is None:
                svg.text(x, y, "&#8211;", colour=LINE)
                continue
            colour = PHASES[phase][1]
            svg.circle(x, y - 5, 7, colour if mark else LINE, colour if mark else "#ffffff")
    y = top + 160
    svg.circle(37, y - 4, 6, MUTED, MUTED)
    svg.text(50, y, "trained", 12, MUTED, "start")
    svg.circle(120, y - 4, 6, LINE)
    svg.text(133, y, "frozen", 12, MUTED, "start")
    svg.text(195, y, "&#8211;  not there yet", 12, MUTED, "start")
    svg.text(970, y, "the CLIP tower is frozen throughout", 12, MUTED, "end")


def system() -> str:
    """The diagram of the system."""
    svg = Svg(784)
    draw_flow(svg)
    draw_block(svg)
    draw_phases(svg)
    return svg.write()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of the README.")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to write to")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet().quantize(112, dither=Image.Dither.NONE).save(
        out / "phantoms.png", optimize=True
    )
    (out / "system.svg").write_text(system(), encoding="utf-8")
    for name in ("phantoms.png", "system.svg"):
        print(f"{out / name}  {(out / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
