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
import random
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
OTHERS = (  # the other four that there can be, for worlds of eight domains
    Convention(True, False, 7.5), Convention(False, False, 5.0),
    Convention(False, True, 5.0), Convention(False, True, 7.5),
)  # fmt: skip
WORLD = 10**10  # seeds from here on are of worlds with seed // WORLD domains
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


def seeds(split: str, n: int, first: int = 0, domains: int = 4) -> range:
    """n seeds of a split, from its seed number `first` on; no seed is in two splits."""
    found, world = SPLITS[split][first : first + n], 0 if domains == 4 else domains * WORLD
    return range(found.start + world, found.stop + world)


def convention(seed: int, organ: str) -> Convention:
    """How an image is read: by its modality's convention, in a world of four domains.

    With 1 or 2 domains the modalities share the first conventions, with 8 each organ has its own.
    """
    modality, second = divmod(ORGAN_CLASSES.index(organ), 2)
    domains = seed // WORLD or 4
    if domains == 8 and second:
        return OTHERS[modality]
    return CONVENTIONS[MODALITIES[modality % domains]]


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
    patient_side, _, limit = convention(seed, organ)
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
    inks, bright = truth["modality"] == "pathology", convention(seed, truth["organ"]).bright
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


class Question(NamedTuple):
    """A question that the image alone answers."""

    question: str
    answer: str
    answer_type: str  # "open" or "closed" (yes or no)
    kind: str  # what it is about


# Half of the wordings use "abnormality", which does not give the modality away; {own} does.
OPEN = {
    "modality": ("Which modality is this?", "What kind of image is this?"),
    "organ": ("Which part of the body is shown?", "Where in the body is this?"),
    "finding": ("Which abnormality is seen, if any?", "What is wrong here, if anything?"),
    "count": ("How many abnormalities are there?", "How many {own}s are there?"),
    "location": ("Where is the abnormality?", "In which quadrant is the {own}?"),
    "side": ("Which side is abnormal?", "On which side is the {own}?"),
    "size": ("What size is the abnormality?", "What size is the {own}?"),
}
CLOSED = {  # the possible values, then the wordings
    "modality": (MODALITIES, "Is this {a_value}?", "Would you call this {a_value}?"),
    "organ": (ORGAN_CLASSES, "Is this the {value}?", "Does the picture show the {value}?"),
    "finding": (FINDING_CLASSES[:-1], "Is the abnormality {a_value}?", "Is there {a_value}?"),
    "count": (COUNTS[1:], "Is the number of abnormalities {value}?", "Is the count {value}?"),
    "side": (("left", "right"), "Is the {value} side abnormal?", "Is the {own} on the {value}?"),
    "height": (("upper", "lower"), "Is the {value} half abnormal?", "Is it in the {value} half?"),
    "size": (("small", "large"), "Is the abnormality {value}?", "Is the {own} {value}?"),
}
PRESENCE = {"Is there an abnormality?": "abnormal", "Does everything look normal?": "normal"}


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


def questions(p: Phantom) -> list[Question]:
    """About four open and four closed questions; two closed ones where nothing is found.

    Answers are balanced for every wording, so that a model without the image has to guess: a
    closed question is first chosen to be true or false, and then gets a value that makes it so.
    """
    rng = random.Random(p.seed)
    own = FINDINGS[p.organ]  # what this organ can have, whether or not it does
    truth = {k: getattr(p, k, f"{p.height} {p.side}") for k in (*OPEN, "height")}
    truth["count"] = COUNTS[p.count]
    kinds = rng.sample(list(OPEN), 4) if p.count else ("modality", "organ", "finding", "count")
    out = [Question(rng.choice(OPEN[k]).format(own=own), truth[k], "open", k) for k in kinds]

    # A quarter of the images is normal; a third of the others makes that a half.
    if not p.count or rng.random() < 1 / 3:
        text, state = rng.choice(list(PRESENCE.items()))
        answer = "yes" if state == ("abnormal" if p.count else "normal") else "no"
        out.append(Question(text, answer, "closed", "presence"))
    for kind in rng.sample(list(CLOSED), 4) if p.count else ("modality", "organ"):
        values, *wordings = CLOSED[kind]
        value, answer = truth[kind], "yes"
        if rng.random() < 0.5:
            wrong = [v for v in values if v != value]
            if len(values) == 8 and rng.random() < 0.5:  # hard: the modality's other organ
                wrong = [values[values.index(value) ^ 1]]
            value, answer = rng.choice(wrong), "no"
        text = rng.choice(wordings).format(value=value, a_value=with_article(value), own=own)
        out.append(Question(text, answer, "closed", kind))
    return out
