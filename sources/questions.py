"""What is asked about an embedded image, in which words, and what is right.

A pattern "{Which|What} organ is {this|shown}?" stands for every combination of its parts. A third
of the combinations is asked in the test only ("new" wordings), each made of parts that training
has in others. <value>, <own> and <sign> stand for what the question is about, <a value> with an
article.

Half of the questions are about the image alone. The others are about signs: "What does the parma
sign mean here?" has an answer that only memory knows, in the image's modality (signs.py).
"""

import itertools
import random
import re
from functools import cache
from typing import NamedTuple

from config import MODALITIES
from sources import signs
from sources.phantoms import COUNTS, FINDING_CLASSES, FINDINGS, ORGAN_CLASSES, Phantom, with_article


class Question(NamedTuple):
    """A question, and the answer that is right."""

    question: str
    answer: str
    answer_type: str  # "open" or "closed" (yes or no)
    kind: str  # what it is about
    wording: str  # "seen" in training, or "new"

    def turn(self) -> tuple[str, str]:
        return self.question, self.answer


NONE = "there is none"  # where a normal image is asked for its abnormality
IT = "{abnormality|lesion|finding|<own>}"  # the first three do not give the modality away
SCAN, PART = "{modality|type of scan|kind of image}", "{organ|body part|part of the body}"
OPEN = {
    "modality": (f"{{Which|What}} {SCAN} is {{this|shown}}?", f"{{What|Which}} is the {SCAN}?"),
    "organ": (f"{{Which|What}} {PART} is {{this|shown}}?", f"{{What|Which}} is the {PART}?"),
    "finding": ("Which {abnormality|lesion|finding} is {seen|shown|there}, if any?",
                "What is {wrong|abnormal} {here|in this image}{|, if anything}?"),
    "count": ("How many {abnormalities|lesions|findings|<own>s} are {there|seen|shown}?",),
    "location": (f"{{Where|In which quadrant}} is the {IT}{{| seen}}?",
                 f"{{Where|In which quadrant}} do you see the {IT}?"),
    "side": ("{Which|What} side is {abnormal|affected}?", f"On {{which|what}} side is the {IT}?"),
    "size": (f"{{What size|How large}} is the {IT}?", f"What is the size of the {IT}?"),
}  # fmt: skip
CLOSED = {  # the possible values, then the patterns
    "modality": (MODALITIES, "{Is this|Is it|Would you call this} {|really }<a value>?",
                 f"Is the {SCAN} {{|really }}<value>?"),
    "organ": (ORGAN_CLASSES, "{Is this|Is it} {|really }the <value>?",
              "{Does the image show|Do you see} the <value>{| here}?",
              f"Is the {PART} {{|really }}the <value>?"),
    "finding": (FINDING_CLASSES[:-1], "Is the {abnormality|lesion|finding} {|really }<a value>?",
                "{Is there|Do you see|Does the image show} <a value>{| here}?"),
    "count": (COUNTS[1:], "Is the number of {abnormalities|lesions|findings|<own>s} <value>?",
              "Is <value> the number of {abnormalities|lesions|findings|<own>s}{| here}?"),
    "side": (("left", "right"), "Is the <value> side {abnormal|affected}?",
             f"{{Is|Do you see}} the {IT} on the <value>{{| side}}?"),
    "height": (("upper", "lower"), "Is the <value> half {abnormal|affected}?",
               f"{{Is|Do you see}} the {IT} in the <value> half?"),
    "size": (("small", "large"), f"{{Is|Would you call}} the {IT} <value>?"),
}  # fmt: skip
PRESENCE = {
    "abnormal": ("{Is there|Do you see} {an abnormality|a lesion|a finding}{| here}?",
                 "Is anything {wrong|abnormal} {here|in this image}?"),
    "normal": ("Is {everything|the image|it} {|really }normal?",
               "Does {everything|the image|it} look normal?"),
}  # fmt: skip
SIGN = {
    "open": ("What does the <sign> sign {mean|stand for|say}{| here}?",
             "What is the {meaning|name} of the <sign> sign{| here}?",
             "Here, what does the <sign> sign {mean|stand for}?"),
    "closed": ("Does the <sign> sign {mean|stand for|say} <value>{| here}?",
               "Is <value> the {meaning|name} of the <sign> sign{| here}?"),
}  # fmt: skip


@cache
def wordings(patterns: tuple[str, ...]) -> dict[str, list[str]]:
    """Every combination: those that training has, and the "new" ones of the test."""
    found: dict[str, list[str]] = {"seen": [], "new": []}
    for pattern in patterns:
        parts = [part.split("|") for part in re.split(r"[{}]", pattern)]
        for places in itertools.product(*(range(len(part)) for part in parts)):
            text = "".join(part[i] for part, i in zip(parts, places, strict=True))
            found["new" if sum(places) % 3 == 2 else "seen"].append(text)
    return found


def filled(text: str, **values: str) -> str:
    for name, value in values.items():
        text = text.replace(f"<{name}>", value).replace(f"<a {name}>", with_article(value))
    return text


def word(rng: random.Random, patterns: tuple[str, ...], new: float, **values: str) -> tuple:
    """-> a question in one of its wordings, new ones with this probability; and which it is."""
    which = "new" if rng.random() < new else "seen"
    return filled(rng.choice(wordings(patterns)[which]), **values), which


def truths(p: Phantom) -> dict[str, str]:
    """What is right for each kind of question; of a normal image, for those that make sense."""
    if not p.count:
        found = dict.fromkeys(("location", "side", "size"), NONE)
        return found | {
            "modality": p.modality,
            "organ": p.organ,
            "finding": "none",
            "count": "none",
        }
    found = {k: getattr(p, k) for k in ("modality", "organ", "finding", "side", "height", "size")}
    return found | {"location": f"{p.height} {p.side}", "count": COUNTS[p.count]}


def answer(p: Phantom, question: str) -> str | None:
    """What is right, if it is a question in one of the wordings; case does not matter."""
    right, own, every = truths(p), FINDINGS[p.organ], {}

    def know(patterns: tuple[str, ...], answer: str, **values: str) -> None:
        for text in (text for texts in wordings(patterns).values() for text in texts):
            every[filled(text, own=own, **values).lower()] = answer

    for kind in OPEN.keys() & right.keys():
        know(OPEN[kind], right[kind])
    for kind in CLOSED.keys() & right.keys():
        values, *patterns = CLOSED[kind]
        for value in values:
            know(tuple(patterns), "yes" if value == right[kind] else "no", value=value)
    for state, patterns in PRESENCE.items():
        know(patterns, "yes" if state == ("abnormal" if p.count else "normal") else "no")
    if (sign := signs.find(question)) is not None:
        meaning = signs.meaning(sign, MODALITIES.index(p.modality))
        know(SIGN["open"], meaning, sign=signs.name(sign))
        for value in signs.MEANINGS:
            know(SIGN["closed"], "yes" if value == meaning else "no", sign=signs.name(sign),
                 value=value)  # fmt: skip
    return every.get(question.lower().strip())


def about_image(p: Phantom, new: float = 0.0) -> list[Question]:
    """Four open and about four closed questions; of a normal image, one has a false premise.

    Answers are balanced for every kind, so that a model without the image has to guess: a closed
    question is first chosen to be true or false, and then gets a value that makes it so.
    """
    rng, own = random.Random(p.seed), FINDINGS[p.organ]  # what this organ can have
    truth = truths(p)
    kinds = rng.sample(list(OPEN), 4)
    if not p.count:
        kinds = ["modality", "organ", rng.choice(["finding", "count"]),
                 rng.choice(["location", "side", "size"])]  # fmt: skip
    out = []
    for kind in kinds:
        text, which = word(rng, OPEN[kind], new, own=own)
        name = "false premise" if truth[kind] == NONE else kind
        out.append(Question(text, truth[kind], "open", name, which))

    # A quarter of the images is normal; a third of the others makes that a half.
    if not p.count or rng.random() < 1 / 3:
        state = rng.choice(list(PRESENCE))
        text, which = word(rng, PRESENCE[state], new)
        answer = "yes" if state == ("abnormal" if p.count else "normal") else "no"
        out.append(Question(text, answer, "closed", "presence", which))
    for kind in rng.sample(list(CLOSED), 4) if p.count else ("modality", "organ"):
        values, *patterns = CLOSED[kind]
        value, answer = truth[kind], "yes"
        if rng.random() < 0.5:
            wrong = [v for v in values if v != value]
            if len(values) == 8 and rng.random() < 0.5:  # hard: the modality's other organ
                wrong = [values[values.index(value) ^ 1]]
            value, answer = rng.choice(wrong), "no"
        text, which = word(rng, tuple(patterns), new, value=value, own=own)
        out.append(Question(text, answer, "closed", kind, which))
    return out


def about_signs(p: Phantom, those: range, n: int, new: float = 0.0) -> list[Question]:
    """n open questions about different signs of `those`, and a quarter as many closed ones."""
    rng = random.Random(~p.seed)
    domain = MODALITIES.index(p.modality)
    n_closed = n // 4 + (rng.random() < n % 4 / 4)
    out = []
    for i, sign in enumerate(rng.sample(those, n + n_closed)):
        kind = "open" if i < n else "closed"
        value = answer = signs.meaning(sign, domain)
        if kind == "closed":
            answer = "yes"
            if rng.random() < 0.5:  # what it means elsewhere, or anything
                value, answer = signs.another(rng, sign, domain), "no"
        text, which = word(rng, SIGN[kind], new, sign=signs.name(sign), value=value)
        out.append(Question(text, answer, kind, "sign", which))
    return out
