"""Data sets as their owners publish them -> one kind of sample.

A source is named on the command line: phantoms, phantoms:N, slake:DIR, vqa-rad:DIR. Whatever is
wrong with its files is found here, before anything is trained, and told in one line that names the
file, the record and the field.
"""

import functools
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import phantoms
from config import MODALITIES, UserError

N_TRAIN, N_VAL, N_TEST = 4000, 200, 500  # phantoms
MAX_TURNS = 4  # questions in one dialogue
N_ORDERS = 3  # dialogues that a real question takes part in
MAX_FACTS = 6  # question-answer pairs in a caption made from them
SLAKE_FILES = {"train": "train.json", "val": "validate.json", "test": "test.json"}
RAD_FILE = "VQA_RAD Dataset Public.json"
RAD_FOLDERS = ("images", "VQA_RAD Image Folder")
RAD_ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}


@dataclass(frozen=True)
class Sample:
    """One image, or none, and what is said about it."""

    id: str  # unique within a source and split
    source: str
    split: str
    image: Path | int | None  # a file, a phantom's seed, or text only
    turns: tuple[tuple[str, str], ...]  # (question, answer); a caption answers ""
    modality: str | None = None  # one of MODALITIES
    answer_type: str = ""  # "open", "closed"
    kind: str = ""  # of question, for reports


class Record:
    """One entry of a JSON list. What is wrong with it is told with file, number and field."""

    def __init__(self, file: Path, number: int, values: Any):
        self.file, self.number, self.values = file, number, values
        if not isinstance(values, dict):
            raise UserError(f"{file}: record {number} (from 0) is not an object: {shown(values)}")

    def fail(self, name: str, allowed: str) -> NoReturn:
        value = shown(self.values[name]) if name in self.values else "is missing"
        raise UserError(
            f'{self.file}: record {self.number} (from 0): field "{name}" {value}; must be {allowed}'
        )

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "a text that is not empty")
        return value.strip()

    def text_or_number(self, name: str) -> str:
        """As text, perhaps empty. VQA-RAD counts in numbers, and a NaN is a table's empty cell."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.fail(name, "a text or a number")
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(name, "a text or a finite number")
        return str(value).strip()

    def choice(self, name: str, allowed: Iterable[str]) -> str:
        """One of the allowed values, however the file writes its capitals."""
        value = self.text(name).lower()
        for option in allowed:
            if option.lower() == value:
                return option
        self.fail(name, "one of " + ", ".join(allowed))

    def image(self, name: str, folder: Path) -> Path:
        path = (folder / self.text(name)).resolve()
        if not path.is_relative_to(folder.resolve()):
            self.fail(name, f"inside {folder}")
        if not path.is_file():
            self.fail(name, f"a file in {folder}")
        return path


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


@functools.cache
def warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def read_records(file: Path) -> list[Record]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except json.JSONDecodeError as e:
        raise UserError(f"{file}: not JSON: line {e.lineno}, column {e.colno}: {e.msg}") from e
    except (ValueError, RecursionError) as error:  # not UTF-8; nested too deeply
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, list):
        raise UserError(f"{file}: must be a list of records, is {shown(values)}")
    return [Record(file, number, value) for number, value in enumerate(values)]


@functools.lru_cache(maxsize=20_000)
def truth(seed: int) -> phantoms.Phantom:
    return phantoms.draw(seed, size=16)  # what is true of it does not depend on the size


def read_phantoms(where: str, what: str, split: str) -> Iterator[Sample]:
    """Pictures drawn from seeds (phantoms.py), N_TRAIN or as many as the user says for training."""
    if where and not (where.isdecimal() and 0 < int(where) <= 10**6):
        raise UserError(f"--data phantoms:{where}: must be phantoms:N, N from 1 to 1000000")
    n = {"train": int(where or N_TRAIN), "val": N_VAL, "test": N_TEST}[split]
    for seed in phantoms.seeds(split, n):
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


def read_slake(folder: Path, split: str, lang: str) -> Iterator[tuple[Sample, str, Record]]:
    """SLAKE 1.0 (Liu et al. 2021): DIR/{train,validate,test}.json, DIR/imgs/xmlabN/source.jpg."""
    if lang == "all":
        warn_once(
            "SLAKE splits its English and Chinese questions differently: with --lang all, "
            "images of the test split are in training"
        )
    for record in read_records(folder / SLAKE_FILES[split]):
        if lang not in ("all", record.choice("q_lang", ("en", "zh"))):
            continue
        modality = record.choice("modality", MODALITIES)
        kind = record.text("content_type").lower()
        article = "an" if modality in ("MRI", "X-ray") else "a"
        place = record.text("location").replace("_", " ").lower()
        image = record.image("img_name", folder / "imgs")
        yield (
            Sample("", "slake", split, image, (), modality, kind=kind),
            f"{article} {modality} of the {place}.",
            record,
        )


def read_vqa_rad(folder: Path, split: str, lang: str) -> Iterator[tuple[Sample, str, Record]]:
    """VQA-RAD (Lau et al. 2018): one JSON file and a folder of images, all English.

    Its owners name a test split only: the rest is "train", and "val" is empty. The split is by
    question, so that nearly every test image is a training image too.
    """
    images = next((folder / name for name in RAD_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise UserError(f"--data vqa-rad:{folder}: no folder {' or '.join(RAD_FOLDERS)} in it")
    for record in read_records(folder / RAD_FILE):
        is_test = record.text("phrase_type").startswith("test")
        if split != ("test" if is_test else "train"):
            continue
        kind = record.text("question_type").split(",")[0].lower()
        organ = record.text("image_organ")
        yield (
            Sample("", "vqa-rad", split, record.image("image_name", images), (), kind=kind),
            f"an image of the {RAD_ORGANS.get(organ, organ.lower())}.",
            record,
        )


def add_answers(rows: Iterable[tuple[Sample, str, Record]]) -> Iterator[tuple[Sample, str]]:
    """Complete each row's sample with what all sources share: id, question, answer, its type."""
    unanswered, first = [], {}
    for sample, title, record in rows:
        qid = record.text_or_number("qid")
        if first.setdefault(qid, record.number) != record.number:
            record.fail("qid", f"another than that of record {first[qid]}")
        turn = (record.text("question"), record.text_or_number("answer"))
        answer_type = record.choice("answer_type", ("open", "closed"))
        if turn[1]:
            yield replace(sample, id=qid, turns=(turn,), answer_type=answer_type), title
        else:
            unanswered.append(qid)
    if unanswered:
        named = ", ".join(unanswered[:5]) + (", ..." if len(unanswered) > 5 else "")
        warn_once(f"{record.file}: {len(unanswered)} without an answer skipped: qid {named}")


def make_captions(rows: Iterable[tuple[Sample, str]]) -> Iterator[Sample]:
    """One caption an image: what it shows, then its own questions and answers, open ones first."""
    groups: dict[Path, list[tuple[Sample, str]]] = {}
    for sample, title in rows:
        groups.setdefault(sample.image, []).append((sample, title))
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


READERS = {"slake": read_slake, "vqa-rad": read_vqa_rad}


def load_samples(specs: Sequence[str], what: str, split: str, lang: str = "en") -> list[Sample]:
    """The samples of one split ("train", "val", "test") of every source that --data names.

    what   "captions" (one an image), "instructions" (dialogues), "vqa" (one a question)
    Only vqa-rad's "val", which does not exist, may be empty. Raises UserError.
    """
    samples, kinds = [], set()
    for spec in specs:
        kind, _, where = spec.partition(":")
        if kind != "phantoms" and (kind not in READERS or not where):
            raise UserError(
                f"--data {spec}: not one of phantoms, phantoms:N, slake:DIR, vqa-rad:DIR"
            )
        if kind in kinds:
            raise UserError(f"--data {spec}: {kind} is already named")
        kinds.add(kind)
        if kind == "phantoms":
            new = list(read_phantoms(where, what, split))
        else:
            rows = add_answers(READERS[kind](Path(where), split, lang))
            if what == "captions":
                new = list(make_captions(rows))
            else:
                single = (sample for sample, _ in rows)
                new = list(make_dialogues(single) if what == "instructions" else single)
        if not new and (kind, split) != ("vqa-rad", "val"):
            raise UserError(f"--data {spec}: no {what} in its {split} split (language: {lang})")
        samples += new
    return samples
