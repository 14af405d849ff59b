"""Facts that no image shows: named signs, whose meaning depends on the modality.

As radiology has many a named sign that means one thing in a CT and another in an X-ray, so has this
world, with invented names: a fixed random table gives each sign its meaning in each modality. Every
eighth sign means the same everywhere. Nothing but memory answers these questions, and the image
only says whose memory is needed: there experts can matter.

Phase 2 teaches a few signs, and with them the form of the question; phase 3, in which only experts
learn, teaches others. Those are asked in the test, about other images and partly in other words.
"""

import random
import re
from functools import cache

import numpy as np

from config import MODALITIES

TAUGHT = range(32)  # in phase 2
N_MOST = 480  # others
# Syllables: lab.pretrain_tiny makes a token of each.
FIRST = ("par", "bor", "con", "bru", "tum", "pel", "tak", "lar", "dov", "fer", "bet", "gan", "mir",
         "zel", "hyp", "sol")  # fmt: skip
LAST = ("ta", "ral", "la", "gy", "sis", "mer", "ra", "nor", "nex", "ric", "ad", "ula", "val", "te",
        "tal", "us", "um", "gal", "ia", "ine", "ir", "iet", "ital", "rop", "dul", "der", "bra",
        "vim", "ter", "ron", "tom", "an")  # fmt: skip
MEANINGS = tuple(a + b for a in ("mor", "vel", "quin", "tas", "ose", "lim", "cav", "bir")
                 for b in ("vane", "dax", "ulo", "mente", "stis", "phor", "cine",
                                           "gar"))  # fmt: skip


@cache
def names() -> tuple[str, ...]:
    every = [a + b for a in FIRST for b in LAST]
    random.Random(5).shuffle(every)
    return tuple(every)


@cache
def table() -> np.ndarray:
    """(modalities, signs): an index of MEANINGS."""
    rng = np.random.default_rng(5)
    found = rng.integers(len(MEANINGS), size=(len(MODALITIES), len(TAUGHT) + N_MOST))
    found[:, ::8] = found[:1, ::8]
    return found


def known(n: int) -> range:
    """The n signs that phase 3 teaches."""
    return range(len(TAUGHT), len(TAUGHT) + n)


def find(question: str) -> int | None:
    """The sign that a question names."""
    words = re.findall(r"[a-z]+", question.lower())
    return next((names().index(word) for word in words if word in names()), None)


def name(sign: int) -> str:
    return names()[sign]


def meaning(sign: int, domain: int) -> str:
    return MEANINGS[table()[domain, sign]]


def another(rng: random.Random, sign: int, domain: int) -> str:
    """A meaning that it does not have in this modality; every second time one from another."""
    right = meaning(sign, domain)
    elsewhere = [m for d in range(len(MODALITIES)) if (m := meaning(sign, d)) != right]
    wrong = elsewhere if elsewhere and rng.random() < 0.5 else [m for m in MEANINGS if m != right]
    return rng.choice(wrong)


def majority(sign: int) -> str:
    """What it means in most modalities."""
    return MEANINGS[np.bincount(table()[:, sign]).argmax()]
