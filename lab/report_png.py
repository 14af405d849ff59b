"""The main figures of a report as PNG files, drawn by an installed Chromium."""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

from config import UserError
from lab.report_numbers import Example
from lab.report_page import LIGHT, Html, page, tag
from lab.report_sections import calibration_chart, load_table, views

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1000, 2400  # CSS pixels; what is left white below is cut off
MARGIN = 24  # pixels of the PNG
# A figure on white for light and dark pages, as the others of the README.
STYLE = f""":root,body{{{LIGHT}color-scheme:light;background:#fff}}body{{padding:12px;width:976px}}
.scroll{{overflow:visible;margin:0}}caption{{color:var(--ink);font-weight:600}}
.views{{grid-template-columns:repeat(3,1fr);max-width:none;gap:.5rem;margin:0}}
.chart{{max-width:520px}}.sheet{{display:grid;grid-template-columns:1fr 1fr;gap:1.4rem 2rem}}
.sheet p{{margin:0 0 .5rem}}.gap{{height:1.4rem}}"""


def find_chromium() -> str:
    """Raises UserError where there is none."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise UserError(f"--png: needs an installed Chromium ({', '.join(BROWSERS)})")


def browse(
    chromium: str, html: Path, *flags: str, timeout: int = 60
) -> subprocess.CompletedProcess:
    """Open a page of ours without a window; a fresh profile each time, and nothing fetched."""
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                   "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
                   "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
                   *flags, html.absolute().as_uri()]  # fmt: skip
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{chromium}: did not answer in {timeout} s") from error


def screenshot(chromium: str, body: Html, file: Path) -> Path:
    """Draw a body at twice its size, cut to what is not white."""
    with tempfile.TemporaryDirectory() as folder:
        html, shot = Path(folder) / "figure.html", Path(folder) / "figure.png"
        html.write_text(page(file.stem, body, STYLE), encoding="utf-8")
        done = browse(chromium, html, f"--window-size={WIDTH},{HEIGHT}",
                      "--force-device-scale-factor=2", f"--screenshot={shot}")  # fmt: skip
        if not shot.is_file():
            raise UserError(
                f"{chromium}: no screenshot of {file.name}: {done.stderr.strip()[-200:]}"
            )
        image = Image.open(shot).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box:
        edges = (box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN)
        image = image.crop((max(0, edges[0]), max(0, edges[1]), min(image.width, edges[2]),
                            min(image.height, edges[3])))  # fmt: skip
    image.quantize(200, dither=Image.Dither.NONE).save(file, optimize=True)
    return file


def overlay_sheet(examples: Sequence[Example], names: Sequence[str], blocks) -> Html:
    """The first example of each modality: its question, the image and its patches."""
    first = {e.sample.modality: (i, e) for i, e in reversed(list(enumerate(examples)))
             if e.image is not None}  # fmt: skip
    cards = [
        tag("div", tag("p", tag("strong", f"{e.sample.modality or 'unknown'}  "),
                       f"{e.sample.turns[0][0]} “{e.answer}” (truth: {e.sample.turns[0][1]})"),
            views(e, i, names, blocks[:2])) for i, e in sorted(first.values(), key=lambda p: p[0])
    ]  # fmt: skip
    key = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    words = tag("p", f"The number on a patch is its first expert: {key}.")
    return tag("div", words, tag("div", *cards, class_="sheet"))


def draw_figures(
    numbers: dict, examples: Sequence[Example], folder: Path, chromium: str
) -> list[Path]:
    """load.png, overlays.png and, where modalities are known, calibration.png."""
    names, blocks = numbers["experts"], numbers["blocks"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--png {folder}: {error.strerror}") from error
    load = [load_table(f"Share of routed tokens by {words}", numbers["load"][group], names, blocks)
            for group, words in (("modality", "modality of the image"),
                                 ("kind", "kind of token"))]  # fmt: skip
    bodies = {"load": tag("div", load[0], tag("div", class_="gap"), load[1]),
              "overlays": overlay_sheet(examples, names, blocks)}  # fmt: skip
    if numbers["calibration"]["n"]:
        bodies["calibration"] = calibration_chart(numbers["calibration"])
    return [screenshot(chromium, body, folder / f"{name}.png") for name, body in bodies.items()]
