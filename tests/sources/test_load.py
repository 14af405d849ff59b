"""What --data names becomes captions, dialogues or questions of one split."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from config import TrainConfig, UserError
from data import Packed, Sample
from sources import phantoms
from sources.load import has_splits, how_read, load_samples, reading
from tests.sources.written import RAD, SLAKE, llava, llava_item, npz, rad, save_image, slake


def test_phantoms_give_captions_dialogues_and_questions():
    captions, dialogues, questions = (
        load_samples(["phantoms:20"], what, "train") for what in ("captions", "instructions", "vqa")
    )
    assert [s.image for s in captions] == [s.image for s in dialogues] == list(range(20))
    phantom = phantoms.draw(3)
    expected = phantoms.questions(phantom)
    assert captions[3].turns == (("", phantoms.caption(phantom)),)
    assert (captions[3].modality, captions[3].kind) == (phantom.modality, "caption")
    assert len(set(dialogues[3].turns)) == 4
    assert set(dialogues[3].turns) < {(q.question, q.answer) for q in expected}
    assert [s for s in questions if s.image == 3] == [
        Sample(f"3-{i}", "phantoms", "train", 3, ((q.question, q.answer),), phantom.modality,
               q.answer_type, q.kind) for i, q in enumerate(expected)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "split", "n", "first"),
    [("phantoms", "train", 4000, 0), ("phantoms", "val", 200, 10**9),
     ("phantoms:3", "test", 500, 2 * 10**9), ("phantoms:2+700", "train", 2, 700),
     ("phantoms:2/8", "train", 2, 8 * 10**10), ("phantoms:2+5/1", "train", 2, 10**10 + 5),
     ("phantoms:2+900000000", "train", 2, 9 * 10**8), ("phantoms:2/4", "train", 2, 0)],
)  # fmt: skip
def test_a_split_of_phantoms_is_so_many_from_a_first_one_on(spec, split, n, first):
    images = [s.image for s in load_samples([spec], "captions", split)]
    assert images == list(range(first, first + n))


@pytest.mark.parametrize(
    "spec",
    ["phantom", "slake", "slake:", "llava:", "phantoms:0", "phantoms:many", "phantoms:-3",
     "phantoms:1000001", "phantoms:4+", "phantoms:4/3", "phantoms:4/", "phantoms:4+900000001",
     "phantoms@0", "phantoms@1001"],
)  # fmt: skip
def test_a_bad_source_is_refused_by_name(spec):
    with pytest.raises(UserError, match=rf"^--data {re.escape(spec)}: .*(one of|N from 1|weight)"):
        load_samples([spec], "vqa", "train")


def test_sources_of_every_kind_are_joined_in_order_and_each_is_named_once(tmp_path):
    specs = [slake(tmp_path, SLAKE, file="test.json"), "phantoms:2", npz(tmp_path, "octmnist", [3]),
             rad(tmp_path, RAD | {"phrase_type": "test_para"}),
             llava(tmp_path, llava_item(), file="llava.json")]  # fmt: skip
    for what in ("captions", "instructions", "vqa"):
        samples = load_samples(specs, what, "test")
        assert len({(s.source, s.id) for s in samples}) == len(samples)
        assert list(dict.fromkeys(s.source for s in samples)) == [
            "slake", "phantoms", "octmnist", "vqa-rad", "llava/llava"]  # fmt: skip
    with pytest.raises(UserError, match="--data phantoms:5: phantoms is already named"):
        load_samples(["phantoms:4", "phantoms:5"], "vqa", "test")


def test_a_class_answers_one_question_and_several_labels_a_yes_or_no_each(tmp_path):
    spec, options = npz(tmp_path, "pneumoniamnist", [0, 1]), ("normal", "pneumonia")
    question = "Which of these does the image show: normal, pneumonia?"
    assert load_samples([spec], "vqa", "test")[1] == Sample(
        "test-1", "pneumoniamnist", "test", Packed(tmp_path / "pneumoniamnist.npz", "test", 1),
        ((question, "pneumonia"),), "X-ray", "closed", "class", options)  # fmt: skip
    (caption,) = load_samples([npz(tmp_path, "octmnist", [3])], "captions", "train")
    assert caption.turns == (("", "an image: normal."),) and caption.modality is None
    spec = npz(tmp_path, "chestmnist", [[0] * 14, [1, *[0] * 12, 1]])
    samples = load_samples([spec], "vqa", "val")
    assert [s.turns[0][1] for s in samples] == ["no"] * 14 + ["yes", *["no"] * 12, "yes"]
    assert samples[14] == Sample(
        "val-1-atelectasis", "chestmnist", "val", Packed(tmp_path / "chestmnist.npz", "val", 1),
        (("Does the image show atelectasis?", "yes"),), "X-ray", "closed", "atelectasis",
        ("no", "yes"))  # fmt: skip
    assert [len(s.turns) for s in load_samples([spec], "instructions", "val")] == [14, 14]
    captions = [s.turns[0][1] for s in load_samples([spec], "captions", "val")]
    assert captions == ["an X-ray: nothing.", "an X-ray: atelectasis, hernia."]


def test_dialogues_ask_up_to_four_questions_and_each_question_in_three_of_them(tmp_path):
    rows = [SLAKE | {"qid": i, "question": f"{i}?"} for i in range(6)]
    dialogues = load_samples([slake(tmp_path, *rows)], "instructions", "train")
    assert [len(s.turns) for s in dialogues] == [4, 2, 4, 2, 4, 2]
    every = [(f"{i}?", "Yes") for i in range(6)] * 3
    assert Counter(turn for s in dialogues for turn in s.turns) == Counter(every)
    assert len({s.turns for s in dialogues[::2]}) == 3  # in three orders
    assert len({s.id for s in dialogues}) == 6 and dialogues[5].id.endswith("/2")
    assert {(s.answer_type, s.kind) for s in dialogues} == {("", "")}


def test_a_caption_tells_six_answers_open_ones_first_and_no_general_knowledge(tmp_path):
    rows = [
        SLAKE | {"modality": "MRI", "question": "Closed?"},
        SLAKE | {"qid": 12, "question": "Plane?", "answer": "Coronal.", "answer_type": "OPEN"},
        SLAKE | {"qid": 13, "content_type": "KG", "question": "What is a lung?"},
        *[SLAKE | {"qid": i, "question": f"{i}?", "answer_type": "OPEN"} for i in range(20, 25)],
    ]
    (sample,) = load_samples([slake(tmp_path, *rows)], "captions", "train")
    facts = "Plane? Coronal. 20? Yes. 21? Yes. 22? Yes. 23? Yes. 24? Yes."
    assert sample.turns == (("", f"an MRI of the brain tissue. {facts}"),)
    assert (sample.id, sample.answer_type, sample.kind) == ("xmlab0/source.jpg", "", "caption")
    (sample,) = load_samples([slake(tmp_path, *rows[:2])], "captions", "train")
    assert sample.turns[0][1].endswith(" Plane? Coronal. Closed? Yes.")


def test_missing_images_are_named_and_their_questions_left_out_only_if_allowed(tmp_path, capsys):
    rows = [SLAKE | {"qid": i, "img_name": f"xmlab{i // 2}/source.jpg"} for i in range(14)]
    rows.append(SLAKE | {"qid": 99, "answer": " "})  # without an answer: skipped first
    spec = slake(tmp_path, *rows)  # of seven images xmlab0 is there
    names = ", ".join(f"xmlab{i}/source.jpg" for i in range(1, 6))
    for allowed in (0, 5):
        with pytest.raises(UserError, match=f"6 of 7 images are missing: {names}, ...; --max-miss"):
            load_samples([spec], "vqa", "train", max_missing=allowed)
    for what, n in (("vqa", 2), ("captions", 1)):
        assert len(load_samples([spec], what, "train", max_missing=6)) == n
    said = capsys.readouterr().err
    assert (
        "12 of 14 questions are left out" in said and "1 without an answer skipped: qid 99" in said
    )
    spec = llava(tmp_path, llava_item(), llava_item("2", image="y.jpg"))
    with pytest.raises(UserError, match=r"1 of 2 images are missing: images/y\.jpg; --max-missing"):
        load_samples([spec], "vqa", "test")
    assert [s.id for s in load_samples([spec], "vqa", "test", max_missing=1)] == ["1"]


def test_an_empty_split_is_an_error_except_vqa_rads_val(tmp_path):
    spec = slake(tmp_path, SLAKE)
    with pytest.raises(UserError, match=rf"--data {spec}: no vqa in its train split .*zh"):
        load_samples([spec], "vqa", "train", lang="zh")
    with pytest.raises(UserError, match="no vqa in its val split"):
        load_samples([slake(tmp_path, file="validate.json")], "vqa", "val")
    for kind in ("vqa-rad", "vqa-rad-3515"):
        spec = rad(tmp_path, RAD, kind=kind)
        assert load_samples([spec], "vqa", "val") == []
        with pytest.raises(UserError, match=f"--data {spec}: no vqa in its test split"):
            load_samples([spec], "vqa", "test")


def test_a_weight_stands_after_an_at_sign_unless_a_folder_is_named_so(tmp_path):
    (tmp_path / "odd@2").mkdir()
    odd = slake(tmp_path / "odd@2", SLAKE)
    specs = [f"{odd}@0.25", "phantoms:2@1000"]
    assert [s.weight for s in load_samples(specs, "captions", "train")] == [0.25, 1000, 1000]
    assert [s.weight for s in load_samples([odd, "phantoms:1@1"], "captions", "train")] == [1, 1]
    assert not has_splits(llava(tmp_path, llava_item()) + "@2")  # a single file serves as any
    assert has_splits(f"llava:{tmp_path}") and has_splits("phantoms@2")


def test_router_labels_name_images_by_the_end_of_their_path(tmp_path, capsys):
    rows = [SLAKE | {"qid": 1}, SLAKE | {"qid": 2, "img_name": "b/source.jpg"}]
    spec, file = slake(tmp_path, *rows), tmp_path / "labels.json"
    save_image(tmp_path / "imgs" / "b" / "source.jpg")

    def modalities(labels, specs=(spec,)):
        file.write_text(json.dumps(labels))
        found = load_samples(specs, "vqa", "train", router_labels=str(file))
        return [s.modality for s in found]

    whole = str(tmp_path / "imgs" / "xmlab0" / "source.jpg")
    assert modalities({whole: "CT", "b/source.jpg": "MRI"}) == ["CT", "MRI"]
    assert not capsys.readouterr().err
    assert modalities({"b/source.jpg": "mri", "c.jpg": "CT"}) == ["X-ray", "MRI"]
    assert "1 of 2 labels are of images that are not in the data" in capsys.readouterr().err
    packed = npz(tmp_path, "octmnist", [0, 1])
    assert modalities({"octmnist.npz/train/1": "MRI"}, [packed]) == [None, "MRI"]
    for labels, message in (
        ({"source.jpg": "CT"}, r'"source\.jpg" fits .*xmlab0/source\.jpg and .*b/source\.jpg'),
        ({"b/source.jpg": "PET"}, '"b/source.jpg": "PET"; must be one of CT, MRI'),
        ({"b/source.jpg": None}, "null; must be one of"),
        ({"else.jpg": "CT"}, "none of its 1 images is in the data"),
        ([], "must be an object"),
        ({}, "must be an object"),
    ):
        with pytest.raises(UserError, match=f"^{file}: .*{message}"):
            modalities(labels)


def test_how_data_was_read_is_taken_from_stored_flags_and_checked():
    flags = TrainConfig(lang="zh", max_missing=3, image_folder="a", router_labels="b")
    assert list(reading(flags).values()) == ["zh", 3, "a", "b"]
    stored = {"data": ["phantoms"], "lang": "all", "max_missing": 0, "limit": None, "steps": 7}
    expected = {"data": ("phantoms",), "lang": "all", "max_missing": 0}
    assert how_read(stored, Path("x.json")) == expected
    assert how_read(None, Path("x.json")) == how_read({}, Path("x.json")) == {}
    for name, value in (("data", "phantoms"), ("data", ["phantoms", 1]), ("lang", "fr"),
                        ("split", "dev"), ("limit", "3"), ("image_folder", 1)):  # fmt: skip
        with pytest.raises(UserError, match=f'^x.json: field "{name}"'):
            how_read(stored | {name: value}, Path("x.json"))
