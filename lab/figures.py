"""Draw the contact sheet of the phantoms: test seeds, picked by their findings.

python -m lab.figures --out figures
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from config import UserError, flag
from engine.cli import parse, user_errors
from sources import phantoms
from sources.questions import Question, about_image

# Each image of the sheet: its organ, how many findings it has, the kind of question below it.
SHOWN = [("head", 2, "location"), ("abdomen", 1, "size"), ("brain", 3, "count"),
         ("knee", 2, "side"), ("chest", 2, "side"), ("hand", 0, "presence"),
         ("colon", 1, "location"), ("breast", 3, "height")]  # fmt: skip


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the sheet of phantoms."""

    out: str = flag("figures", "folder to write to")


def pick(organ: str, count: int, kind: str) -> tuple[phantoms.Phantom, Question]:
    """The first test seed with this organ, this many findings and a question of this kind."""
    truths = ((seed, phantoms.plan(seed)[1]) for seed in phantoms.SPLITS["test"])
    seeds = (seed for seed, t in truths if (t["organ"], t["count"]) == (organ, count))
    drawn = (phantoms.draw(seed, 224) for seed in seeds)
    return next((p, q) for p in drawn for q in about_image(p) if q.kind == kind)


@user_errors
def main(argv: list[str] | None = None) -> None:
    out = Path(parse(FiguresConfig, argv, "python -m lab.figures").out)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is needed: pip install -r requirements-lab.txt") from error
    sheet = Figure((10, 7), layout="constrained")
    for ax, wanted in zip(sheet.subplots(2, 4).flat, SHOWN, strict=True):
        phantom, (question, answer, *_) = pick(*wanted)
        ax.imshow(phantom.image)
        ax.set_axis_off()
        ax.set_title(textwrap.fill(phantoms.caption(phantom), 32), fontsize=9, loc="left")
        asked = textwrap.fill(f"{question} {answer}", 34)
        ax.text(0, -0.04, asked, transform=ax.transAxes, va="top", fontsize=9, color="#0a58ca")
    out.mkdir(parents=True, exist_ok=True)
    sheet.savefig(out / "phantoms.png", dpi=100)


if __name__ == "__main__":
    main()
