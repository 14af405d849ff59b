"""SLAKE, VQA-RAD and PathVQA in the forms in which they are found.

A reader yields rows: a sample with one question, and how a caption of its image begins.
"""

import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from config import MODALITIES, UserError, warn_once
from data import Sample
from sources import packed
from sources.records import Record, distinct, open_file, read_records, shown
from sources.tables import TITLES, read_rows, row_image, row_sample

Row = tuple[Sample, str]
RAD_FILE = "VQA_RAD Dataset Public.json"
RAD_FOLDERS = ("images", "VQA_RAD Image Folder")
RAD_ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
# A split's name in a file's name.
WORDS = {"train": ("train",), "val": ("validate", "validation", "val"), "test": ("test",)}


class Layout(NamedTuple):
    """One form in which a data set is found. SPLIT stands for one of WORDS."""

    questions: str  # files, as a pattern
    images: tuple[str, ...] = (".",)  # folders, also in a zip; the first that is there is read


SHARDS = (Layout("data/SPLIT-*.parquet"), Layout("SPLIT-*.parquet"))  # the Hugging Face hub's
RAD = (Layout(RAD_FILE, RAD_FOLDERS), Layout("SPLITset.json", RAD_FOLDERS))
PATHVQA_IMAGES = ("images/SPLIT",)
LAYOUTS = {
    "slake": (Layout("SPLIT.json", ("imgs/imgs", "imgs", "imgs.zip/imgs", "imgs.zip")),),
    "vqa-rad": (*RAD, *SHARDS),
    "vqa-rad-3515": RAD,
    "pathvqa": (Layout("qas/SPLIT/SPLIT_qa.pkl", PATHVQA_IMAGES),
                Layout("pvqa_SPLIT.json", PATHVQA_IMAGES), *SHARDS),
}  # fmt: skip
# All that lists, dictionaries, strings and numbers take. Nothing that names or calls a thing, and
# no tuples: as keys of a dictionary, 45 nested ones take 2^45 steps to hash.
PLAIN_OPCODES = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE
BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT
GET BINGET LONG_BINGET MEMOIZE
"""


def files_of(folder: Path, layout: Layout, split: str) -> list[Path]:
    """The files of a split, in the first of its names that has any."""
    patterns = (layout.questions.replace("SPLIT", word) for word in WORDS[split])
    found = (sorted(folder.glob(pattern)) for pattern in patterns)
    return next(filter(None, found), [])


def find(kind: str, folder: Path, split: str) -> tuple[list[Path], Path]:
    """The files with a split's questions, and the folder of their images. Raises UserError.

    A data set without this split, as vqa-rad has no "val", gives no file.
    """
    where = f"--data {kind}:{folder}"
    for layout in LAYOUTS[kind]:
        if any(files_of(folder, layout, s) for s in WORDS):
            images = [folder / name.replace("SPLIT", split) for name in layout.images]
            there = next(filter(packed.is_folder, images), None)
            files = files_of(folder, layout, split)
            if there is None and files:
                for name in images:
                    if name.suffix == ".zip" and name.is_file():
                        packed.open_zip(name)  # raises: it is damaged
                raise UserError(f"{where}: no folder {' or '.join(layout.images)} in it")
            return files, there or folder
    forms = " or ".join(layout.questions for layout in LAYOUTS[kind])
    others = [k for k in LAYOUTS if any(files_of(folder, la, "train") for la in LAYOUTS[k])]
    hint = f"; it looks like {others[0]}:{folder}" if others else ""
    raise UserError(f"{where}: no {forms} in it, where SPLIT is train, val or test{hint}")


def shard_rows(files: list[Path], source: str, split: str, modality: str | None) -> Iterator[Row]:
    """The rows of parquet files, numbered through, since they have no identifiers."""
    there = re.search(r"-of-(\d+)", files[0].name)
    if there and int(there[1]) != len(files):
        raise UserError(f"{files[0]}: {len(files)} of {int(there[1])} files of this split are here")
    records = (record for file in files for record in read_rows(file))
    for number, record in enumerate(records):
        image, kind = row_image(record, record.file.parent, False), kind_of(record)
        sample = row_sample(record, str(number), source, split, image, modality, kind)
        yield sample, f"{TITLES[modality]}."


def kind_of(record: Record) -> str:
    """PathVQA's kinds of question, for reports."""
    if record.text_or_number("answer").lower() in ("yes", "no"):
        return "yes/no"
    return record.text("question").split()[0].lower()


def read_slake(folder: Path, split: str, lang: str, follow_links: bool = False) -> Iterator[Row]:
    """SLAKE 1.0 (Liu et al. 2021): DIR/{train,validate,test}.json, DIR/imgs/xmlabN/source.jpg.

    On the Hugging Face hub with validation.json and imgs.zip.
    """
    if lang == "all":
        warn_once("SLAKE splits its English and Chinese questions differently: with --lang all, "
                  "images of the test split are in training")  # fmt: skip
    seen: dict[str, int] = {}
    files, images = find("slake", folder, split)
    for record in read_records(files[0]) if files else ():
        if lang not in ("all", record.choice("q_lang", ("en", "zh"))):
            continue
        modality = record.choice("modality", MODALITIES)
        place = record.text("location").replace("_", " ").lower()
        sample = Sample(
            distinct(seen, record, "qid"), "slake", split,
            record.image("img_name", images, follow_links),
            ((record.text("question"), record.text_or_number("answer")),), modality,
            record.choice("answer_type", ("open", "closed")), record.text("content_type").lower(),
        )  # fmt: skip
        yield sample, f"{TITLES[modality]} of the {place}."


def read_vqa_rad(
    folder: Path, split: str, framed: bool = False, follow_links: bool = False
) -> Iterator[Row]:
    """VQA-RAD (Lau et al. 2018): one JSON file and a folder of images, all English.

    Its owners name a test split only: the rest is "train", and "val" is empty. The split is by
    question, so that nearly every test image is a training image too. framed=True adds the 1 267
    questions of the field question_frame to training: the 3 515-pair version, of which Med-MoE
    trains on 3 064. trainset.json and testset.json (data_RAD) hold that version, already split.
    """
    files, images = find("vqa-rad-3515" if framed else "vqa-rad", folder, split)
    if files and files[0].suffix == ".parquet":
        yield from shard_rows(files, "vqa-rad", split, None)
        return
    is_public = files[:1] == [folder / RAD_FILE]
    if files and not is_public:
        warn_once(f"{files[0].parent}: trainset.json holds framed questions too, as "
                  "vqa-rad-3515 has them")  # fmt: skip
    seen: dict[str, int] = {}
    n_restated = 0
    for record in read_records(files[0]) if files else ():
        is_test = record.text("phrase_type").startswith("test")
        organ = record.text("image_organ")
        title = f"an image of the {RAD_ORGANS.get(organ, organ.lower())}."
        qid, answer = distinct(seen, record, "qid"), record.text_or_number("answer")
        sample = Sample(
            qid, "vqa-rad", split, record.image("image_name", images, follow_links),
            ((record.text("question"), answer),), None,
            record.choice("answer_type", ("open", "closed")),
            record.text("question_type").split(",")[0].lower(),
        )  # fmt: skip
        if not is_public or split == ("test" if is_test else "train"):
            yield sample, title
        if is_public and framed and split == "train":
            frame = record.text("question_frame")
            if frame != "NULL":
                n_restated += is_test
                yield replace(sample, id=f"{qid}-frame", turns=((frame, answer),)), title
    if n_restated:
        warn_once(f"VQA-RAD's 3 515 pairs: {n_restated} of the framed questions in training "
                  "restate questions of the test split, with their answers")  # fmt: skip


def read_pathvqa(folder: Path, split: str, follow_links: bool = False) -> Iterator[Row]:
    """PathVQA (He et al. 2020), as released, as converted for LXMERT, or as on the hub.

    DIR/qas/SPLIT/SPLIT_qa.pkl, a pickled list of {image, question, answer}; or DIR/pvqa_SPLIT.json,
    a list of {img_id, sentf: {pvqa: [question]}, labelf: {pvqa: [{answer: score}]}}. Images are
    DIR/images/SPLIT/IMAGE.jpg. Neither form numbers its questions: they become IMAGE-0, IMAGE-1 ..
    """
    files, images = find("pathvqa", folder, split)
    if files and files[0].suffix == ".parquet":
        yield from shard_rows(files, "pathvqa", split, "pathology")
        return
    count: Counter[str] = Counter()
    read = pathvqa_pickle if files and files[0].suffix == ".pkl" else pathvqa_json
    for record in read(files[0]) if files else ():
        name = record.text("image")
        file = Record(record.file, record.number, {"image": f"{name}.jpg"})
        path = file.image("image", images, follow_links)
        number, kind = f"{name}-{count[name]}", kind_of(record)
        sample = row_sample(record, number, "pathvqa", split, path, "pathology", kind)
        yield sample, f"{TITLES['pathology']}."
        count[name] += 1


def pathvqa_pickle(file: Path) -> list[Record]:
    values = read_pickle(file)
    if not isinstance(values, list):
        raise UserError(f"{file}: must be a list of records, is {shown(values)}")
    return [Record(file, number, value) for number, value in enumerate(values)]


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
