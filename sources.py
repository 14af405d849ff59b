"""What --data names -> samples: captions, dialogues or single questions, of one split.

    phantoms  phantoms:N  phantoms:N+FIRST  phantoms:N/D  slake:DIR  vqa-rad:DIR  vqa-rad-3515:DIR
    pathvqa:DIR  medmnist:FILE.npz  llava:FILE.json  llava:DIR

SOURCE@W takes its samples W times an epoch. The readers of published files are in benchmarks/.
Whatever is wrong with a file is found here, before anything is trained, and told in one line.
"""

import functools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import phantoms
from benchmarks import medmnist
from benchmarks.llava import read_llava
from benchmarks.vqa import Row, read_pathvqa, read_slake, read_vqa_rad
from config import MODALITIES, UserError
from records import Image, Packed, Sample, read_json_file, shown, warn_once

N_TRAIN, N_VAL, N_TEST = 4000, 200, 500  # phantoms
MAX_TURNS = 4  # questions in one dialogue
N_ORDERS = 3  # dialogues that a real question takes part in
MAX_FACTS = 6  # question-answer pairs in a caption made from them
ROWS = {
    "slake": read_slake,
    "vqa-rad": lambda folder, split, lang: read_vqa_rad(folder, split),
    "vqa-rad-3515": lambda folder, split, lang: read_vqa_rad(folder, split, framed=True),
    "pathvqa": lambda folder, split, lang: read_pathvqa(folder, split),
}
KINDS = ("phantoms[:N]", *(f"{kind}:DIR" for kind in ROWS), "medmnist:FILE.npz", "llava:FILE.json")
NO_VAL = ("vqa-rad", "vqa-rad-3515")  # published without one


@functools.lru_cache(maxsize=20_000)
def truth(seed: int) -> phantoms.Phantom:
    return phantoms.draw(seed, size=16)  # what is true of it does not depend on the size


def read_phantoms(where: str, what: str, split: str) -> Iterator[Sample]:
    """Pictures drawn from seeds (phantoms.py), N_TRAIN or as many as the user says for training.

    "N+FIRST" takes other pictures, in every split: those from its seed number FIRST on. "N/D" is a
    world of D domains, 1, 2, 4 or 8: phantoms.convention.
    """
    where, slash, domains = (where or str(N_TRAIN)).partition("/")
    wanted, plus, first = where.partition("+")
    if slash and domains not in ("1", "2", "4", "8"):
        raise UserError(f"--data phantoms:{where}/{domains}: must be of 1, 2, 4 or 8 domains")
    if not (re.fullmatch("[0-9]{1,7}", wanted) and 0 < int(wanted) <= 10**6):
        raise UserError(f"--data phantoms:{where}: must be phantoms:N, N from 1 to 1000000")
    if plus and not (re.fullmatch("[0-9]{1,9}", first) and int(first) <= 9 * 10**8):
        raise UserError(f"--data phantoms:{where}: must be phantoms:N+FIRST, FIRST up to 900000000")
    n = {"train": int(wanted), "val": N_VAL, "test": N_TEST}[split]
    for seed in phantoms.seeds(split, n, int(first or 0), int(domains or 4)):
        phantom = truth(seed)
        sample = Sample(str(seed), "phantoms", split, seed, (), phantom.modality)
        if what == "captions":
            yield replace(sample, turns=(("", phantoms.caption(phantom)),), kind="caption")
            continue
        questions = phantoms.questions(phantom)
        if what == "instructions":
            chosen = random.Random(seed).sample(questions, min(MAX_TURNS, len(questions)))
            yield replace(sample, turns=tuple((q.question, q.answer) for q in chosen))
            continue
        for i, q in enumerate(questions):
            turns = ((q.question, q.answer),)
            yield replace(
                sample, id=f"{seed}-{i}", turns=turns, answer_type=q.answer_type, kind=q.kind
            )


def read_medmnist(file: Path, what: str, split: str) -> Iterator[Sample]:
    """Classification as questions, with the class names as the answers there are.

    One question an image; where an image has several labels (ChestMNIST), a yes or no for each.
    """
    kind = medmnist.which(file)
    labels = medmnist.read_split(file, split)[1]
    a = {"CT": "a CT", "MRI": "an MRI", "X-ray": "an X-ray", "pathology": "a pathology picture"}
    title = a.get(kind.modality, "an image")
    single = f"Which of these does the image show: {', '.join(kind.classes)}?"
    for i, label in enumerate(labels):
        name, image = f"{split}-{i}", Packed(file, split, i)
        base = Sample(name, kind.name, split, image, (), kind.modality, "closed", "class")
        if kind.task == "multi-label":
            found = [c for c, is_there in zip(kind.classes, label, strict=True) if is_there]
            turns = tuple((f"Does the image show {c}?", "yes" if c in found else "no")
                          for c in kind.classes)  # fmt: skip
        else:
            found = [kind.classes[label]]
            turns = ((single, found[0]),)
        if what == "captions":
            text = f"{title}: {', '.join(found) or 'nothing'}."
            yield replace(base, turns=(("", text),), answer_type="", kind="caption")
        elif what == "instructions":
            yield replace(base, turns=turns, answer_type="", kind="")
        elif kind.task == "multi-label":
            for c, turn in zip(kind.classes, turns, strict=True):
                yield replace(base, id=f"{name}-{c}", turns=(turn,), kind=c, options=("no", "yes"))
        else:
            yield replace(base, turns=turns, options=kind.classes)


def drop_unanswered(rows: Iterable[Row], where: str) -> Iterator[Row]:
    unanswered = []
    for row in rows:
        if row.sample.turns[0][1]:
            yield row
        else:
            unanswered.append(row.sample.id)
    if unanswered:
        warn_once(f"{where}: {len(unanswered)} without an answer skipped: qid {few(unanswered)}")


def drop_missing(rows: list, where: str, max_missing: int, image_of=lambda row: row.image) -> list:
    """Without the rows whose image file is not there; more than max_missing files are an error."""
    files = dict.fromkeys(image for row in rows if isinstance(image := image_of(row), Path))
    missing = {file for file in files if not file.is_file()}
    if not missing:
        return rows
    names = few([f"{f.parent.name}/{f.name}" for f in files if f in missing])
    told = f"--data {where}: {len(missing)} of {len(files)} images are missing: {names}"
    if len(missing) > max_missing:
        raise UserError(f"{told}; --max-missing {len(missing)} leaves their questions out")
    kept = [row for row in rows if image_of(row) not in missing]
    warn_once(f"{told}; {len(rows) - len(kept)} of {len(rows)} questions are left out")
    return kept


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def make_captions(rows: Iterable[Row]) -> Iterator[Sample]:
    """One caption an image: what it shows, then its own questions and answers, open ones first."""
    groups: dict[Path, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.sample.image, []).append(row)
    for image, group in groups.items():
        first, title = group[0]
        seen = [s for s, _ in group if s.kind != "kg"]  # knowledge, which no picture shows
        seen = sorted(seen, key=lambda s: s.answer_type == "closed")[:MAX_FACTS]
        facts = [f"{question} {answer.rstrip('.')}." for s in seen for question, answer in s.turns]
        turns = (("", " ".join([title, *facts])),)
        name = f"{image.parent.name}/{image.name}"
        yield replace(first, id=name, turns=turns, answer_type="", kind="caption")


def make_dialogues(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Up to MAX_TURNS questions about one image in a row; N_ORDERS times, each in its own order.

    One look at an image then teaches several answers. Single questions are left to phase 3.
    """
    groups: dict[Path, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.image, []).append(sample)
    for group in groups.values():
        rng = random.Random(group[0].id)
        for order in range(N_ORDERS):
            rng.shuffle(group)
            for start in range(0, len(group), MAX_TURNS):
                turns = [s.turns[0] for s in group[start : start + MAX_TURNS]]
                name = f"{group[start].id}/{order}"
                yield replace(group[start], id=name, turns=tuple(turns), answer_type="", kind="")


def parse_spec(spec: str) -> tuple[str, str, float]:
    """SOURCE, KIND:WHERE or either with @W -> kind, where, weight."""
    source, weight = spec, 1.0
    found = re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", spec)
    where = spec.partition(":")[2]
    if found and not (where and Path(where).exists()):  # else a folder that is named so
        source, weight = found[1], float(found[2])
        if not 0 < weight <= 1000:
            raise UserError(f"--data {spec}: its weight must be above 0 and at most 1000")
    kind, _, where = source.partition(":")
    if kind != "phantoms" and (kind not in (*ROWS, "medmnist", "llava") or not where):
        raise UserError(f"--data {spec}: not one of {', '.join(KINDS)}")
    return kind, where, weight


def has_splits(spec: str) -> bool:
    """Whether the source itself says what is held out; a single LLaVA file does not."""
    kind, where, _ = parse_spec(spec)
    return kind != "llava" or Path(where).is_dir()


def read_source(
    spec: str, what: str, split: str, lang: str, max_missing: int, image_folder: str | None
) -> list[Sample]:
    kind, where, weight = parse_spec(spec)
    if kind == "phantoms":
        samples = list(read_phantoms(where, what, split))
    elif kind == "medmnist":
        samples = list(read_medmnist(Path(where), what, split))
    elif kind == "llava":
        folder = Path(image_folder) if image_folder else None
        samples = drop_missing(
            list(read_llava(Path(where), what, split, folder)), spec, max_missing
        )
    else:
        rows = list(drop_unanswered(ROWS[kind](Path(where), split, lang), spec))
        rows = drop_missing(rows, spec, max_missing, lambda row: row.sample.image)
        single = [row.sample for row in rows]
        shape = {"captions": lambda: make_captions(rows),
                 "instructions": lambda: make_dialogues(single), "vqa": lambda: single}  # fmt: skip
        samples = list(shape[what]())
    if not samples and (kind not in NO_VAL or split != "val"):
        raise UserError(f"--data {spec}: no {what} in its {split} split (language: {lang})")
    return samples if weight == 1 else [replace(s, weight=weight) for s in samples]


def load_samples(
    specs: Sequence[str],
    what: str,
    split: str,
    lang: str = "en",
    max_missing: int = 0,
    image_folder: str | None = None,
    router_labels: str | None = None,
) -> list[Sample]:
    """The samples of one split ("train", "val", "test") of every source that --data names.

    what   "captions" (one an image), "instructions" (dialogues), "vqa" (one a question)
    Only vqa-rad's "val", which does not exist, may be empty. Raises UserError.
    """
    samples: list[Sample] = []
    for spec in specs:
        new = read_source(spec, what, split, lang, max_missing, image_folder)
        if {s.source for s in new} & {s.source for s in samples}:
            raise UserError(f"--data {spec}: {new[0].source} is already named")
        samples += new
    return label(samples, Path(router_labels)) if router_labels else samples


def ends(image: Image | None) -> list[str]:
    """a/b/c.jpg -> "a/b/c.jpg", "b/c.jpg", "c.jpg"; of an npz "x.npz/test/0", "test/0", "0"."""
    if isinstance(image, Packed):
        parts = (*image.file.parts, image.split, str(image.index))
    else:
        parts = image.parts if isinstance(image, Path) else (str(image),)
    return [str(Path(*parts[i:])) for i in range(len(parts))]


def label(samples: list[Sample], file: Path) -> list[Sample]:
    """Modalities from --router-labels FILE: {"image": "CT", ...}, an image by the end of its path.

    It replaces what the source says. Labels that no image has are counted and told.
    """
    given = read_json_file(file)
    if not isinstance(given, dict) or not given:
        raise UserError(f'{file}: must be an object {{"image": "modality", ...}}')
    known = {modality.lower(): modality for modality in MODALITIES}
    for name, modality in given.items():
        if not isinstance(modality, str) or modality.lower() not in known:
            allowed = ", ".join(MODALITIES)
            raise UserError(f"{file}: {shown(name)}: {shown(modality)}; must be one of {allowed}")
    used: dict[str, Image] = {}
    labelled = []
    for s in samples:
        name = next((end for end in ends(s.image) if end in given), None)
        if name is not None and used.setdefault(name, s.image) != s.image:
            two = f"{used[name]} and {s.image}"
            raise UserError(f"{file}: {shown(name)} fits {two}: write more of the path")
        labelled.append(replace(s, modality=known[given[name].lower()]) if name else s)
    if not used:
        raise UserError(f"{file}: none of its {len(given)} images is in the data")
    if n_unused := len(given.keys() - used.keys()):
        warn_once(
            f"{file}: {n_unused} of {len(given)} labels are of images that are not in the data"
        )
    return labelled
