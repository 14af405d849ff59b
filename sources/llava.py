"""LLaVA's JSON, in which LLaVA-Med and Med-MoE keep everything: captions, dialogues, questions.

A list of {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from":
"gpt", "value": ...}, ...]}; evaluation files add "answer_type", router files "modality", and
LLaVA-Med's "domain". Some published files spell the key "conversatons", which is read as well.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from config import MODALITIES, UserError
from data import Sample, Turns
from sources.records import Entry, Record, read_records, shown

TYPES = {"open": "open", "close": "closed", "closed": "closed"}
KEYS = ("conversations", "conversatons")
# LLaVA-Med's flags of a figure (LLaVA-Med instruct_postprocess.py @b9a98a7) -> our modalities.
# Photographs of organs (gross) are pathology's as well. Flags of two modalities label nothing.
DOMAINS = {"chest_xray": "X-ray", "mri": "MRI", "ct_scan": "CT", "histology": "pathology",
           "gross": "pathology"}  # fmt: skip


def read_llava(where: Path, split: str, folder: Path | None) -> Iterator[Entry]:
    """FILE.json, which serves as any split, or DIR with {train,val,test}.json.

    folder  of the images; None: "images" beside the file if there is one, else beside the file
    The caption is the first answer. An identifier that occurs twice gets a number in training,
    where the released code numbers all of them; in val and test it is an error.
    """
    file = where / f"{split}.json" if where.is_dir() else where
    if folder is None:
        folder = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    elif not folder.is_dir():
        raise UserError(f"--image-folder {folder}: no such folder")
    seen: dict[str, int] = {}
    for record in read_records(file):
        name = record.text_or_number("id") if "id" in record.values else str(record.number)
        if seen.setdefault(name, record.number) != record.number:
            if split != "train":
                record.fail("id", f"another than that of record {seen[name]}")
            name = f"{name}#{record.number}"
        turns = dialogue(record)
        image = None
        if "image" in record.values:
            image = record.image("image", folder)
        elif any("<image>" in str(record.values.get(key)) for key in KEYS):
            record.fail("image", "there, as its question has <image>")
        answer_type = ""
        if "answer_type" in record.values:
            answer_type = TYPES[record.choice("answer_type", TYPES)]
        base = Sample(name, f"llava/{where.stem}", split, image, (), modality_of(record))
        yield base, turns[0][1], turns, single_questions(base, turns, answer_type)


def single_questions(base: Sample, turns: Turns, answer_type: str) -> Iterator[Sample]:
    for n, turn in enumerate(turns):
        default = "closed" if turn[1].lower().rstrip(".") in ("yes", "no") else "open"
        base = replace(base, answer_type=answer_type or default, kind="question")
        yield replace(base, id=f"{base.id}-{n}" if n else base.id, turns=(turn,))


def dialogue(record: Record) -> Turns:
    """The turns, (question, answer) each, without <image>. Raises UserError for any other order."""
    key = next((k for k in KEYS if k in record.values), KEYS[0])
    turns, allowed = record.values.get(key), "a list of turns, human and gpt by turns"
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        record.fail(key, allowed)
    texts = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != ("human", "gpt")[i % 2]:
            record.fail(key, f"{allowed} (not {shown(turn)})")
        part = Record(record.file, record.number, turn)
        texts.append(part.text("value").replace("<image>", "").strip())
        if not texts[-1]:
            part.fail("value", "more than <image>")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def modality_of(record: Record) -> str | None:
    """From "modality", or from LLaVA-Med's "domain" where its flags agree on one."""
    if record.values.get("modality") is not None:
        return record.choice("modality", MODALITIES)
    domain = record.values.get("domain")
    if not isinstance(domain, dict):
        return None
    named = {DOMAINS[flag] for flag, is_set in domain.items() if is_set is True and flag in DOMAINS}
    return named.pop() if len(named) == 1 else None
