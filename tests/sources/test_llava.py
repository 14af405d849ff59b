"""LLaVA's JSON, in which LLaVA-Med and Med-MoE keep captions, dialogues and questions."""

import re

import pytest

from data import Sample
from metrics import question_ids
from sources import llava as module
from sources.load import file_names
from tests.sources.written import llava, llava_item, load, refused, save_image

KINDS = ("captions", "instructions", "vqa")
HUMAN, GPT = {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}


def test_items_become_captions_dialogues_and_questions_and_the_image_stays_with_its_own(tmp_path):
    long = llava_item("long", question="What is it?\n<image>")
    long["conversations"] += [HUMAN | {"value": "Is it large?"}, GPT | {"value": "Yes."}]
    misspelt = llava_item(2, answer="left", answer_type="CLOSE", modality="x-ray")
    misspelt["conversatons"] = misspelt.pop("conversations")
    spec, image = llava(tmp_path, long, misspelt), tmp_path / "images" / "x.jpg"
    captions, dialogues, questions = (load(spec, kind, "train") for kind in KINDS)
    first, second = ("What is it?", "A lung."), ("Is it large?", "Yes.")
    assert [s.turns for s in captions] == [(("", "A lung."),), (("", "left"),)]
    assert dialogues[0] == Sample("long", "llava/test", "train", image, (first, second))
    assert questions == [
        Sample(name, "llava/test", "train", image, (turn,), modality, answer_type, "question")
        for name, turn, modality, answer_type in (
            ("long", first, None, "open"), ("long-1", second, None, "closed"),
            ("2", ("What is it?", "left"), "X-ray", "closed"))]  # fmt: skip
    later = HUMAN | {"value": "What is\n<image>"}, GPT | {"value": "A lung."}
    spec = llava(tmp_path, llava_item(conversations=[HUMAN, GPT, *later]))
    (caption,), (dialogue,), questions = (load(spec, kind, "test") for kind in KINDS)
    assert dialogue.image_turn == 1 and dialogue.turns == (("Q?", "A."), ("What is", "A lung."))
    assert caption.turns == (("", "A lung."),) and caption.image_turn == 0
    assert [(s.image is None, s.image_turn) for s in questions] == [(True, 0), (False, 0)]


def test_a_folder_has_splits_and_images_may_lie_beside_the_file_or_elsewhere(tmp_path):
    for split in ("train", "test"):
        llava(tmp_path, llava_item(question=split), file=f"{split}.json")
        (sample,) = load(f"llava:{tmp_path}", "vqa", split)
        assert sample.turns[0][0] == split and sample.source == f"llava/{tmp_path.name}"
    other, beside = (save_image(tmp_path / name) for name in ("other/x.jpg", "x.jpg"))

    def image(**more):
        return load(f"llava:{tmp_path}", "vqa", "test", **more)[0].image

    inside = tmp_path / "images" / "x.jpg"
    assert image(image_folder=str(other.parent)) == inside  # beside the file comes first
    inside.unlink()
    module.read_file.cache_clear()
    assert image(image_folder=str(other.parent)) == other
    inside.parent.rmdir()
    assert load(f"llava:{tmp_path}", "vqa", "test")[0].image == beside
    refused("--image-folder no: no such folder", load, f"llava:{tmp_path}", image_folder="no")


def test_an_item_may_lack_an_image_or_an_id_and_only_in_training_repeat_one(tmp_path):
    text = {"conversations": [HUMAN, GPT], "domain": {"mri": True, "gross": False}}
    doubt = llava_item("a", domain={"mri": True, "ct_scan": True})
    spec = llava(tmp_path, llava_item("a", domain={"gross": True, "other": True}), text, doubt)
    found = [(s.id, s.image is None, s.modality) for s in load(spec)]
    assert found == [("a", False, "pathology"), ("1", True, "MRI"), ("a#2", False, None)]
    refused(r'record 2 .* "id" "a"; must be another than .* record 0', load, spec, "vqa", "test")


def test_what_is_null_counts_as_missing_and_a_system_turn_is_left_out(tmp_path, capsys):
    nan, system = float("nan"), [{"from": "system", "value": "Help."}, HUMAN, GPT]
    for more, has_image, kind in (
        ({"image": None}, False, "open"), ({"image": nan}, False, "open"),
        ({"image": []}, False, "open"), ({"image": ["x.jpg"], "answer_type": None}, True, "open"),
        ({"image": "", "images": ["x.jpg"], "answer_type": ""}, True, "open"),
        ({"id": None, "modality": nan, "answer_type": "close"}, True, "closed"),
        ({"conversations": system}, True, "open")):  # fmt: skip
        spec = llava(tmp_path, llava_item("0", question="Q?") | more)
        (s,) = load(spec, "vqa", "test")
        found = s.id, s.turns[0][0], s.modality, s.image is not None, s.answer_type
        assert found == ("0", "Q?", None, has_image, kind)
    assert "1 records begin with a system turn" in capsys.readouterr().err


def test_files_of_one_name_are_sources_of_their_own_and_each_is_read_once(tmp_path, monkeypatch):
    specs, read = [], []
    for name in ("a", "b", "b/a"):
        (tmp_path / name).mkdir()
        specs.append(llava(tmp_path / name, llava_item(answer=name)))
    real = module.read_records
    monkeypatch.setattr(module, "read_records", lambda file: read.append(file) or real(file))
    for kind in KINDS:
        found = load(specs, kind, "test")
        assert [s.turns[0][1] for s in found] == ["a", "b", "b/a"]
        assert [s.source.split("/")[-3:] for s in found] == [
            [tmp_path.name, "a", "test"], ["llava", "b", "test"], ["b", "a", "test"]]  # fmt: skip
    assert len(read) == 3 and len(question_ids(found)) == 3
    assert {*file_names(["llava:/a/t.json", "table:/b/t.csv"]).values()} == {
        "llava/a/t",
        "table/b/t",
    }
    (other,) = load(llava(tmp_path / "a", llava_item(answer="new")), "vqa", "test")
    assert other.turns[0][1] == "new" and other.source == "llava/test"
    refused("llava/test is already named", load, [specs[0], specs[0] + "@2"], "vqa", "test")


@pytest.mark.parametrize(("field", "value", "message"), [
    ("conversations", [HUMAN, GPT, HUMAN], "a list of turns"),
    ("conversations", [GPT, HUMAN], "human and gpt by turns (not "),
    ("value", [HUMAN | {"value": "<image>"}, GPT], "must be more than <image>"),
    ("value", [HUMAN, GPT | {"value": " "}], "a text that is not empty"),
    ("conversations", [HUMAN, GPT | {"value": "<image> a"}], "one <image> at most, in a question"),
    ("conversations", [HUMAN | {"value": "<image><image>a"}, GPT], "a sample has one image"),
    ("image", ["x.jpg", "y.jpg"], "must be one image"), ("image", None, "has <image>"),
    ("image", "../test.json", "must be inside"), ("image", ..., "as its question has <image>"),
    ("answer_type", "maybe", "must be one of open, close, closed")])  # fmt: skip
def test_what_is_wrong_with_an_item_is_named_with_its_place(tmp_path, field, value, message):
    item = llava_item("2") | {"conversations" if field == "value" else field: value}
    spec = llava(tmp_path, llava_item(), {k: v for k, v in item.items() if v is not ...})
    match = rf'test.json: record 1 .* "{field}".*{re.escape(message)}.*; --max-bad 1 leaves'
    refused(match, load, spec, "vqa", "test")
    assert len(load(spec, "vqa", "test", max_bad=1)) == 1
