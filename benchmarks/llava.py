"""LLaVA's JSON, in which LLaVA-Med and Med-MoE keep everything: captions, dialogues, questions.

A list of {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from":
"gpt", "value": ...}, ...]}; evaluation files add "answer_type", router files "modality", and
LLaVA-Med's "domain". Some published files spell the key "conversatons", which is read as well.
"""

from collections.abc import Iterator
from pathlib import Path

from config import MODALITIES, UserError
from records import Record, Sample, read_records, shown

TYPES = {"open": "open", "close": "closed", "closed": "closed"}
KEYS = ("conversations", "conversatons")
# LLaVA-Med's flags of a figure (LLaVA-Med instruct_postprocess.py @b9a98a7) -> our modalities.
# Photographs of organs (gross) are pathology's as well. Flags of two modalities label nothing.
DOMAINS = {"chest_xray": "X-ray", "mri": "MRI", "ct_scan": "CT", "histology": "pathology",
           "gross": "pathology"}  # fmt: skip


def read_llava(where: Path, what: str, split: str, folder: Path | None) -> Iterator[Sample]:
    """FILE.json, which is whatever split is asked for, or DIR with {train,val,test}.json.

    what    "captions": the first answer, its question dropped; "instructions": dialogues as they
            are; "vqa": a sample for each question
    folder  of the images; None: "images" beside the file if there is one, else beside the file
    Training numbers identifiers that occur twice, as the released code numbers them all; in a
    split that is scored they are an error.
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
        elif any(is_marked(record, key) for key in KEYS):
            record.fail("image", "there, as its question has <image>")
        answer_type = ""
        if "answer_type" in record.values:
            answer_type = TYPES[record.choice("answer_type", TYPES)]
        source = f"llava/{where.stem}"
        whole = Sample(name, source, split, image, turns, modality_of(record), answer_type)
        yield from shaped(whole, what)


def shaped(s: Sample, what: str) -> Iterator[Sample]:
    """A dialogue as captions, instructions or single questions."""

    def part(name: str, turns, answer_type: str = "", kind: str = "") -> Sample:
        return Sample(name, s.source, s.split, s.image, turns, s.modality, answer_type, kind)

    if what == "captions":
        yield part(s.id, (("", s.turns[0][1]),), kind="caption")
    elif what == "instructions":
        yield part(s.id, s.turns)
    else:
        for n, (question, answer) in enumerate(s.turns):
            is_closed = answer.lower().rstrip(".") in ("yes", "no")
            answer_type = s.answer_type or ("closed" if is_closed else "open")
            yield part(f"{s.id}-{n}" if n else s.id, ((question, answer),), answer_type, "question")


def dialogue(record: Record) -> tuple[tuple[str, str], ...]:
    """The turns, (question, answer) each, without <image>. Raises UserError for any other order."""
    key = next((k for k in KEYS if k in record.values), KEYS[0])
    said = record.values.get(key)
    if not isinstance(said, list) or not said or len(said) % 2:
        record.fail(key, "a list of turns, human and gpt by turns")
    texts = []
    for turn, who in zip(said, ("human", "gpt") * (len(said) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != who:
            record.fail(key, f"a list of turns, human and gpt by turns (not {shown(turn)})")
        part = Record(record.file, record.number, turn)
        texts.append(part.text("value").replace("<image>", "").strip())
        if not texts[-1]:
            part.fail("value", "more than <image>")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def is_marked(record: Record, key: str) -> bool:
    return "<image>" in str(record.values.get(key))


def modality_of(record: Record) -> str | None:
    """From "modality", or from LLaVA-Med's "domain" where its flags agree on one."""
    if record.values.get("modality") is not None:
        return record.choice("modality", MODALITIES)
    domain = record.values.get("domain")
    if not isinstance(domain, dict):
        return None
    named = {DOMAINS[flag] for flag, is_set in domain.items() if is_set is True and flag in DOMAINS}
    return named.pop() if len(named) == 1 else None
