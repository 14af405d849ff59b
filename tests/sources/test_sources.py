"""Each source gives the samples its owners published, and a bad file is refused in one line.

python -m pytest tests/sources/test_sources.py
"""

import json
from pathlib import Path

import pytest
from PIL import Image

import config
from config import UserError
from data import Sample
from sources import load, phantoms, vqa
from sources.load import load_samples

REAL = Path(__file__).parents[3] / "shared" / "data"
SLAKE, RAD = REAL / "slake", REAL / "vqa_rad"
needs_slake = pytest.mark.skipif(not SLAKE.is_dir(), reason=f"no SLAKE in {SLAKE}")
needs_rad = pytest.mark.skipif(not RAD.is_dir(), reason=f"no VQA-RAD in {RAD}")


def test_phantoms_give_captions_dialogues_and_questions():
    captions, dialogues, vqa = (
        load_samples(["phantoms:20"], what, "train") for what in ("captions", "instructions", "vqa")
    )
    assert [s.image for s in captions] == [s.image for s in dialogues] == list(range(20))
    phantom = phantoms.draw(3)
    questions = {(q.question, q.answer): q for q in phantoms.questions(phantom)}
    assert captions[3].turns == (("", phantoms.caption(phantom)),)
    assert captions[3].modality == phantom.modality
    assert len(dialogues[3].turns) == 4 and set(dialogues[3].turns) <= set(questions)
    of_3 = [s for s in vqa if s.image == 3]
    assert [s.turns[0] for s in of_3] == list(questions)
    assert [(s.answer_type, s.kind) for s in of_3] == [
        (q.answer_type, q.kind) for q in questions.values()
    ]
    for samples in (captions, dialogues, vqa):
        assert len({s.id for s in samples}) == len(samples)


def test_phantom_splits_share_no_image_and_have_their_sizes():
    seeds = {s: {x.image for x in load_samples(["phantoms:30"], "vqa", s)} for s in phantoms.SPLITS}
    sizes = {split: len(images) for split, images in seeds.items()}
    assert sizes == {"train": 30, "val": load.N_VAL, "test": load.N_TEST}
    assert len(set.union(*seeds.values())) == sum(map(len, seeds.values()))


def test_phantoms_from_another_seed_on_are_other_images_in_every_split():
    for split in phantoms.SPLITS:
        plain, later = (
            [s.image for s in load_samples([spec], "captions", split)]
            for spec in ("phantoms:30", "phantoms:30+700")
        )
        assert later == [seed + 700 for seed in plain]


@pytest.mark.parametrize(
    "spec,reason",
    [
        ("phantom", "not one of phantoms[:N], slake:DIR, vqa-rad:DIR"),
        ("slake", "not one of phantoms[:N], slake:DIR, vqa-rad:DIR"),
        ("slake:", "not one of phantoms"),
        ("phantoms:0", "N from 1"),
        ("phantoms:many", "N from 1"),
        ("phantoms:-3", "N from 1"),
        ("phantoms:9999999", "N from 1 to 1000000"),
        ("phantoms:4+", "FIRST up to 900000000"),
        ("phantoms:4/3", "1, 2, 4 or 8 domains"),
        ("phantoms:4/", "1, 2, 4 or 8 domains"),
        ("phantoms:4+1000000000", "FIRST up to 900000000"),
    ],
)
def test_a_bad_source_is_refused_by_name(spec, reason):
    with pytest.raises(UserError) as refused:
        load_samples([spec], "vqa", "train")
    assert spec in str(refused.value) and reason in str(refused.value)


def test_a_source_named_twice_is_refused():
    with pytest.raises(UserError, match="--data phantoms:5: phantoms is already named"):
        load_samples(["phantoms:4", "phantoms:5"], "vqa", "train")


# SLAKE and VQA-RAD as small copies, with one thing wrong at a time
SLAKE_ROW = {
    "img_name": "xmlab0/source.jpg",
    "question": "Is this a CT?",
    "answer": "Yes",
    "q_lang": "en",
    "location": "Brain_Tissue",
    "modality": "X-Ray",
    "answer_type": "CLOSED ",
    "content_type": "Modality",
    "qid": 11,
}
RAD_ROW = {
    "image_name": "source.jpg",
    "phrase_type": "freeform",
    "question_type": "PRES, POS",
    "question": " How many? ",
    "answer": 4,
    "answer_type": "OPEN",
    "image_organ": "ABD",
    "qid": "0",
}
DELETED = object()


def changed(row, **fields):
    return {k: v for k, v in {**row, **fields}.items() if v is not DELETED}


def slake(folder, *rows, file="train.json"):
    """Write a SLAKE of one image; -> its spec."""
    (folder / "imgs" / "xmlab0").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "imgs" / "xmlab0" / "source.jpg")
    (folder / file).write_text(json.dumps(list(rows)))
    return f"slake:{folder}"


def rad(folder, *rows, images="images"):
    (folder / images).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / images / "source.jpg")
    (folder / vqa.RAD_FILE).write_text(json.dumps(list(rows)))
    return f"vqa-rad:{folder}"


def test_a_slake_row_becomes_a_sample(tmp_path):
    (sample,) = load_samples([slake(tmp_path, SLAKE_ROW)], "vqa", "train")
    image = (tmp_path / "imgs" / "xmlab0" / "source.jpg").resolve()
    turns = (("Is this a CT?", "Yes"),)
    assert sample == Sample(
        "11", "slake", "train", image, turns, "X-ray", answer_type="closed", kind="modality"
    )


@pytest.mark.parametrize("images", vqa.RAD_FOLDERS)
def test_a_vqa_rad_row_becomes_a_sample_and_its_number_a_text(tmp_path, images):
    (sample,) = load_samples([rad(tmp_path, RAD_ROW, images=images)], "vqa", "train")
    image = (tmp_path / images / "source.jpg").resolve()
    turns = (("How many?", "4"),)
    assert sample == Sample(
        "0", "vqa-rad", "train", image, turns, None, answer_type="open", kind="pres"
    )


def test_sources_are_joined_in_order(tmp_path):
    specs = [slake(tmp_path, SLAKE_ROW), "phantoms:2", rad(tmp_path, RAD_ROW)]
    samples = load_samples(specs, "captions", "train")
    assert [s.source for s in samples] == ["slake", "phantoms", "phantoms", "vqa-rad"]


def test_captions_say_what_is_asked_about_an_image_and_leave_general_knowledge_out(tmp_path):
    rows = [
        changed(SLAKE_ROW, modality="MRI"),
        changed(SLAKE_ROW, qid=12, question="Which plane?", answer="Coronal.", answer_type="OPEN"),
        changed(SLAKE_ROW, qid=13, content_type="KG", question="What is a lung?", answer="Organ"),
    ]
    (sample,) = load_samples([slake(tmp_path, *rows)], "captions", "train")
    assert sample.turns == (
        ("", "an MRI of the brain tissue. Which plane? Coronal. Is this a CT? Yes."),
    )


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"img_name": DELETED}, '"img_name" is missing'),
        ({"img_name": 3}, '"img_name" 3; must be a text'),
        ({"img_name": "../train.json"}, '"img_name" "../train.json"; must be inside'),
        ({"img_name": "/etc/hosts"}, '"img_name" "/etc/hosts"; must be inside'),
        ({"img_name": "xmlab0/link.jpg"}, '"img_name" "xmlab0/link.jpg"; must be inside'),
        ({"question": DELETED}, '"question" is missing'),
        ({"question": " "}, '"question" " "; must be a text that is not empty'),
        ({"question": "\ud83d?"}, '"question" "\\ud83d?"; must be a text of whole characters'),
        ({"question": ["Is this?"]}, '"question" ["Is this?"]; must be a text'),
        ({"answer": DELETED}, '"answer" is missing'),
        ({"answer": True}, '"answer" true; must be a text or a number'),
        ({"answer": None}, '"answer" null; must be a text or a number'),
        ({"answer": ["Yes"]}, '"answer" ["Yes"]; must be a text or a number'),
        ({"answer": float("nan")}, '"answer" NaN; must be a text or a finite number'),
        ({"answer_type": "MAYBE"}, '"answer_type" "MAYBE"; must be one of open, closed'),
        ({"q_lang": "fr"}, '"q_lang" "fr"; must be one of en, zh'),
        ({"modality": "PET"}, '"modality" "PET"; must be one of CT, MRI, X-ray'),
        ({"location": 1}, '"location" 1; must be a text'),
        ({"content_type": DELETED}, '"content_type" is missing'),
        ({"qid": None}, '"qid" null; must be a text or a number'),
        ({"qid": "9"}, '"qid" "9"; must be another than that of record 0'),
    ],
)
@pytest.mark.parametrize("what", ["vqa", "captions"])
def test_a_wrong_field_is_named_with_file_record_field_and_value(tmp_path, fields, message, what):
    spec = slake(tmp_path, changed(SLAKE_ROW, qid=9), changed(SLAKE_ROW, **fields))
    (tmp_path / "outside.jpg").touch()
    (tmp_path / "imgs" / "xmlab0" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(UserError) as refused:
        load_samples([spec], what, "train")
    error = str(refused.value)
    start = f"{tmp_path / 'train.json'}: record 1 (from 0): field {message}"
    assert error.startswith(start) and "\n" not in error, error


@pytest.mark.parametrize("field", RAD_ROW)
def test_every_field_that_is_read_of_vqa_rad_must_be_there(tmp_path, field):
    spec = rad(tmp_path, RAD_ROW, changed(RAD_ROW, **{"qid": 1, field: DELETED}))
    with pytest.raises(UserError, match=rf'record 1 \(from 0\): field "{field}" is missing'):
        load_samples([spec], "vqa", "train")


@pytest.mark.parametrize(
    "content,message",
    [
        (b'[{"qid": 1},\n {"qid": 2,}]', "not JSON: line 2, column"),
        (b"", "not JSON: line 1, column 1"),
        (b'["\xff"]', "not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not JSON: "),
        (b'{"rows": []}', 'must be a JSON list, is {"rows": []}'),
        (b'["a row"]', 'record 0 (from 0) is not an object: "a row"'),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused_with_the_place(tmp_path, content, message):
    spec = slake(tmp_path)
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_samples([spec], "vqa", "train")
    assert str(refused.value).startswith(f"{tmp_path / 'train.json'}: ")
    assert message in str(refused.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    spec = slake(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps([SLAKE_ROW]), encoding="utf-8-sig")
    assert len(load_samples([spec], "vqa", "train")) == 1


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/train\.json: No such file"):
        load_samples([f"slake:{tmp_path / 'nowhere'}"], "vqa", "train")
    with pytest.raises(UserError, match=r"nowhere: no folder images or VQA_RAD Image Folder"):
        load_samples([f"vqa-rad:{tmp_path / 'nowhere'}"], "vqa", "train")


def test_a_record_without_an_answer_is_skipped_and_told_once(tmp_path, capsys):
    spec = slake(tmp_path, SLAKE_ROW, changed(SLAKE_ROW, qid=12, answer=" "))
    for _ in range(2):
        assert [s.id for s in load_samples([spec], "vqa", "train")] == ["11"]
    output = capsys.readouterr().err
    assert output.count("1 without an answer skipped: qid 12") == 1 and spec in output


def test_missing_images_are_counted_and_named_and_left_out_only_if_allowed(tmp_path, capsys):
    config.warn_once.cache_clear()
    rows = [changed(SLAKE_ROW, qid=i, img_name=f"xmlab{i // 2}/source.jpg") for i in range(7)]
    spec = slake(tmp_path, *rows)  # xmlab0 is there; xmlab1, xmlab2 and xmlab3 are not
    message = "3 of 4 images are missing: xmlab1/source.jpg, xmlab2/source.jpg, xmlab3/source.jpg"
    for allowed in (0, 2):
        with pytest.raises(UserError, match=f"{spec}: {message}; --max-missing 3 leaves"):
            load_samples([spec], "vqa", "train", max_missing=allowed)
    for what, n in (("vqa", 2), ("captions", 1)):
        assert len(load_samples([spec], what, "train", max_missing=3)) == n
    assert f"{message}; 5 of 7 questions are left out" in capsys.readouterr().err


def test_weights_are_read_from_the_source_and_belong_to_each_sample(tmp_path):
    spec = slake(tmp_path, SLAKE_ROW)
    samples = load_samples([f"{spec}@0.25", "phantoms:10@3"], "captions", "train")
    assert [s.weight for s in samples] == [0.25] + [3.0] * 10
    (tmp_path / "odd@2" / "x").mkdir(parents=True)
    odd = slake(tmp_path / "odd@2", SLAKE_ROW)
    assert [s.weight for s in load_samples([odd], "vqa", "train")] == [1.0]
    assert [s.weight for s in load_samples([f"{odd}@0.5"], "vqa", "train")] == [0.5]
    for weight in ("0", "1001"):
        with pytest.raises(UserError, match=f"phantoms@{weight}: its weight must be above 0"):
            load_samples([f"phantoms@{weight}"], "vqa", "train")


def test_router_labels_name_images_by_the_end_of_their_path(tmp_path, capsys):
    rows = [changed(SLAKE_ROW, qid=1), changed(SLAKE_ROW, qid=2, img_name="b/source.jpg")]
    spec = slake(tmp_path, *rows)
    (tmp_path / "imgs" / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "imgs" / "b" / "source.jpg")
    file = tmp_path / "labels.json"

    def modalities(labels):
        file.write_text(json.dumps(labels))
        found = load_samples([spec], "vqa", "train", router_labels=str(file))
        return [s.modality for s in found]

    assert modalities({"b/source.jpg": "mri", "c.jpg": "CT"}) == ["X-ray", "MRI"]
    assert "1 of 2 labels are of images that are not in the data" in capsys.readouterr().err
    with pytest.raises(UserError, match=r'"source\.jpg" fits .*xmlab0/source.jpg and .*b/source'):
        modalities({"source.jpg": "CT"})
    whole = str(tmp_path / "imgs" / "xmlab0" / "source.jpg")
    assert modalities({whole: "CT", "b/source.jpg": "MRI"}) == ["CT", "MRI"]
    for labels, message in (
        ({"b/source.jpg": "PET"}, '"b/source.jpg": "PET"; must be one of CT, MRI'),
        ({"b/source.jpg": None}, "null; must be one of"),
        ({"else.jpg": "CT"}, "none of its 1 images is in the data"),
        ([], "must be an object"),
    ):
        with pytest.raises(UserError, match=message):
            modalities(labels)


def test_an_empty_source_is_named_but_vqa_rad_may_lack_a_val_split(tmp_path):
    spec = slake(tmp_path, SLAKE_ROW)
    with pytest.raises(UserError, match=rf"--data {spec}: no vqa in its train split .*zh"):
        load_samples([spec], "vqa", "train", lang="zh")
    spec = rad(tmp_path, RAD_ROW)
    assert load_samples([spec], "vqa", "val") == []
    with pytest.raises(UserError, match=f"--data {spec}: no vqa in its test split"):
        load_samples([spec], "vqa", "test")


def test_reading_all_languages_warns_of_the_leak(tmp_path, capsys):
    config.warn_once.cache_clear()
    spec = slake(tmp_path, SLAKE_ROW, changed(SLAKE_ROW, qid=12, q_lang="zh"))
    assert len(load_samples([spec], "vqa", "train", lang="all")) == 2
    assert "images of the test split are in training" in capsys.readouterr().err


def counts(samples):
    kinds = [s.answer_type for s in samples]
    return len(samples), kinds.count("open"), kinds.count("closed")


@needs_slake
def test_slake_has_its_published_sizes():
    spec = f"slake:{SLAKE}"
    assert counts(load_samples([spec], "vqa", "train")) == (4918, 2975, 1943)  # 4919, 1 unanswered
    assert counts(load_samples([spec], "vqa", "val")) == (1053, 631, 422)
    assert counts(load_samples([spec], "vqa", "test")) == (1061, 645, 416)
    assert len(load_samples([spec], "captions", "train")) == 450
    assert len(load_samples([spec], "vqa", "test", lang="zh")) == 1033


@needs_slake
def test_english_slake_shares_no_image_between_splits():
    images = [
        {s.image for s in load_samples([f"slake:{SLAKE}"], "captions", split)}
        for split in ("train", "val", "test")
    ]
    assert len(set.union(*images)) == sum(map(len, images)) == 642


@needs_rad
def test_vqa_rad_has_its_published_sizes():
    spec = f"vqa-rad:{RAD}"
    assert counts(load_samples([spec], "vqa", "train")) == (1797, 770, 1027)
    assert counts(load_samples([spec], "vqa", "test")) == (451, 179, 272)
    assert len(load_samples([spec], "captions", "train")) == 313


@needs_rad
@pytest.mark.parametrize("what", ["captions", "instructions"])
def test_training_captions_and_dialogues_hold_no_test_question(what):
    expected = {}
    for s in load_samples([f"vqa-rad:{RAD}"], what, "train"):
        expected.setdefault(s.image, []).extend(
            f"{question} {answer}." for question, answer in s.turns
        )
    leaked = set()
    for s in load_samples([f"vqa-rad:{RAD}"], "vqa", "test"):
        ((question, answer),) = s.turns
        if f"{question} {answer}." in " ".join(expected.get(s.image, [])):
            leaked.add(s.id)
    assert leaked <= {"447"}  # the owners put this question into both splits


@needs_slake
def test_slake_dialogues_ask_every_question_three_times_of_one_image_each():
    single = load_samples([f"slake:{SLAKE}"], "vqa", "train")
    dialogues = load_samples([f"slake:{SLAKE}"], "instructions", "train")
    assert len({s.id for s in dialogues}) == len(dialogues)
    assert max(len(s.turns) for s in dialogues) == load.MAX_TURNS
    by_image = {}
    for s in single:
        by_image.setdefault(s.image, []).append(s.turns[0])
    by_dialogue = {}
    for s in dialogues:
        by_dialogue.setdefault(s.image, []).extend(s.turns)
    assert {k: sorted(3 * v) for k, v in by_image.items()} == {
        k: sorted(v) for k, v in by_dialogue.items()
    }
    assert load_samples([f"slake:{SLAKE}"], "instructions", "train") == dialogues
