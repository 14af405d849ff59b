"""LLaVA's JSON, in which LLaVA-Med and Med-MoE keep everything: captions, dialogues, questions.

A list of {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from":
"gpt", "value": ...}, ...]}; evaluation files add "answer_type", router files "modality", and
LLaVA-Med's "domain". Some published files spell the key "conversatons", which is read as well. A
field that is null, NaN or empty, as tables are exported, counts as missing.
"""

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from config import MODALITIES, UserError, warn_once
from data import Sample, Turns
from sources.records import Entry, Record, check_regular, read_lines, read_records, shown

Faults = list[tuple[str, str]]  # id and reason of records that cannot be used

TYPES = {"open": "open", "close": "closed", "closed": "closed"}
KEYS = ("conversations", "conversatons")
NULLS = (None, "", [])
# LLaVA-Med's flags of a figure (LLaVA-Med instruct_postprocess.py @b9a98a7) -> our modalities.
# Photographs of organs (gross) are pathology's as well. Flags of two modalities label nothing.
DOMAINS = {"chest_xray": "X-ray", "mri": "MRI", "ct_scan": "CT", "histology": "pathology",
           "gross": "pathology"}  # fmt: skip


def read_llava(
    where: Path, split: str, source: str, image_folder: str | None, follow_links: bool
) -> tuple[list[Sample], Faults]:
    """FILE.json or .jsonl, for any split, or DIR with {train,val,test}.json -> its dialogues.

    Images are looked for in "images" beside the file, if it is there, then in image_folder; if
    there is neither, beside the file. Their answer_type is the field's, or "".
    """
    file = where / f"{split}.json" if where.is_dir() else where
    check_regular(file)
    folders = [beside] if (beside := file.parent / "images").is_dir() else []
    if image_folder:
        folders.append(Path(image_folder))
        if not folders[-1].is_dir():
            raise UserError(f"--image-folder {image_folder}: no such folder")
    about, folders = file.stat(), tuple(folders) or (file.parent,)
    return read_file(file, split, source, folders, follow_links, about.st_size, about.st_mtime_ns)


@functools.cache  # every phase comes back to the same files
def read_file(
    file: Path, split: str, source: str, folders: tuple[Path, ...], follow_links: bool,
    *version: int,
) -> tuple[list[Sample], Faults]:  # fmt: skip
    """version: the file's size and time, so that a changed one is read again.

    An identifier that occurs twice gets a number in training; in val and test it is a fault.
    (The released code numbers all of them.)
    """
    seen: dict[str, int] = {}
    samples, faults, n_system = [], [], 0
    records = list(read_lines(file)) if file.suffix == ".jsonl" else read_records(file)
    for record in tqdm(records, desc=file.name, delay=2, mininterval=1, file=sys.stderr):
        # Fields that are null, NaN or empty are as good as missing.
        record.values = {k: v for k, v in record.values.items() if v == v and v not in NULLS}
        n_system += drop_system_turn(record)
        try:
            sample = read_item(record, split, source, folders, follow_links)
            if seen.setdefault(sample.id, record.number) != record.number:
                if split != "train":
                    record.fail("id", f"another than that of record {seen[sample.id]}")
                sample = replace(sample, id=f"{sample.id}#{record.number}")
            samples.append(sample)
        except UserError as error:
            faults.append((str(record.values.get("id", record.number))[:60], str(error)))
    if n_system:
        warn_once(f"{file}: {n_system} records begin with a system turn, which is not read")
    return samples, faults


def read_item(
    record: Record, split: str, source: str, folders: tuple[Path, ...], follow_links: bool
) -> Sample:
    """One record as a dialogue. Raises UserError."""
    name = record.text_or_number("id") if "id" in record.values else str(record.number)
    turns, image_turn = dialogue(record)
    image = None
    field = "images" if "images" in record.values and "image" not in record.values else "image"
    if field in record.values:
        image = one_image(record, field, folders, follow_links)
    elif image_turn is not None:
        record.fail("image", "there, as its question has <image>")
    answer_type = ""
    if "answer_type" in record.values:
        answer_type = TYPES[record.choice("answer_type", TYPES)]
    return Sample(name, source, split, image, turns, modality_of(record), answer_type,
                  image_turn=image_turn or 0)  # fmt: skip


def one_image(record: Record, field: str, folders: tuple[Path, ...], follow_links: bool) -> Path:
    """A name, or a list of one, in the first of the folders that has such a file."""
    value = record.values[field]
    if isinstance(value, list):
        if len(value) > 1:
            record.fail(field, "one image: no more fit in a sample")
        record.values[field] = value[0]
    for folder in folders:
        image = record.image(field, folder, follow_links)
        if len(folders) > 1 and image.is_file():
            break
    return image


def entries(dialogues: Iterable[Sample]) -> Iterator[Entry]:
    """The caption is the answer to the question that the image comes before."""
    for s in dialogues:
        yield s, s.turns[s.image_turn][1], s.turns, single_questions(s)


def single_questions(dialogue: Sample) -> Iterator[Sample]:
    """One sample a turn; those before the image are text only."""
    for n, turn in enumerate(dialogue.turns):
        default = "closed" if turn[1].lower().rstrip(".") in ("yes", "no") else "open"
        yield replace(
            dialogue, id=f"{dialogue.id}-{n}" if n else dialogue.id, turns=(turn,), image_turn=0,
            image=dialogue.image if n >= dialogue.image_turn else None, kind="question",
            answer_type=dialogue.answer_type or default,
        )  # fmt: skip


def drop_system_turn(record: Record) -> bool:
    """Remove a first turn that is the system's; was there one?"""
    for key in KEYS:
        match record.values.get(key):
            case [{"from": "system"}, *turns]:
                record.values[key] = turns
                return True
    return False


def dialogue(record: Record) -> tuple[Turns, int | None]:
    """The turns, (question, answer) each, without <image>; which of them has it, None if none.

    Raises UserError for any other order.
    """
    key = next((k for k in KEYS if k in record.values), KEYS[0])
    turns, allowed = record.values.get(key), "a list of turns, human and gpt by turns"
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        record.fail(key, allowed)
    texts, places = [], []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != ("human", "gpt")[i % 2]:
            record.fail(key, f"{allowed} (not {shown(turn)})")
        part = Record(record.file, record.number, turn)
        text = part.text("value")
        if "<image>" in text:
            places += [i] * text.count("<image>")
            text = text.replace("<image>", "").strip() or part.fail("value", "more than <image>")
        texts.append(text)
    if len(places) > 1 or any(i % 2 for i in places):
        record.fail(key, "turns with one <image> at most, in a question: a sample has one image")
    return tuple(zip(texts[::2], texts[1::2], strict=True)), places[0] // 2 if places else None


def modality_of(record: Record) -> str | None:
    """From "modality", or from LLaVA-Med's "domain" where its flags agree on one."""
    if record.values.get("modality") is not None:
        return record.choice("modality", MODALITIES)
    domain = record.values.get("domain")
    if not isinstance(domain, dict):
        return None
    named = {DOMAINS[flag] for flag, is_set in domain.items() if is_set is True and flag in DOMAINS}
    return named.pop() if len(named) == 1 else None
