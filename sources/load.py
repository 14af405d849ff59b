"""What --data names -> samples: captions, dialogues or single questions, of one split.

    phantoms  phantoms:N  phantoms:N+FIRST  phantoms:N/S  slake:DIR  vqa-rad:DIR  vqa-rad-3515:DIR
    pathvqa:DIR  medmnist:FILE.npz  llava:FILE.json  llava:DIR
    table:FILE.csv, .jsonl or .parquet

SOURCE@W takes its samples W times an epoch. Whatever is wrong with a file is found here, before
anything is trained, and reported in one line.
"""

import gc
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import MODALITIES, Common, UserError, tolerate, warn_once
from data import Image, Packed, Sample
from sources import dicom, medmnist, packed, phantoms, signs
from sources.images import unreadable
from sources.llava import entries, read_llava
from sources.questions import about_image, about_signs
from sources.records import Entry, read_json, shown
from sources.tables import CODES, TITLES, read_table
from sources.vqa import Row, read_pathvqa, read_slake, read_vqa_rad

N_TRAIN, N_VAL, N_TEST = 4000, 200, 500  # phantoms
N_SIGNS = 120  # of phantoms, beside those that phase 2 teaches
N_TAUGHT, N_FACTS = 2, 8  # open questions about signs, an image, in phase 2 and in phase 3
MAX_TURNS = 4  # questions in one dialogue
N_ORDERS = 3  # dialogues that a real question takes part in
MAX_FACTS = 6  # question-answer pairs in a caption made from them
ROWS = {
    "slake": read_slake,
    "vqa-rad": lambda folder, split, lang, links: read_vqa_rad(folder, split, False, links),
    "vqa-rad-3515": lambda folder, split, lang, links: read_vqa_rad(folder, split, True, links),
    "pathvqa": lambda folder, split, lang, links: read_pathvqa(folder, split, links),
}
KINDS = ("phantoms[:N]", *(f"{kind}:DIR" for kind in ROWS), "medmnist:FILE.npz", "llava:FILE.json",
         "table:FILE.csv")  # fmt: skip
# The flags that decide which questions are answered, as checkpoints and results store them.
READING = {"data": (list, tuple), "lang": str, "max_missing": int, "max_bad": int,
           "follow_links": bool, "image_folder": str, "router_labels": str, "window": str,
           "frame": str, "split": str, "limit": int}  # fmt: skip


def read_phantoms(where: str, split: str, together: bool) -> Iterator[Entry]:
    """Images drawn from seeds (phantoms.py); N of them, N_TRAIN if left out, in training.

    "N+FIRST" takes other images, in every split: those from its seed number FIRST on. "N/S" has S
    signs (signs.py).
    together: an image's questions as two dialogues, which are read in a third of the time.
    """
    pattern = r"([0-9]{1,9})(?:\+([0-9]{1,9}))?(?:/([0-9]{1,3}))?"
    found = re.fullmatch(pattern, where or str(N_TRAIN))
    n_train, first, n_signs = found.groups() if found else (0, 0, 0)
    n_train, first = int(n_train), int(first or 0)
    n_signs = N_SIGNS if n_signs is None else int(n_signs)
    if not 0 < n_train <= 10**6 or first > 9 * 10**8 or not 16 <= n_signs <= signs.N_MOST:
        allowed = f"N from 1 to 1000000, FIRST up to 900000000, S from 16 to {signs.N_MOST}"
        raise UserError(f"--data phantoms:{where}: must be phantoms:N+FIRST/S, {allowed}")
    n = {"train": n_train, "val": N_VAL, "test": N_TEST}[split]
    n_facts, new = (N_FACTS, 0.0) if split == "train" else (2, 1 / 3)
    for seed in phantoms.seeds(split, n, first):
        phantom = phantoms.Phantom(None, seed, **phantoms.plan(seed)[1])
        base = Sample(str(seed), "phantoms", split, seed, (), phantom.modality)
        rng, seen = random.Random(seed), about_image(phantom, new)
        asked = [*seen, *about_signs(phantom, signs.known(n_signs), n_facts, new)]
        taught = [*seen, *about_signs(phantom, signs.TAUGHT, N_TAUGHT)]
        rng.shuffle(taught)
        dialogue = [q.turn() for q in taught]
        if together:
            rng.shuffle(asked)
            turns = tuple(q.turn() for q in asked)
            parts = turns[::2], turns[1::2]
            questions = [replace(base, id=f"{seed}-{i}", turns=p) for i, p in enumerate(parts)]
        else:
            questions = [
                replace(base, id=f"{seed}-{i}", turns=(q.turn(),), answer_type=q.answer_type,
                        kind=q.kind, wording=q.wording)
                for i, q in enumerate(asked)
            ]  # fmt: skip
        yield base, phantoms.caption(phantom), tuple(dialogue), questions


def read_medmnist(file: Path, split: str) -> Iterator[Entry]:
    """Classification as questions, with the class names as the possible answers.

    One question an image; where an image has several labels (ChestMNIST), a yes or no for each.
    """
    known = medmnist.which(file)
    title = TITLES[known.modality]
    single = f"Which of these does the image show: {', '.join(known.classes)}?"
    for i, label in enumerate(medmnist.read_split(file, split)[1]):
        base = Sample(f"{split}-{i}", known.name, split, Packed(file, split, i), (), known.modality)
        closed = replace(base, answer_type="closed", kind="class", options=known.classes)
        if known.task == "multi-label":
            found = [c for c, is_there in zip(known.classes, label, strict=True) if is_there]
            turns = tuple((f"Does the image show {c}?", "yes" if c in found else "no")
                          for c in known.classes)  # fmt: skip
            questions = (
                replace(closed, id=f"{base.id}-{c}", turns=(turn,), kind=c, options=("no", "yes"))
                for c, turn in zip(known.classes, turns, strict=True)
            )
        else:
            found = [known.classes[label]]
            turns = ((single, found[0]),)
            questions = [replace(closed, turns=turns)]
        yield base, f"{title}: {', '.join(found) or 'nothing'}.", turns, questions


def shape(entries: Iterable[Entry], what: str) -> Iterator[Sample]:
    """A caption, a dialogue or single questions of each entry."""
    for base, caption, dialogue, questions in entries:
        if what == "captions":
            yield replace(base, turns=(("", caption),), kind="caption", image_turn=0)
        elif what == "instructions":
            yield base if base.turns is dialogue else replace(base, turns=dialogue)
        else:
            yield from questions


def missing_images(samples: list[Sample], where: str, max_missing: int) -> set[Image]:
    """The image files that are not there. Raises UserError for more than max_missing."""
    files = dict.fromkeys(s.image for s in samples if isinstance(s.image, Path))
    missing = {file: None for file in files if not packed.is_there(file)}
    if missing:
        names = few([f"{f.parent.name}/{f.name}" for f in missing])
        message = f"--data {where}: {len(missing)} of {len(files)} images are missing: {names}"
        if len(missing) > max_missing:
            raise UserError(f"{message}; --max-missing {len(missing)} leaves their questions out")
        n = sum(s.image in missing for s in samples)
        warn_once(f"{message}; {n} of {len(samples)} questions are left out")
    return set(missing)


def usable(
    samples: list[Sample], spec: str, keep: bool, max_missing: int, max_bad: int, open_images: bool
) -> list[Sample]:
    """Without those whose image is missing or unreadable; DICOM's modality labels the unlabelled.

    keep: the unreadable ones stay, with a `fault` in place of their image.
    """
    missing = missing_images(samples, spec, max_missing)
    samples = [s for s in samples if s.image not in missing]
    codes = {i: dicom.modality(i) for i in {s.image for s in samples}
             if isinstance(i, Path) and packed.is_dicom(i)}  # fmt: skip
    if codes:
        samples = [replace(s, modality=CODES.get(codes[s.image]))
                   if not s.modality and s.image in codes else s for s in samples]  # fmt: skip
    if not open_images:
        return samples
    files = dict.fromkeys(s.image for s in samples if isinstance(s.image, Path))
    bad = unreadable(files)
    named = [(f"{file.parent.name}/{file.name}", reason) for file, reason in bad.items()]
    tolerate(
        f"--data {spec}", named, max_bad, "counts them as wrong" if keep else "leaves them out"
    )
    if not keep:
        return [s for s in samples if s.image not in bad]
    return [replace(s, image=None, fault=bad[s.image]) if s.image in bad else s for s in samples]


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def make_captions(rows: Iterable[Row]) -> Iterator[Sample]:
    """One caption an image: what it shows, then its own questions and answers, open ones first."""
    groups: dict[Path, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[0].image, []).append(row)
    for image, group in groups.items():
        first, title = group[0]
        shown = [s for s, _ in group if s.kind != "kg"]  # knowledge, which no image shows
        shown = sorted(shown, key=lambda s: s.answer_type == "closed")[:MAX_FACTS]
        facts = [f"{question} {answer.rstrip('.')}." for s in shown for question, answer in s.turns]
        turns = (("", " ".join([title, *facts])),)
        name = f"{image.parent.name}/{image.name}"
        yield replace(first, id=name, turns=turns, answer_type="", kind="caption")


def make_dialogues(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Up to MAX_TURNS questions about one image in a row; N_ORDERS times, each in its own order."""
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
    if kind != "phantoms" and (kind not in (*ROWS, "medmnist", "llava", "table") or not where):
        raise UserError(f"--data {spec}: not one of {', '.join(KINDS)}")
    return kind, where, weight


def has_splits(spec: str) -> bool:
    """Whether the source itself has val and test splits; a single LLaVA file has not."""
    kind, where, _ = parse_spec(spec)
    return kind != "llava" or Path(where).is_dir()


def file_names(specs: Iterable[str]) -> dict[str, str]:
    """The source's name of each llava:WHERE and table:WHERE: its stem, and as many folders as tell
    it apart."""
    kinds = {where: kind for kind, where, _ in map(parse_spec, specs) if kind in ("llava", "table")}
    paths = {where: Path(where).resolve() for where in kinds}
    ends = {path: (*path.parts[1:-1], path.stem) for path in paths.values()}
    names = {}
    for where, path in paths.items():
        lengths = range(1, len(ends[path]) + 1)
        alone = (n for n in lengths if sum(e[-n:] == ends[path][-n:] for e in ends.values()) == 1)
        names[where] = "/".join((kinds[where], *ends[path][-next(alone, 1) :]))
    return names


@contextmanager
def without_gc() -> Iterator[None]:
    """It would search the growing list of samples again and again: a third of the speed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@without_gc()
def read_source(
    spec: str, what: str, split: str, name: str, lang: str, max_missing: int, max_bad: int,
    follow_links: bool, image_folder: str | None, open_images: bool,
) -> list[Sample]:  # fmt: skip
    kind, where, weight = parse_spec(spec)
    together = what == "tuning"
    what = "vqa" if together else what
    keep = what == "vqa" and split != "train"
    if kind == "phantoms":
        samples = list(shape(read_phantoms(where, split, together), what))
    elif kind == "medmnist":
        samples = list(shape(read_medmnist(Path(where), split), what))
    elif kind == "llava":
        dialogues, faults = read_llava(Path(where), split, name, image_folder, follow_links)
        tolerate(f"--data {spec}", faults, max_bad, "leaves them out")
        dialogues = usable(dialogues, spec, keep, max_missing, max_bad, open_images)
        samples = list(shape(entries(dialogues), what))
    else:
        if kind == "table":
            rows = list(read_table(Path(where), split, name, image_folder, follow_links))
        else:
            rows = list(ROWS[kind](Path(where), split, lang, follow_links))
        if unanswered := [s.id for s, _ in rows if not s.turns[0][1]]:
            warn_once(f"{spec}: {len(unanswered)} without an answer skipped: qid {few(unanswered)}")
        rows = [(s, title) for s, title in rows if s.turns[0][1]]
        titles = {s.id: title for s, title in rows}
        samples = [s for s, _ in rows]
        samples = usable(samples, spec, keep, max_missing, max_bad, open_images)
        rows = [(s, titles[s.id]) for s in samples]
        if what != "vqa":
            samples = list(make_captions(rows) if what == "captions" else make_dialogues(samples))
    may_lack_val = kind in ("vqa-rad", "vqa-rad-3515", "table")
    if not samples and not (may_lack_val and split == "val"):
        language = f" of --lang {lang}" if kind == "slake" else ""
        raise UserError(f"--data {spec}: no questions{language} in its {split} split")
    return samples if weight == 1 else [replace(s, weight=weight) for s in samples]


def load_samples(
    specs: Sequence[str], what: str, split: str, lang: str = "en", max_missing: int = 0,
    max_bad: int = 0, follow_links: bool = False, image_folder: str | None = None,
    router_labels: str | None = None, window: str = "auto", frame: str = "first",
    open_images: bool = True,
) -> list[Sample]:  # fmt: skip
    """The samples of one split ("train", "val", "test") of every source that --data names.

    what         "captions" (one an image), "instructions" (dialogues), "vqa" (one a question),
                 "tuning" (phase 3's: "vqa", but an embedded image's questions together)
    open_images  whether every image file is decoded once, to find those that cannot be read
    Only "val" of vqa-rad, which has none, and of a table may be empty. Raises UserError.
    """
    samples: list[Sample] = []
    names = file_names(specs)
    for spec in specs:
        new = read_source(spec, what, split, names.get(parse_spec(spec)[1], ""), lang, max_missing,
                          max_bad, follow_links, image_folder, open_images)  # fmt: skip
        if {s.source for s in new} & {s.source for s in samples}:
            raise UserError(f"--data {spec}: {new[0].source} is already named")
        samples += new
    samples = label(samples, Path(router_labels)) if router_labels else samples
    views = {i: dicom.viewed(i, window, frame) for i in {s.image for s in samples}}
    return [s if views[s.image] == s.image else replace(s, image=views[s.image]) for s in samples]


def reading(flags: Common) -> dict[str, Any]:
    """How to read --data, as keyword arguments of load_samples."""
    names = ("lang", "max_missing", "max_bad", "follow_links", "image_folder", "router_labels",
             "window", "frame")  # fmt: skip
    return {name: getattr(flags, name) for name in names}


def how_read(values: Any, file: Path) -> dict[str, Any]:
    """The flags about data in a checkpoint's flags or a result of eval.py; some may be missing.

    Raises UserError for a field of another type.
    """
    found = {}
    for name, kind in READING.items():
        value = values.get(name) if isinstance(values, dict) else None
        if value is None:
            continue
        is_list = name == "data"
        if not isinstance(value, kind) or (is_list and not all(isinstance(v, str) for v in value)):
            raise UserError(f'{file}: field "{name}" {value!r} is of the wrong kind')
        found[name] = tuple(value) if is_list else value
    for name, allowed in (
        ("lang", ("en", "zh", "all")), ("split", ("train", "val", "test")),
        ("window", ("auto", *dicom.WINDOWS)), ("frame", dicom.FRAMES),
    ):  # fmt: skip
        if found.get(name, allowed[0]) not in allowed:
            raise UserError(f'{file}: field "{name}" must be one of {", ".join(allowed)}')
    return found


def ends(image: Image | None) -> list[str]:
    """a/b/c.jpg -> "a/b/c.jpg", "b/c.jpg", "c.jpg"; of an npz "x.npz/test/0", "test/0", "0"."""
    is_packed = isinstance(image, Packed)
    path = image.file / image.split / str(image.index) if is_packed else Path(str(image))
    return [str(Path(*path.parts[i:])) for i in range(len(path.parts))]


def label(samples: list[Sample], file: Path) -> list[Sample]:
    """Modalities from --router-labels FILE: {"image": "CT", ...}, an image by the end of its path.

    They replace the source's own. Labels that no image has are counted in a warning.
    """
    labels = read_json(file)
    if not isinstance(labels, dict) or not labels:
        raise UserError(f'{file}: must be an object {{"image": "modality", ...}}')
    known = {modality.lower(): modality for modality in MODALITIES}
    for name, modality in labels.items():
        if not isinstance(modality, str) or modality.lower() not in known:
            allowed = ", ".join(MODALITIES)
            raise UserError(f"{file}: {shown(name)}: {shown(modality)}; must be one of {allowed}")
    used: dict[str, Image] = {}
    labelled = []
    for s in samples:
        name = next((end for end in ends(s.image) if end in labels), None)
        if name is not None and used.setdefault(name, s.image) != s.image:
            two = f"{used[name]} and {s.image}"
            raise UserError(f"{file}: {shown(name)} fits {two}: write more of the path")
        labelled.append(replace(s, modality=known[labels[name].lower()]) if name else s)
    if not used and any(s.split == "train" for s in samples):  # others may have no label
        raise UserError(f"{file}: none of its {len(labels)} images is in the data")
    if n := len(labels) - len(used):
        warn_once(f"{file}: {n} of {len(labels)} labels are of images that are not in the data")
    return labelled
