"""Draw two figures of the README: a contact sheet of the phantoms and the system's diagram.

    python -m lab.figures --out figures

The sheet shows phantoms of test seeds, picked by their findings. The diagram is laid out by hand,
in figures/system.svg; its example image is drawn here. Both are on white, for light and dark pages.
"""

import base64
import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from config import flag
from engine.cli import parse, user_errors
from sources import phantoms

SYSTEM = Path(__file__).parent.parent / "figures" / "system.svg"
# Each image of the sheet: its organ, how many findings it has, the kind of question below it.
SHOWN = [("head", 2, "location"), ("abdomen", 1, "size"), ("brain", 3, "count"),
         ("knee", 2, "side"), ("chest", 2, "side"), ("hand", 0, "presence"),
         ("colon", 1, "location"), ("breast", 3, "height")]  # fmt: skip
SIDE, STEP, ROW = 224, 246, 348  # pixels: of an image; of an image and its text, across and down


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the figures of the README."""

    out: str = flag("figures", "folder to write to")


def pick(organ: str, count: int, kind: str) -> tuple[int, phantoms.Question]:
    """The first test seed with this organ, this many findings and a question of this kind."""
    for seed in phantoms.SPLITS["test"]:
        truth = phantoms.plan(seed)[1]
        if (truth["organ"], truth["count"]) == (organ, count):
            for question in phantoms.questions(phantoms.draw(seed, 64)):
                if question.kind == kind:
                    return seed, question
    raise AssertionError("the split has a billion seeds")


def contact_sheet() -> Image.Image:
    """Two rows of four organs, each with its caption, one question and the answer."""
    sheet = Image.new("RGB", (1000, 2 * ROW + 12), "white")
    pen = ImageDraw.Draw(sheet)
    plain, small = ImageFont.load_default(15), ImageFont.load_default(14)
    for i, wanted in enumerate(SHOWN):
        seed, question = pick(*wanted)
        phantom = phantoms.draw(seed, SIDE)
        x, y = 18 + i % 4 * STEP, 16 + i // 4 * ROW
        sheet.paste(Image.fromarray(phantom.image), (x, y))
        caption, asked = (textwrap.wrap(words, 33)
                          for words in (phantoms.caption(phantom), question.question))  # fmt: skip
        lines = [(SIDE + 8 + 18 * j, line, "#1f2328", plain) for j, line in enumerate(caption)]
        lines += [(SIDE + 69 + 17 * j, line, "#59636e", small) for j, line in enumerate(asked)]
        lines += [(SIDE + 69 + 17 * len(asked), question.answer, "#0a58ca", plain)]
        for down, *line in lines:
            pen.text((x, y + down), *line)
    return sheet.quantize(112, dither=Image.Dither.NONE)


def system() -> str:
    """The diagram, with a chest phantom; its question and answer stand in the file."""
    data = io.BytesIO()
    image = phantoms.draw(pick("chest", 1, "location")[0], 96).image
    Image.fromarray(image).convert("L").save(data, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return re.sub(r"data:image/png;base64,[^\"]*", uri, SYSTEM.read_text(encoding="utf-8"))


@user_errors
def main(argv: list[str] | None = None) -> None:
    out = Path(parse(FiguresConfig, argv, "python -m lab.figures").out)
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet().save(out / "phantoms.png", optimize=True)
    (out / "system.svg").write_text(system(), encoding="utf-8")


if __name__ == "__main__":
    main()
