"""SLAKE, VQA-RAD and PathVQA in the forms their owners publish.

A reader yields rows: a sample with one question, and how a caption of its image begins.
"""

import pickle
import pickletools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import MODALITIES, UserError, warn_once
from data import Sample
from sources.records import Record, open_file, read_records, shown

Row = tuple[Sample, str]
SLAKE_FILES = {"train": "train.json", "val": "validate.json", "test": "test.json"}
RAD_FILE = "VQA_RAD Dataset Public.json"
RAD_FOLDERS = ("images", "VQA_RAD Image Folder")
RAD_ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
# All that lists, dictionaries, strings and numbers take. Nothing that names or calls a thing, and
# no tuples: as keys of a dictionary, 45 nested ones take 2^45 steps to hash.
PLAIN_OPCODES = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE
BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT
GET BINGET LONG_BINGET MEMOIZE
"""


def distinct_qid(seen: dict[str, int], record: Record) -> str:
    """The field qid as text. Raises UserError where an earlier record has it too."""
    qid = record.text_or_number("qid")
    if seen.setdefault(qid, record.number) != record.number:
        record.fail("qid", f"another than that of record {seen[qid]}")
    return qid


def read_slake(folder: Path, split: str, lang: str, follow_links: bool = False) -> Iterator[Row]:
    """SLAKE 1.0 (Liu et al. 2021): DIR/{train,validate,test}.json, DIR/imgs/xmlabN/source.jpg."""
    if lang == "all":
        warn_once("SLAKE splits its English and Chinese questions differently: with --lang all, "
                  "images of the test split are in training")  # fmt: skip
    seen: dict[str, int] = {}
    for record in read_records(folder / SLAKE_FILES[split]):
        if lang not in ("all", record.choice("q_lang", ("en", "zh"))):
            continue
        modality = record.choice("modality", MODALITIES)
        article = "an" if modality in ("MRI", "X-ray") else "a"
        place = record.text("location").replace("_", " ").lower()
        sample = Sample(
            distinct_qid(seen, record), "slake", split,
            record.image("img_name", folder / "imgs", follow_links),
            ((record.text("question"), record.text_or_number("answer")),), modality,
            record.choice("answer_type", ("open", "closed")), record.text("content_type").lower(),
        )  # fmt: skip
        yield sample, f"{article} {modality} of the {place}."


def read_vqa_rad(
    folder: Path, split: str, framed: bool = False, follow_links: bool = False
) -> Iterator[Row]:
    """VQA-RAD (Lau et al. 2018): one JSON file and a folder of images, all English.

    Its owners name a test split only: the rest is "train", and "val" is empty. The split is by
    question, so that nearly every test image is a training image too. framed=True adds the 1 267
    questions of the field question_frame to training: the 3 515-pair version, of which Med-MoE
    trains on 3 064.
    """
    images = next((folder / name for name in RAD_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise UserError(f"--data vqa-rad:{folder}: no folder {' or '.join(RAD_FOLDERS)} in it")
    seen: dict[str, int] = {}
    n_restated = 0
    for record in read_records(folder / RAD_FILE):
        is_test = record.text("phrase_type").startswith("test")
        organ = record.text("image_organ")
        title = f"an image of the {RAD_ORGANS.get(organ, organ.lower())}."
        qid, answer = distinct_qid(seen, record), record.text_or_number("answer")
        sample = Sample(
            qid, "vqa-rad", split, record.image("image_name", images, follow_links),
            ((record.text("question"), answer),), None,
            record.choice("answer_type", ("open", "closed")),
            record.text("question_type").split(",")[0].lower(),
        )  # fmt: skip
        if split == ("test" if is_test else "train"):
            yield sample, title
        if framed and split == "train":
            frame = record.text("question_frame")
            if frame != "NULL":
                n_restated += is_test
                yield replace(sample, id=f"{qid}-frame", turns=((frame, answer),)), title
    if n_restated:
        warn_once(f"VQA-RAD's 3 515 pairs: {n_restated} of the framed questions in training "
                  "restate questions of the test split, with their answers")  # fmt: skip


def read_pathvqa(folder: Path, split: str, follow_links: bool = False) -> Iterator[Row]:
    """PathVQA (He et al. 2020), as released or as converted for LXMERT.

    DIR/qas/SPLIT/SPLIT_qa.pkl, a pickled list of {image, question, answer}; or DIR/pvqa_SPLIT.json,
    a list of {img_id, sentf: {pvqa: [question]}, labelf: {pvqa: [{answer: score}]}}. Images are
    DIR/images/SPLIT/IMAGE.jpg. Neither form numbers its questions: they become IMAGE-0, IMAGE-1 ..
    """
    pickled, converted = folder / "qas" / split / f"{split}_qa.pkl", folder / f"pvqa_{split}.json"
    if pickled.is_file():
        values = read_pickle(pickled)
        if not isinstance(values, list):
            raise UserError(f"{pickled}: must be a list of records, is {shown(values)}")
        records = [Record(pickled, number, value) for number, value in enumerate(values)]
    elif converted.is_file():
        records = pathvqa_json(converted)
    else:
        raise UserError(f"--data pathvqa:{folder}: neither {pickled} nor {converted} is there")
    count: Counter[str] = Counter()
    images = folder / "images" / split
    for record in records:
        name, question = record.text("image"), record.text("question")
        answer = record.text_or_number("answer")
        file = Record(record.file, record.number, {"image": f"{name}.jpg"})
        path = file.image("image", images, follow_links)
        is_closed = answer.lower() in ("yes", "no")
        kind = "yes/no" if is_closed else question.split()[0].lower()
        sample = Sample(
            f"{name}-{count[name]}", "pathvqa", split, path, ((question, answer),), "pathology",
            "closed" if is_closed else "open", kind,
        )  # fmt: skip
        count[name] += 1
        yield sample, "a pathology picture."


def pathvqa_json(file: Path) -> Iterator[Record]:
    """A record of {image, question, answer} for each question."""
    for record in read_records(file):
        name = record.text("img_id")
        questions, answers = (
            part.get("pvqa") if isinstance(part := record.values.get(field), dict) else None
            for field in ("sentf", "labelf")
        )
        are_lists = isinstance(questions, list) and isinstance(answers, list)
        if not are_lists or len(questions) != len(answers):
            record.fail("sentf", 'as long a list under "pvqa" as that of "labelf"')
        for question, scores in zip(questions, answers, strict=True):
            if not (isinstance(scores, dict) and scores):
                record.fail("labelf", "a list of {answer: score}")
            best = max(scores, key=lambda a: scores[a] if isinstance(scores[a], int | float) else 0)
            values = {"image": name, "question": question, "answer": best}
            yield Record(file, record.number, values)


def read_pickle(file: Path) -> Any:
    """Lists, dictionaries, strings and numbers out of a pickle, and nothing else.

    A pickle is a program. It is read first, not run: an instruction that looks up or calls
    anything is refused by name. Raises UserError.
    """
    data, plain = open_file(file), set(PLAIN_OPCODES.split())
    try:
        for n, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in plain:
                name = f"{opcode.name} {argument[:60] if isinstance(argument, str) else ''}"
                raise UserError(f"{file}: a pickle that does more than hold data: {name}")
            if "PUT" in opcode.name and int(argument) > n:
                raise UserError(f"{file}: a broken pickle: it numbers its value {argument}")
        return pickle.loads(data, encoding="utf-8")
    except UserError:
        raise
    except Exception as error:  # a broken pickle raises anything
        raise UserError(f"{file}: not a pickle that can be read: {error}") from error
