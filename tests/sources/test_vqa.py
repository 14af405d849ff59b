"""SLAKE, VQA-RAD and PathVQA are read as their owners publish them, and pickles never executed."""

import json
import os
import pickle
import re
from collections import defaultdict
from pathlib import Path

import pytest

import config
from config import UserError
from data import Sample
from sources.load import load_samples
from sources.vqa import RAD_FOLDERS, read_pickle, read_slake, read_vqa_rad
from tests.sources.written import RAD, SLAKE, rad, save_image, slake

DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the project")


@pytest.fixture(autouse=True)
def every_warning_again():
    config.warn_once.cache_clear()


def test_slakes_rows_become_samples_and_titles_in_one_language_or_both(tmp_path, capsys):
    ct, chinese = SLAKE | {"qid": 12, "modality": "ct"}, SLAKE | {"qid": 13, "q_lang": "zh"}
    slake(tmp_path, SLAKE, ct, chinese)
    first, second = read_slake(tmp_path, "train", "en")
    turns, image = (("Is this a CT?", "Yes"),), tmp_path / "imgs" / "xmlab0" / "source.jpg"
    sample = Sample("11", "slake", "train", image, turns, "X-ray", "closed", "modality")
    assert first == (sample, "an X-ray of the brain tissue.")
    assert second[1] == "a CT of the brain tissue." and second[0].modality == "CT"
    assert [s.id for s, _ in read_slake(tmp_path, "train", "zh")] == ["13"]
    assert not capsys.readouterr().err
    assert [s.id for s, _ in read_slake(tmp_path, "train", "all")] == ["11", "12", "13"]
    assert "images of the test split are in training" in capsys.readouterr().err


@pytest.mark.parametrize("images", RAD_FOLDERS)
def test_a_vqa_rad_row_becomes_a_sample_and_its_number_a_text(tmp_path, images):
    rad(tmp_path, RAD, RAD | {"qid": 1, "image_organ": "Foot"}, images=images)
    first, second = read_vqa_rad(tmp_path, "train")
    image = tmp_path / images / "source.jpg"
    sample = Sample("0", "vqa-rad", "train", image, (("How many?", "4"),), None, "open", "pres")
    assert first == (sample, "an image of the abdomen.") and second[1] == "an image of the foot."


@pytest.mark.parametrize(("write", "row"), [(slake, SLAKE), (rad, RAD)])
def test_every_field_that_is_read_must_be_there_and_no_number_come_twice(tmp_path, write, row):
    fields = [name for name in row if name != "question_frame"]  # which 3515 alone reads
    assert len(fields) > 7
    for field in fields:
        broken = row | {"qid": 9}
        del broken[field]
        with pytest.raises(UserError, match=rf'record 1 \(from 0\): field "{field}" is missing'):
            load_samples([write(tmp_path, row, broken)], "vqa", "train")
    with pytest.raises(UserError, match=r'record 2 .* "qid" .*another than that of record 1'):
        load_samples([write(tmp_path, row, row | {"qid": 9}, row | {"qid": "9"})], "vqa", "train")


def test_missing_files_and_folders_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    for spec, named in (
        (f"slake:{tmp_path}", r"train\.json: No such file"),
        (f"vqa-rad:{tmp_path}", "Public.json: No such file"),
        (f"vqa-rad:{tmp_path}/x", "no folder images or VQA_RAD Image Folder"),
        (f"pathvqa:{tmp_path}", r"neither .*train_qa\.pkl nor .*pvqa_train\.json"),
    ):
        with pytest.raises(UserError, match=named):
            load_samples([spec], "vqa", "train")


def test_framed_questions_join_training_and_those_of_test_questions_are_counted(tmp_path, capsys):
    rows = [
        RAD | {"qid": 1, "question": "A?", "question_frame": "Framed A?"},
        RAD | {"qid": 2, "question": "B?"},
        RAD | {"qid": 3, "phrase_type": "test_para", "question": "C?", "question_frame": "F C?"},
    ]

    def questions(kind, split):
        spec = rad(tmp_path, *rows, kind=kind)
        return [(s.id, s.turns[0][0]) for s in load_samples([spec], "vqa", split)]

    assert questions("vqa-rad", "train") == [("1", "A?"), ("2", "B?")]
    assert questions("vqa-rad", "test") == questions("vqa-rad-3515", "test") == [("3", "C?")]
    assert not capsys.readouterr().err
    framed = [("1", "A?"), ("1-frame", "Framed A?"), ("2", "B?"), ("3-frame", "F C?")]
    assert questions("vqa-rad-3515", "train") == framed
    assert "1 of the framed questions in training restate" in capsys.readouterr().err


QA = [
    {"image": "t_1", "question": "What is it?", "answer": "a lesion"},
    {"image": "t_1", "question": "Is it large?", "answer": "No"},
    {"image": "t_2", "question": "How many?", "answer": 2},
]
CONVERTED = [
    {"img_id": "t_0", "sentf": {"pvqa": []}, "labelf": {"pvqa": []}},
    {"img_id": "t_1", "sentf": {"pvqa": ["What is it?", "Is it large?"]},
     "labelf": {"pvqa": [{"x": "?", "lesion": 0.3, "a lesion": 1}, {"No": 1}]}},
    {"img_id": "t_2", "sentf": {"pvqa": ["How many?"]}, "labelf": {"pvqa": [{"2": 1}]}},
]  # fmt: skip


def pathvqa(folder, values=QA, converted=None):
    for name in ("t_1", "t_2"):
        save_image(folder / "images" / "test" / f"{name}.jpg")
    if converted is None:
        (folder / "qas" / "test").mkdir(parents=True, exist_ok=True)
        (folder / "qas" / "test" / "test_qa.pkl").write_bytes(pickle.dumps(values))
    else:
        (folder / "pvqa_test.json").write_text(json.dumps(converted))
    return f"pathvqa:{folder}"


@pytest.mark.parametrize("converted", [None, CONVERTED])
def test_pathvqa_is_read_from_its_pickles_and_from_its_conversion(tmp_path, converted):
    images = [tmp_path / "images" / "test" / f"t_{i}.jpg" for i in (1, 2)]
    assert load_samples([pathvqa(tmp_path, converted=converted)], "vqa", "test") == [
        Sample(name, "pathvqa", "test", image, (turn,), "pathology", answer_type, kind)
        for name, image, turn, answer_type, kind in (
            ("t_1-0", images[0], ("What is it?", "a lesion"), "open", "what"),
            ("t_1-1", images[0], ("Is it large?", "No"), "closed", "yes/no"),
            ("t_2-0", images[1], ("How many?", "2"), "open", "how"),
        )
    ]
    (first, _) = load_samples([f"pathvqa:{tmp_path}"], "captions", "test")
    assert first.turns[0][1].startswith("a pathology picture. What is it? a lesion.")


@pytest.mark.parametrize(
    "wrong",
    [{"labelf": None}, {"labelf": {"pvqa": [{"x": 1}]}}, {"labelf": {"pvqa": [{"x": 1}, {}]}},
     {"labelf": {"pvqa": [{"x": 1}, []]}}, {"sentf": {"pvqa": "ab"}},
     {"sentf": {"pvqa": ["A?", ""]}}],
)  # fmt: skip
def test_a_conversion_whose_lists_differ_or_lack_something_is_refused(tmp_path, wrong):
    spec = pathvqa(tmp_path, converted=[CONVERTED[0], CONVERTED[1] | wrong])
    with pytest.raises(
        UserError, match=r'pvqa_test\.json: record 1 .*field "(sentf|labelf|question)"'
    ):
        load_samples([spec], "vqa", "test")


class Attack:
    def __reduce__(self):
        return os.system, ("echo owned",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_plain_data_in_every_protocol_or_is_refused(tmp_path, protocol):
    file = tmp_path / "x.pkl"
    values = [{"a": "é\ud7ff", "b": [1, -(10**30), 2.5, None, True], "c": ["x"] * 300}] * 3
    file.write_bytes(pickle.dumps(values, protocol))
    assert read_pickle(file) == values
    file.write_bytes(pickle.dumps([Attack()], protocol))
    with pytest.raises(UserError, match=rf"^{file}: [^\n]*more than hold data[^\n]*$"):
        read_pickle(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a pickle"),
        (b"cos\nsystem\n(S'true'\ntR.", "more than hold data: GLOBAL os system"),
        (b"]r\xff\xff\xff\x7f.", "numbers its value 2147483647"),  # a table of 16 GiB
        (b"]q\x02.", "numbers its value 2"),
        (b"\x80\x02]})" + b"2\x86" * 45 + b"Nsa.", "more than hold data: EMPTY_TUPLE"),  # 2^45
        (b"c" + b"A" * 5_000_000 + b"\nx\n.", "more than hold data: GLOBAL " + "A" * 60),
        (pickle.dumps({"a": 1}), 'must be a list of records, is {"a": 1}'),
        (pickle.dumps([QA[0], QA[1] | {"image": 3}]), 'record 1 (from 0): field "image" 3; must'),
        (pickle.dumps([QA[0] | {"image": "../../../x"}]), '"image" "../../../x.jpg"; must be ins'),
    ],
)
def test_a_malicious_or_broken_pickle_is_refused_in_one_line(tmp_path, data, message):
    spec, file = pathvqa(tmp_path), tmp_path / "qas" / "test" / "test_qa.pkl"
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"^{file}: [^\n]*{re.escape(message)}[^\n]{{,200}}$"):
        load_samples([spec], "vqa", "test")


@REAL
def test_the_real_data_sets_have_their_published_sizes(tmp_path):
    slake, rad = f"slake:{DATA / 'slake'}", f"vqa-rad:{DATA / 'vqa_rad'}"
    (tmp_path / "pvqa_test.json").symlink_to(DATA / "pathvqa" / "pvqa_test.json")
    (tmp_path / "images" / "test").mkdir(parents=True)
    for entry in json.loads((tmp_path / "pvqa_test.json").read_text()):
        (tmp_path / "images" / "test" / f"{entry['img_id']}.jpg").touch()  # never opened here
    for spec, split, sizes in (
        (slake, "train", (4918, 1943, 450)),  # of 4 919 one has no answer
        (slake, "val", (1053, 422, 96)), (slake, "test", (1061, 416, 96)),
        (rad, "train", (1797, 1027, 313)), (rad, "test", (451, 272, 203)),
        (rad.replace("rad:", "rad-3515:"), "train", (3064, 1823, 314)),
        (f"pathvqa:{tmp_path}", "test", (6761, 3391, 858)),
    ):  # fmt: skip
        found = load_samples([spec], "vqa", split)
        n_closed = sum(s.answer_type == "closed" for s in found)
        assert (len(found), n_closed, len({s.image for s in found})) == sizes, spec
    slakes = [s for split in ("train", "val", "test") for s in load_samples([slake], "vqa", split)]
    assert len({s.image for s in slakes}) == 642  # 450 + 96 + 96: its English splits share none


@REAL
def test_no_test_question_of_vqa_rad_is_in_training_but_one():
    spec, training = f"vqa-rad:{DATA / 'vqa_rad'}", defaultdict(str)
    for what in ("captions", "instructions"):
        for s in load_samples([spec], what, "train"):
            training[s.image] += "".join(f" {q} {a}." for q, a in s.turns)
    test = load_samples([spec], "vqa", "test")
    leaked = [s.id for s in test if f" {' '.join(s.turns[0])}." in training[s.image]]
    assert leaked == ["447"]  # its owners put it into both splits
