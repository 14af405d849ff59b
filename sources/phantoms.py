"""The embedded data: medical-like images drawn from a seed, with exact ground truth.

`draw(seed)` paints one of eight organs in one of the paper's four modalities (arXiv 2404.10237),
with 0 to 3 findings in one quadrant; `caption` and `questions` put what is true of it into words.

The modalities disagree on purpose about what is left, abnormal and large, so that experts can
specialise (CONVENTIONS). Where bright spots are findings, dark ones, drawn with the same statistics
in another quadrant, are normal, or the reverse: air, flow voids, contrast medium, fat.

Lengths are painting.py's units, 112 to a side. Shapes: S pixels a side.
"""

import cmath
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from config import MODALITIES
from sources.painting import PAINTERS, Canvas, stain

FINDINGS = {  # what each organ can have; a line for each of MODALITIES
    "head": "infarct", "abdomen": "cyst",
    "brain": "plaque", "knee": "bone bruise",
    "chest": "nodule", "hand": "bone island",
    "colon": "aberrant crypt", "breast": "tumour nest",
}  # fmt: skip
ORGAN_CLASSES = tuple(FINDINGS)
FINDING_CLASSES = (*FINDINGS.values(), "none")
ORGANS = {m: ORGAN_CLASSES[2 * i : 2 * i + 2] for i, m in enumerate(MODALITIES)}
COUNTS = ("none", "one", "two", "three")
SPLITS = {s: range(i * 10**9, (i + 1) * 10**9) for i, s in enumerate(("train", "val", "test"))}


class Convention(NamedTuple):
    """How one modality is read."""

    patient_side: bool  # left is the patient's left, which is on the viewer's right
    bright: bool  # findings are brighter than the tissue, and darker spots normal; or the reverse
    limit: float  # units; a finding with a larger radius is "large"


CONVENTIONS = {
    "CT": Convention(patient_side=True, bright=False, limit=5.0),
    "MRI": Convention(patient_side=True, bright=True, limit=5.0),
    "X-ray": Convention(patient_side=True, bright=True, limit=7.5),
    "pathology": Convention(patient_side=False, bright=False, limit=7.5),
}
# Shares of the limit, 15 % clear of it: large at 5.0 (5.75 to 6.25) is small at 7.5 (5.6 to 6.4).
RADII = {"small": (0.75, 0.85), "large": (1.15, 1.25)}
GAP = 4.0  # units from a spot to the next, and to the mid-lines
REACH = {"head": 32, "abdomen": 34, "brain": 32, "knee": 36, "hand": 40}  # from the centre; else 46


@dataclass(frozen=True, eq=False)
class Phantom:
    """An image and its truth; side, height and size are "" where nothing is found."""

    image: np.ndarray | None  # (S, S, 3) uint8; None: not drawn
    seed: int
    modality: str
    organ: str
    finding: str  # or "none"
    count: int  # 0 to 3
    side: str  # "left" or "right", as the modality names it
    height: str  # "upper" or "lower", in the image
    size: str  # "small" or "large", by the modality's limit


def seeds(split: str, n: int, first: int = 0) -> range:
    """n seeds of a split, from its seed number `first` on; no seed is in two splits."""
    return SPLITS[split][first : first + n]


def scatter(rng: np.random.Generator, n: int, radius: float, corner: complex, reach: float) -> list:
    """n ellipses (x, y, rx, ry) in one quadrant, clear of each other and of the mid-lines."""
    # On the corners of a regular n-gon they cannot overlap: nothing is drawn and thrown away.
    spread = rng.uniform(1, 1.1) * (0, 0, radius + GAP / 2, (2 * radius + GAP) / math.sqrt(3))[n]
    near = max(spread + radius + GAP, 13)
    x, y = rng.uniform(near, max(near + 0.5, reach - spread - radius), 2).tolist()
    centre, start = complex(x * corner.real, y * corner.imag), rng.uniform(0, 2 * math.pi)
    at = [centre + cmath.rect(spread, start + 2 * math.pi * i / n) for i in range(n)]
    oval = rng.uniform(0.94, 1.06, n).tolist()
    return [(z.real, z.imag, radius * s, radius / s) for z, s in zip(at, oval, strict=True)]


def plan(seed: int) -> tuple[np.random.Generator, dict, list, list]:
    """A seed's random choices: the fields of its Phantom, its findings, and its normal spots."""
    rng = np.random.default_rng(seed)
    organ = ORGAN_CLASSES[rng.integers(8)]
    modality = next(m for m in MODALITIES if organ in ORGANS[m])
    patient_side, _, limit = CONVENTIONS[modality]
    groups = []
    for corner in rng.permutation([-1 - 1j, -1 + 1j, 1 - 1j, 1 + 1j])[:2].tolist():
        count, size = int(rng.integers(4)), ("small", "large")[rng.integers(2)]
        radius = limit * rng.uniform(*RADII[size])
        groups.append(scatter(rng, count, radius, corner, REACH.get(organ, 46)))
    truth = {"modality": modality, "organ": organ, "finding": "none", "count": count}
    truth |= {"side": "", "height": "", "size": ""}
    if count:  # the second group is the findings
        side = "left" if patient_side == (corner.real > 0) else "right"
        height = "lower" if corner.imag > 0 else "upper"
        truth |= {"finding": FINDINGS[organ], "side": side, "height": height, "size": size}
    return rng, truth, groups[1], groups[0]


def draw(seed: int, size: int = 112) -> Phantom:
    """The image of a seed and its truth, the same bytes every time."""
    rng, truth, findings, normal = plan(seed)
    canvas = Canvas(rng, size)
    turn, zoom, dx, dy = rng.uniform((-0.08, 0.95, -2, -2), (0.08, 1.03, 2, 2)).tolist()
    canvas.frame(cmath.rect(zoom, turn), complex(dx, dy))
    PAINTERS[truth["organ"]](canvas)
    canvas.frame(1 + 0j, 0j)  # spots keep their places, however the anatomy lies
    inks, bright = truth["modality"] == "pathology", CONVENTIONS[truth["modality"]].bright
    light, dark = (0.0, 1.4) if inks else (0.9, 0.08)
    for spot in normal:
        canvas.ellipse(*spot, dark if bright else light)
    for spot in findings:
        canvas.ellipse(*spot, light if bright else dark)
    planes = stain(canvas.image, canvas.eosin) if inks else canvas.image[None]
    gain, lift = rng.uniform((0.9, 0.0), (1.02, 0.04)).tolist()
    noise = (rng.random((size, size), np.float32) - 0.5) * 0.11 + lift
    planes = (np.clip(planes * gain + noise, 0, 1) * 255).astype(np.uint8)
    image = np.repeat(planes.transpose(1, 2, 0), 3 // len(planes), axis=2)
    return Phantom(image=image, seed=seed, **truth)


def with_article(name: str) -> str:
    """Put "a" or "an" before a modality or a finding."""
    return ("an " if name[0] in "aeiouMX" else "a ") + name + " slide" * (name == "pathology")


def caption(p: Phantom) -> str:
    """One sentence with every field of p."""
    start = f"{with_article(p.modality)} of the {p.organ} with"
    if not p.count:
        return f"{start} no abnormality"
    things = p.finding + "s" * (p.count > 1)
    return f"{start} {COUNTS[p.count]} {p.size} {things} in the {p.height} {p.side}"
