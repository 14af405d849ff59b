"""What --data names becomes captions, dialogues or questions of one split."""

import json
import re
from collections import Counter

import pytest

from config import TrainConfig
from data import Packed, Sample
from sources import phantoms, signs
from sources.load import has_splits, how_read, reading
from sources.questions import about_image, about_signs
from tests.sources.written import SLAKE, llava, llava_item, load, npz, refused, save_image, slake


def test_phantoms_give_captions_dialogues_and_questions():
    (caption,), (dialogue,) = (load("phantoms:1+3", w) for w in ("captions", "instructions"))
    phantom = phantoms.draw(3)
    seen, taught = about_image(phantom), about_signs(phantom, signs.TAUGHT, 2)
    expected = [*seen, *about_signs(phantom, signs.known(120), 8)]
    assert (caption.turns, caption.kind) == ((("", phantoms.caption(phantom)),), "caption")
    assert sorted(dialogue.turns) == sorted(q.turn() for q in (*seen, *taught))
    assert dialogue.turns != tuple(q.turn() for q in (*seen, *taught))  # shuffled
    one, two = load("phantoms:1+3", "tuning")  # the same questions in two dialogues
    assert sorted(one.turns + two.turns) == sorted(q.turn() for q in expected)
    assert abs(len(one.turns) - len(two.turns)) <= 1
    assert load("phantoms:1+3") == [
        Sample(f"3-{i}", "phantoms", "train", 3, (q[:2],), phantom.modality, *q[2:4],
               wording="seen") for i, q in enumerate(expected)]  # fmt: skip


def test_a_split_of_phantoms_is_so_many_from_a_first_one_on():
    for spec, split, n, first in (
        ("phantoms", "train", 4000, 0), ("phantoms", "val", 200, 10**9),
        ("phantoms:3", "test", 500, 2 * 10**9), ("phantoms:2/80", "train", 2, 0),
        ("phantoms:2+5/16", "train", 2, 5), ("phantoms:2+900000000", "train", 2, 9 * 10**8),
    ):  # fmt: skip
        assert [s.image for s in load(spec, "captions", split)] == list(range(first, first + n))


def test_a_bad_source_or_language_is_refused_by_name():
    for spec in ("phantom", "slake:", "phantoms:0", "phantoms:1000001", "phantoms:4/7",
                 "phantoms:4/481", "phantoms:4+900000001",
                 "phantoms@0"):  # fmt: skip
        named = rf"^--data {re.escape(spec)}: .*(one of|N from 1|weight)"
        refused(named, load, spec)
    refused('field "lang" must be one of en, zh', how_read, {"lang": "fr"}, "x.json")
    stored = {"max_missing": 2, "max_bad": 3, "follow_links": True, "image_folder": "x"}
    assert how_read(stored, "x.json") == stored
    assert reading(TrainConfig(**stored)).items() >= stored.items()


def test_sources_are_joined_with_their_weights_and_each_is_named_once(tmp_path):
    (tmp_path / "odd@2").mkdir()
    odd = slake(tmp_path / "odd@2", SLAKE)  # whose @2 is no weight
    specs = [odd, "phantoms:2@0.25", npz(tmp_path, "octmnist", [3]) + "@1000"]
    assert [(s.source, s.weight) for s in load(specs, "captions")] == [
        ("slake", 1), ("phantoms", 0.25), ("phantoms", 0.25), ("octmnist", 1000)]  # fmt: skip
    refused("--data phantoms:5: phantoms is already named", load, ["phantoms:4", "phantoms:5"])
    assert not has_splits(llava(tmp_path, llava_item()) + "@2")  # a single file serves as any
    assert has_splits(f"llava:{tmp_path}") and has_splits("phantoms@2")


def test_a_class_answers_one_question_and_several_labels_a_yes_or_no_each(tmp_path):
    question = ("Which of these does the image show: normal, pneumonia?", "pneumonia")
    assert load(npz(tmp_path, "pneumoniamnist", [0, 1]), split="test")[1] == Sample(
        "test-1", "pneumoniamnist", "test", Packed(tmp_path / "pneumoniamnist.npz", "test", 1),
        (question,), "X-ray", "closed", "class", ("normal", "pneumonia"))  # fmt: skip
    spec, file = npz(tmp_path, "chestmnist", [[0] * 14, [1] + [0] * 13]), "chestmnist.npz"
    samples = load(spec)
    assert [s.turns[0][1] for s in samples] == ["no"] * 14 + ["yes"] + ["no"] * 13
    assert samples[14] == Sample(
        "train-1-atelectasis", "chestmnist", "train", Packed(tmp_path / file, "train", 1),
        (("Does the image show atelectasis?", "yes"),), "X-ray", "closed", "atelectasis",
        ("no", "yes"))  # fmt: skip
    captions = [s.turns[0][1] for s in load(spec, "captions")]
    assert captions == ["an X-ray: nothing.", "an X-ray: atelectasis."]


def test_dialogues_ask_up_to_four_questions_and_each_question_in_three_of_them(tmp_path):
    rows = [SLAKE | {"qid": i, "question": f"{i}?"} for i in range(6)]
    dialogues = load(slake(tmp_path, *rows), "instructions")
    assert [len(s.turns) for s in dialogues] == [4, 2, 4, 2, 4, 2]
    every = [(f"{i}?", "Yes") for i in range(6)] * 3
    assert Counter(turn for s in dialogues for turn in s.turns) == Counter(every)
    assert len({s.turns for s in dialogues[::2]}) == 3  # in three orders


def test_a_caption_tells_six_answers_open_ones_first_and_no_general_knowledge(tmp_path):
    closed = SLAKE | {"modality": "MRI", "question": "Closed?"}
    plane = SLAKE | {"qid": 12, "question": "Plane?", "answer": "Coronal.", "answer_type": "OPEN"}
    knowledge = SLAKE | {"qid": 13, "content_type": "KG", "question": "What is a lung?"}
    more = [plane | {"qid": i, "question": f"{i}?"} for i in range(20, 25)]
    for rows, facts in (([], "Closed? Yes."), (more, "20? Coronal. 21? Coronal. 22? Coronal. "
                                               "23? Coronal. 24? Coronal.")):  # fmt: skip
        (sample,) = load(slake(tmp_path, closed, plane, knowledge, *rows), "captions")
        assert sample.turns == (("", f"an MRI of the brain tissue. Plane? Coronal. {facts}"),)


def test_missing_images_are_named_and_their_questions_left_out_only_if_allowed(tmp_path, capsys):
    rows = [SLAKE | {"qid": i, "img_name": f"xmlab{i // 2}/source.jpg"} for i in range(14)]
    rows.append(SLAKE | {"qid": 99, "answer": " "})  # without an answer: skipped first
    spec = slake(tmp_path, *rows)  # of seven images xmlab0 is there
    names = ", ".join(f"xmlab{i}/source.jpg" for i in range(1, 6))
    refused(f"6 of 7 images are missing: {names}, ...; --max-missing", load, spec, max_missing=5)
    assert len(load(spec, max_missing=6)) == 2 and len(load(spec, "captions", max_missing=6)) == 1
    said = capsys.readouterr().err
    assert "12 of 14 questions are left out" in said and "skipped: qid 99" in said
    refused(f"--data {spec}: no questions of --lang zh in its train split", load, spec, lang="zh")
    spec = llava(tmp_path, llava_item(), llava_item("2", image="y.jpg"))
    assert [s.id for s in load(spec, max_missing=1)] == ["1"]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("write", "first", "second"), [
    (slake, SLAKE, SLAKE | {"qid": 12, "img_name": "../imgs/bad/y.jpg"}),
    (llava, llava_item(), llava_item("2", image="../imgs/bad/y.jpg"))])  # fmt: skip
def test_an_unreadable_image_is_left_out_or_counts_as_wrong(
    tmp_path, capsys, write, first, second, split
):
    (tmp_path / "imgs").mkdir()
    (tmp_path / "images").symlink_to("imgs")
    spec = write(tmp_path, first, second, file=f"{split}.json")
    bad = save_image(tmp_path / "imgs" / "bad" / "y.jpg")
    bad.write_bytes(bad.read_bytes()[:400])
    refused(r"1 cannot be used: bad/y.jpg \(.*; --max-bad 1 ", load, spec, "vqa", split)
    assert len(load(spec, "captions", split, max_bad=1)) == 1
    assert len(load(spec, "vqa", split, open_images=False)) == 2
    good, *wrong = load(spec, "vqa", split, max_bad=1)
    found = [(s.image, s.fault.partition(":")[0]) for s in wrong]
    assert good.fault == "" and found == [(None, f"image {bad}")] * (split == "test")
    then = "counts them as wrong" if wrong else "leaves them out"
    assert f"--max-bad {then}" in capsys.readouterr().err


def test_router_labels_name_images_by_the_end_of_their_path(tmp_path, capsys):
    rows = [SLAKE | {"qid": 1}, SLAKE | {"qid": 2, "img_name": "b/source.jpg"}]
    spec, file = slake(tmp_path, *rows), tmp_path / "labels.json"
    save_image(tmp_path / "imgs" / "b" / "source.jpg")

    def modalities(labels, spec=spec):
        file.write_text(json.dumps(labels))
        return [s.modality for s in load(spec, router_labels=str(file))]

    whole = str(tmp_path / "imgs" / "xmlab0" / "source.jpg")
    assert modalities({whole: "CT", "b/source.jpg": "mri"}) == ["CT", "MRI"]
    assert modalities({"b/source.jpg": "MRI", "c.jpg": "CT"}) == ["X-ray", "MRI"]
    assert "1 of 2 labels are of images that are not in the data" in capsys.readouterr().err
    packed = npz(tmp_path, "octmnist", [0, 1])
    assert modalities({"octmnist.npz/train/1": "CT"}, packed) == [None, "CT"]
    for labels, message in (
        ({"source.jpg": "CT"}, r'"source\.jpg" fits .*xmlab0/source\.jpg and .*b/source\.jpg'),
        ({"b/source.jpg": "PET"}, '"b/source.jpg": "PET"; must be one of CT, MRI'),
        ({"else.jpg": "CT"}, "none of its 1 images is in the data"),
        ([], "must be an object"),
    ):
        refused(f"^{file}: .*{message}", modalities, labels)
