"""PathVQA, framed VQA-RAD, LLaVA's JSON and MedMNIST as samples."""

import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from config import UserError
from data import Packed
from sources.load import load_samples
from sources.vqa import RAD_FILE, read_pickle

DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the project")


@pytest.fixture(autouse=True)
def every_warning_again():
    config.warn_once.cache_clear()


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


# ---- PathVQA

QA = [
    {"image": "test_0001", "question": "What is it?", "answer": "a lesion"},
    {"image": "test_0001", "question": "Is it large?", "answer": "No"},
    {"image": "test_0002", "question": "How many?", "answer": 2},
]
CONVERTED = [
    {"img_id": "test_0000", "sentf": {"pvqa": []}, "labelf": {"pvqa": []}},
    {"img_id": "test_0001", "sentf": {"pvqa": ["What is it?", "Is it large?"]},
     "labelf": {"pvqa": [{"lesion": 0.3, "a lesion": 1}, {"No": 1}]}},
    {"img_id": "test_0002", "sentf": {"pvqa": ["How many?"]}, "labelf": {"pvqa": [{"2": 1}]}},
]  # fmt: skip


def pathvqa(folder, values=QA, converted=None):
    for name in ("test_0001", "test_0002"):
        save_image(folder / "images" / "test" / f"{name}.jpg")
    if converted is None:
        (folder / "qas" / "test").mkdir(parents=True, exist_ok=True)
        (folder / "qas" / "test" / "test_qa.pkl").write_bytes(pickle.dumps(values))
    else:
        (folder / "pvqa_test.json").write_text(json.dumps(converted))
    return f"pathvqa:{folder}"


@pytest.mark.parametrize("converted", [None, CONVERTED])
def test_pathvqa_is_read_from_its_pickles_and_from_its_conversion(tmp_path, converted):
    samples = load_samples([pathvqa(tmp_path, converted=converted)], "vqa", "test")
    assert [(s.id, s.turns[0], s.answer_type, s.kind) for s in samples] == [
        ("test_0001-0", ("What is it?", "a lesion"), "open", "what"),
        ("test_0001-1", ("Is it large?", "No"), "closed", "yes/no"),
        ("test_0002-0", ("How many?", "2"), "open", "how"),
    ]
    assert samples[2].image == (tmp_path / "images" / "test" / "test_0002.jpg").resolve()
    assert {s.modality for s in samples} == {"pathology"}


class Attack:
    def __reduce__(self):
        return os.system, ("echo owned",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_plain_data_in_every_protocol_or_is_refused(tmp_path, protocol):
    file = tmp_path / "x.pkl"
    values = [{"a": "é\ud7ff", "b": [1, -(10**30), 2.5, None, True], "c": ["x"] * 5}] * 3
    file.write_bytes(pickle.dumps(values, protocol))
    assert read_pickle(file) == values
    values[0]["itself"] = values  # a list within itself is a list
    file.write_bytes(pickle.dumps(values, protocol))
    assert len(read_pickle(file)) == 3
    file.write_bytes(pickle.dumps([Attack()], protocol))
    with pytest.raises(
        UserError, match=f"{file}: a pickle that does more than hold data"
    ) as refused:
        read_pickle(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a pickle"),
        (b"hello", "more than hold data: OBJ"),
        (pickle.dumps(list(range(100)))[:-20], "not a pickle"),
        (b"cos\nsystem\n(S'true'\ntR.", "GLOBAL os system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL"),
        (b"]r\xff\xff\xff\x7f.", "numbers its value 2147483647"),  # a table of 16 GiB
        (b"\x80\x04\x8e" + (10**15).to_bytes(8, "little") + b"x.", "not a pickle"),
        (pickle.dumps({"a": np.float64(1)}), "more than hold data"),
        (pickle.dumps({"a": {1, 2}}), "more than hold data: EMPTY_SET"),
        (b"\x80\x02]})" + b"2\x86" * 45 + b"Nsa.", "more than hold data: EMPTY_TUPLE"),  # 2^45
        (b"c" + b"A" * 5_000_000 + b"\nx\n.", "more than hold data: GLOBAL AAAA"),
    ],
)
def test_a_malicious_or_broken_pickle_is_refused_in_one_line(tmp_path, data, message):
    spec = pathvqa(tmp_path)
    file = tmp_path / "qas" / "test" / "test_qa.pkl"
    file.write_bytes(data)
    with pytest.raises(UserError) as refused:
        load_samples([spec], "vqa", "test")
    assert str(refused.value).startswith(f"{file}: ") and message in str(refused.value)


def doubling():
    """A list that is short in memory and has 2^40 leaves."""
    values = ["x"]
    for _ in range(40):
        values = [values, values]
    return [values]


def within_itself():
    values = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": 1}, 'must be a list of records, is {"a": 1}'),
        (["x"], 'record 0 (from 0) is not an object: "x"'),
        ([within_itself()], "record 0 (from 0) is not an object: a list"),
        ([QA[0], {**QA[1], "image": 3}], 'record 1 (from 0): field "image" 3; must be a text'),
        ([{**QA[0], "answer": float("nan")}], '"answer" NaN; must be a text or a finite number'),
        ([{**QA[0], "image": "../../../x"}], '"image" "../../../x.jpg"; must be inside'),
        ([{**QA[0], "image": "a\0b"}], '"image" "a\\u0000b.jpg"; must be a usable file name'),
        ([{**QA[0], "image": "a" * 5000}], "must be a usable file name"),
        ([{**QA[0], "answer": 10**5000}], "must be a text or a number of fewer digits"),
        (doubling(), "record 0 (from 0) is not an object: [["),
        ({"a": doubling()}, 'must be a list of records, is {"a": [['),
        ([{"image": "test_0001"}], '"question" is missing'),
    ],
)
def test_a_wrong_record_in_a_pickle_is_refused_with_its_place(tmp_path, values, message):
    with pytest.raises(UserError) as refused:
        load_samples([pathvqa(tmp_path, values)], "vqa", "test")
    assert message in str(refused.value) and "test_qa.pkl" in str(refused.value)


def test_a_conversion_whose_lists_differ_is_refused(tmp_path):
    for wrong in ({"pvqa": [{"x": 1}]}, {}, None, {"pvqa": [[], {}]}):
        spec = pathvqa(tmp_path, converted=[CONVERTED[1] | {"labelf": wrong}])
        with pytest.raises(UserError, match=r"pvqa_test\.json: record 0 .*(sentf|labelf)"):
            load_samples([spec], "vqa", "test")
    with pytest.raises(UserError, match=r"neither .*val_qa\.pkl nor .*pvqa_val\.json"):
        load_samples([spec], "vqa", "val")


def test_an_image_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    spec = pathvqa(tmp_path)
    outside = save_image(tmp_path / "outside.jpg")
    link = tmp_path / "images" / "test" / "test_0002.jpg"
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(UserError, match=r'"image" "test_0002\.jpg"; must be inside'):
        load_samples([spec], "vqa", "test")


@REAL
def test_pathvqa_has_its_published_sizes(tmp_path):
    for split, n, closed in (
        ("train", 19_755, 9_806),
        ("val", 6_279, 3_135),
        ("test", 6_761, 3_391),
    ):
        file = f"pvqa_{split}.json"
        shutil.copy(DATA / "pathvqa" / file, tmp_path)
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for entry in json.loads((tmp_path / file).read_text()):
            (folder / f"{entry['img_id']}.jpg").touch()  # never opened here
        samples = load_samples([f"pathvqa:{tmp_path}"], "vqa", split)
        assert len(samples) == n and len({s.id for s in samples}) == n
        assert sum(s.answer_type == "closed" for s in samples) == closed
    with pytest.raises(UserError, match=r"\d+ of \d+ images are missing: test/test_0"):
        shutil.rmtree(folder)
        load_samples([f"pathvqa:{tmp_path}"], "vqa", "test")


# ---- VQA-RAD with framed questions

RAD = {"image_name": "x.jpg", "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED ",
       "image_organ": "HEAD", "question_frame": "NULL"}  # fmt: skip


def test_framed_questions_join_training_and_those_of_test_questions_are_counted(tmp_path, capsys):
    rows = [
        RAD
        | {"qid": 1, "phrase_type": "freeform", "question": "A?", "question_frame": "Framed A?"},
        RAD | {"qid": 2, "phrase_type": "para", "question": "B?"},
        RAD
        | {"qid": 3, "phrase_type": "test_freeform", "question": "C?", "question_frame": "F C?"},
    ]
    save_image(tmp_path / "images" / "x.jpg")
    (tmp_path / RAD_FILE).write_text(json.dumps(rows))
    questions = {
        (kind, split): [(s.id, s.turns[0][0]) for s in load_samples([spec], "vqa", split)]
        for kind in ("vqa-rad", "vqa-rad-3515")
        for split in ("train", "test")
        for spec in [f"{kind}:{tmp_path}"]
    }
    assert questions["vqa-rad", "train"] == [("1", "A?"), ("2", "B?")]
    framed = [("1", "A?"), ("1-frame", "Framed A?"), ("2", "B?"), ("3-frame", "F C?")]
    assert questions["vqa-rad-3515", "train"] == framed
    assert questions["vqa-rad", "test"] == questions["vqa-rad-3515", "test"] == [("3", "C?")]
    assert "1 of the framed questions in training restate" in capsys.readouterr().err


@REAL
def test_vqa_rad_has_3515_pairs_of_which_284_in_training_restate_test_questions(capsys):
    spec = f"vqa-rad-3515:{DATA / 'vqa_rad'}"
    train, test = (load_samples([spec], "vqa", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3_064, 451)
    assert "284 of the framed questions in training restate" in capsys.readouterr().err
    assert Counter(s.answer_type for s in test) == {"closed": 272, "open": 179}


# ---- LLaVA's JSON


def item(name="1", question="<image>\nWhat is it?", answer="A lung.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": "x.jpg", "conversations": turns} | more


def llava(folder, *items, file="test.json"):
    save_image(folder / "images" / "x.jpg")
    (folder / file).write_text(json.dumps(list(items)))
    return f"llava:{folder / file}"


def test_llava_items_become_captions_dialogues_and_questions(tmp_path):
    more = [{"from": "human", "value": "Is it large?"}, {"from": "gpt", "value": "Yes."}]
    long = item("long", question="What is it?\n<image>")
    long["conversations"] += more
    misspelt = item(2, answer="left", answer_type="CLOSED", modality="x-ray")
    misspelt["conversatons"] = misspelt.pop("conversations")
    spec = llava(tmp_path, long, misspelt)
    captions, dialogues, questions = (
        load_samples([spec], what, "train") for what in ("captions", "instructions", "vqa")
    )
    assert [s.turns for s in captions] == [(("", "A lung."),), (("", "left"),)]
    assert dialogues[0].turns == (("What is it?", "A lung."), ("Is it large?", "Yes."))
    assert [(s.id, s.answer_type) for s in questions] == [
        ("long", "open"), ("long-1", "closed"), ("2", "closed")]  # fmt: skip
    assert questions[2].modality == "X-ray" and questions[0].modality is None
    assert {s.image for s in questions} == {(tmp_path / "images" / "x.jpg").resolve()}
    assert {s.source for s in questions} == {"llava/test"}


@pytest.mark.parametrize(
    ("domain", "modality"),
    [
        ({"chest_xray": True, "mri": False, "ct_scan": False}, "X-ray"),
        ({"mri": True}, "MRI"),
        ({"ct_scan": True, "gross": False}, "CT"),
        ({"histology": True, "gross": True}, "pathology"),
        ({"mri": True, "ct_scan": True}, None),
        ({"chest_xray": False}, None),
        ({"mri": "yes"}, None),
        ("mri", None),
    ],
)
def test_llava_meds_domain_flags_label_an_image_where_they_agree(tmp_path, domain, modality):
    spec = llava(tmp_path, item(domain=domain))
    (sample,) = load_samples([spec], "captions", "train")
    assert sample.modality == modality


def test_a_llava_folder_has_splits_and_images_may_lie_elsewhere(tmp_path):
    for split in ("train", "test"):
        llava(tmp_path, item(question=split), file=f"{split}.json")
    for split in ("train", "test"):
        (sample,) = load_samples([f"llava:{tmp_path}"], "vqa", split)
        assert sample.turns[0][0] == split
    other = save_image(tmp_path / "other" / "x.jpg")
    folder = str(other.parent)
    (sample,) = load_samples([f"llava:{tmp_path}"], "vqa", "test", image_folder=folder)
    assert sample.image == other.resolve()
    with pytest.raises(UserError, match=r"--image-folder .*nowhere: no such folder"):
        load_samples([f"llava:{tmp_path}"], "vqa", "test", image_folder=str(tmp_path / "nowhere"))


def test_text_without_an_image_is_text_only(tmp_path):
    text = item(question="What is CT?")
    del text["image"]
    (sample,) = load_samples([llava(tmp_path, text)], "vqa", "test")
    assert sample.image is None


def test_an_id_that_occurs_twice_is_numbered_in_training_and_refused_in_a_test(tmp_path):
    spec = llava(tmp_path, item(), item())
    assert [s.id for s in load_samples([spec], "vqa", "train")] == ["1", "1#1"]
    with pytest.raises(UserError, match=r'record 1 .* "id" "1"; must be another than that of rec'):
        load_samples([spec], "vqa", "test")


HUMAN, GPT = {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "a list of turns"),
        ({"conversations": [HUMAN]}, "a list of turns"),
        ({"conversations": [GPT, HUMAN]}, "human and gpt by turns (not "),
        ({"conversations": [HUMAN, "x"]}, 'human and gpt by turns (not "x")'),
        ({"conversations": [HUMAN, GPT | {"value": " "}]}, '"value" " "; must be a text that is'),
        ({"conversations": [HUMAN, GPT | {"value": "<image>"}]}, "must be more than <image>"),
        ({"conversations": None}, "a list of turns"),
        ({"image": ["x.jpg", "y.jpg"]}, '"image" ["x.jpg", "y.jpg"]; must be a text'),
        ({"image": "../test.json"}, "must be inside"),
        ({"image": "y.jpg"}, "1 of 1 images are missing: images/y.jpg"),
        ({"answer_type": "maybe"}, "must be one of open, close, closed"),
        ({"modality": "PET"}, "must be one of CT, MRI"),
    ],
)
def test_what_is_wrong_with_a_llava_item_is_reported(tmp_path, change, message):
    with pytest.raises(UserError) as refused:
        load_samples([llava(tmp_path, item() | change)], "vqa", "test")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_question_with_an_image_mark_needs_an_image(tmp_path):
    unmarked = item()
    del unmarked["image"]
    with pytest.raises(UserError, match='"image" is missing; must be there, as its question has'):
        load_samples([llava(tmp_path, unmarked)], "vqa", "test")


# ---- MedMNIST


def npz(folder, name, labels, shape=(28, 28)):
    labels = np.asarray(labels, np.uint8).reshape(len(labels), -1)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, *[1] * len(shape))
    images = np.broadcast_to(images, (len(labels), *shape))
    parts = {f"{s}_{k}": v for s in ("train", "val", "test")
             for k, v in (("images", images), ("labels", labels))}  # fmt: skip
    np.savez_compressed(folder / f"{name}.npz", **parts)
    return f"medmnist:{folder / name}.npz", folder / f"{name}.npz"


def test_classes_become_the_answers_of_one_question(tmp_path):
    spec, file = npz(tmp_path, "pneumoniamnist", [0, 1, 1])
    samples = load_samples([spec], "vqa", "test")
    question = "Which of these does the image show: normal, pneumonia?"
    assert [s.turns for s in samples] == [((question, a),) for a in ("normal", *["pneumonia"] * 2)]
    assert {s.options for s in samples} == {("normal", "pneumonia")}
    assert [s.image for s in samples] == [Packed(file, "test", i) for i in range(3)]
    assert [s.id for s in samples] == ["test-0", "test-1", "test-2"]
    assert samples[0].modality == "X-ray" and samples[0].answer_type == "closed"
    captions = load_samples([spec], "captions", "train")
    assert [s.turns[0][1] for s in captions] == ["an X-ray: normal."] + 2 * ["an X-ray: pneumonia."]


def test_several_labels_become_a_yes_or_no_each(tmp_path):
    labels = np.zeros((2, 14), int)
    labels[1, [0, 13]] = 1
    spec, _ = npz(tmp_path, "chestmnist_64", labels, (64, 64))
    samples = load_samples([spec], "vqa", "val")
    assert len(samples) == 28 and {s.options for s in samples} == {("no", "yes")}
    answers = [s.turns[0][1] for s in samples]
    assert answers == ["no"] * 14 + ["yes"] + ["no"] * 12 + ["yes"]
    assert samples[14].turns[0][0] == f"Does the image show {samples[14].kind}?"
    assert samples[14].id == f"val-1-{samples[14].kind}"
    dialogues = load_samples([spec], "instructions", "val")
    assert [len(s.turns) for s in dialogues] == [14, 14]
    captions = [s.turns[0][1] for s in load_samples([spec], "captions", "val")]
    assert captions[0] == "an X-ray: nothing." and samples[14].kind in captions[1]


@REAL
def test_pneumoniamnist_has_its_published_sizes():
    spec = f"medmnist:{DATA / 'pneumoniamnist' / 'pneumoniamnist_rebuilt.npz'}"
    for split, n in (("train", 4_708), ("val", 524), ("test", 624)):
        assert len(load_samples([spec], "vqa", split)) == n


@pytest.mark.parametrize("what", ["captions", "instructions", "vqa"])
def test_sources_of_several_kinds_are_read_together(tmp_path, what):
    first, _ = npz(tmp_path, "pneumoniamnist", [0, 1])
    second, _ = npz(tmp_path, "organcmnist", [3, 10])
    third = llava(tmp_path, item())
    samples = load_samples([first, second, third, "phantoms:8"], what, "test")
    names = list(dict.fromkeys(s.source for s in samples))
    assert names == ["pneumoniamnist", "organcmnist", "llava/test", "phantoms"]
    with pytest.raises(UserError, match="pneumoniamnist is already named"):
        load_samples([first, first], what, "test")
