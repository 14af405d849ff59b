"""LLaVA's JSON, in which LLaVA-Med and Med-MoE keep captions, dialogues and questions."""

import re

import pytest

from config import UserError
from data import Sample
from sources.load import load_samples
from tests.sources.written import llava, llava_item, save_image

HUMAN, GPT = {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}


def test_items_become_captions_dialogues_and_questions(tmp_path):
    long = llava_item("long", question="What is it?\n<image>")
    long["conversations"] += [HUMAN | {"value": "Is it large?"}, GPT | {"value": "Yes."}]
    misspelt = llava_item(2, answer="left", answer_type="CLOSE", modality="x-ray")
    misspelt["conversatons"] = misspelt.pop("conversations")
    spec, image = llava(tmp_path, long, misspelt), tmp_path / "images" / "x.jpg"
    captions, dialogues, questions = (
        load_samples([spec], what, "train") for what in ("captions", "instructions", "vqa")
    )
    first, second = ("What is it?", "A lung."), ("Is it large?", "Yes.")
    assert [s.turns for s in captions] == [(("", "A lung."),), (("", "left"),)]
    assert dialogues[0] == Sample("long", "llava/test", "train", image, (first, second))
    assert questions == [
        Sample(name, "llava/test", "train", image, (turn,), modality, answer_type, "question")
        for name, turn, modality, answer_type in (
            ("long", first, None, "open"), ("long-1", second, None, "closed"),
            ("2", ("What is it?", "left"), "X-ray", "closed"))
    ]  # fmt: skip


def test_a_folder_has_splits_and_images_may_lie_beside_the_file_or_elsewhere(tmp_path):
    for split in ("train", "test"):
        llava(tmp_path, llava_item(question=split), file=f"{split}.json")
        (sample,) = load_samples([f"llava:{tmp_path}"], "vqa", split)
        assert sample.turns[0][0] == split and sample.source == f"llava/{tmp_path.name}"
    other, beside = (save_image(tmp_path / name) for name in ("other/x.jpg", "x.jpg"))
    (sample,) = load_samples([f"llava:{tmp_path}"], "vqa", "test", image_folder=str(other.parent))
    assert sample.image == other
    (tmp_path / "images").rename(tmp_path / "pictures")
    assert load_samples([f"llava:{tmp_path}"], "vqa", "test")[0].image == beside
    with pytest.raises(UserError, match="--image-folder nowhere: no such folder"):
        load_samples([f"llava:{tmp_path}"], "vqa", "test", image_folder="nowhere")


def test_an_item_may_lack_an_image_or_an_id_and_only_in_training_repeat_one(tmp_path):
    text = {"conversations": [HUMAN, GPT], "domain": {"mri": True, "gross": False}}
    doubt = llava_item("a", domain={"mri": True, "ct_scan": True})
    spec = llava(tmp_path, llava_item("a", domain={"gross": True, "other": True}), text, doubt)
    found = [(s.id, s.image is None, s.modality) for s in load_samples([spec], "vqa", "train")]
    assert found == [("a", False, "pathology"), ("1", True, "MRI"), ("a#2", False, None)]
    with pytest.raises(UserError, match=r'record 2 .* "id" "a"; must be another than .* record 0'):
        load_samples([spec], "vqa", "test")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("conversations", [HUMAN, GPT, HUMAN], "a list of turns"),
     ("conversations", [GPT, HUMAN], "human and gpt by turns (not "),
     ("value", [HUMAN | {"value": "<image>"}, GPT], "must be more than <image>"),
     ("image", "../test.json", "must be inside"), ("image", ..., "as its question has <image>"),
     ("answer_type", "maybe", "must be one of open, close, closed")],
)  # fmt: skip
def test_what_is_wrong_with_an_item_is_named_with_its_place(tmp_path, field, value, message):
    item = llava_item("2") | {"conversations" if field == "value" else field: value}
    spec = llava(tmp_path, llava_item(), {k: v for k, v in item.items() if v is not ...})
    with pytest.raises(UserError, match=rf'test.json: record 1 .* "{field}".*{re.escape(message)}'):
        load_samples([spec], "vqa", "test")
