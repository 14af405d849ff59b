"""SLAKE, VQA-RAD and PathVQA are read as their owners publish them, and pickles never executed."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest

from config import UserError, warn_once
from data import Sample
from sources.load import load_samples
from sources.vqa import RAD_FOLDERS, read_slake, read_vqa_rad
from tests.sources.written import RAD, SLAKE, llava, llava_item, rad, save_image, slake

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_slakes_rows_become_samples_and_titles_in_one_language_or_both(tmp_path, capsys):
    warn_once.cache_clear()
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
def test_vqa_rads_rows_are_split_and_framed_questions_join_training(tmp_path, capsys, images):
    warn_once.cache_clear()
    foot = RAD | {"qid": 1, "question": "B?", "question_frame": "Framed B?", "image_organ": "Foot"}
    test = RAD | {"qid": 2, "question": "C?", "question_frame": "F C?", "phrase_type": "test_para"}
    rad(tmp_path, RAD, foot, test, images=images)
    first, second = read_vqa_rad(tmp_path, "train")
    image = tmp_path / images / "source.jpg"
    sample = Sample("0", "vqa-rad", "train", image, (("How many?", "4"),), None, "open", "pres")
    assert first == (sample, "an image of the abdomen.") and second[1] == "an image of the foot."
    found = [[(s.id, s.turns[0][0]) for s in load_samples([f"{kind}:{tmp_path}"], "vqa", split)]
             for kind in ("vqa-rad", "vqa-rad-3515") for split in ("train", "test")]  # fmt: skip
    framed = [("0", "How many?"), ("1", "B?"), ("1-frame", "Framed B?"), ("2-frame", "F C?")]
    assert load_samples([f"vqa-rad:{tmp_path}"], "vqa", "val") == []  # it has none
    assert found == [[framed[0], framed[1]], [("2", "C?")], framed, [("2", "C?")]]
    assert "1 of the framed questions in training restate" in capsys.readouterr().err


@pytest.mark.parametrize(("write", "row"), [(slake, SLAKE), (rad, RAD)])
def test_every_field_that_is_read_must_be_there_and_no_number_come_twice(tmp_path, write, row):
    for field in row.keys() - {"question_frame"}:  # which 3515 alone reads
        broken = {k: v for k, v in row.items() if k != field}
        with pytest.raises(UserError, match=rf'record 1 \(from 0\): field "{field}" is missing'):
            load_samples([write(tmp_path, row | {"qid": 9}, broken)], "vqa", "train")
    with pytest.raises(UserError, match=r'record 1 .* "qid" .*another than that of record 0'):
        load_samples([write(tmp_path, row | {"qid": 9}, row | {"qid": "9"})], "vqa", "train")


def test_missing_files_and_folders_are_named(tmp_path):
    for kind, named in (("slake", "train.json: No such"), ("vqa-rad", "no folder images or"),
                        ("llava", "train.json: No such"),
                        ("pathvqa", "neither .*train_qa.pkl nor .*pvqa_train.json")):  # fmt: skip
        with pytest.raises(UserError, match=named):
            load_samples([f"{kind}:{tmp_path}"], "vqa", "train")


PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
QA = [
    {"image": "t_1", "question": "What is it?", "answer": "a lesion", "more": [1, -(10**30), None]},
    {"image": "t_1", "question": "Is it large, é?", "answer": "No", "more": {"b": [2.5, True]}},
]
CONVERTED = {
    "img_id": "t_1", "sentf": {"pvqa": ["What is it?", "Is it large, é?"]},
    "labelf": {"pvqa": [{"x": "?", "lesion": 0.3, "a lesion": 1}, {"No": 1}]}}  # fmt: skip


def pathvqa(folder, content):
    """A pickle of these bytes, or a conversion of these values."""
    file = folder / ("qas/test/test_qa.pkl" if isinstance(content, bytes) else "pvqa_test.json")
    save_image(folder / "images" / "test" / "t_1.jpg")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return f"pathvqa:{folder}"


@pytest.mark.parametrize("content", [*(pickle.dumps(QA, p) for p in PROTOCOLS), [CONVERTED]])
def test_pathvqa_is_read_from_its_pickles_and_from_its_conversion(tmp_path, content):
    image = tmp_path / "images" / "test" / "t_1.jpg"
    assert load_samples([pathvqa(tmp_path, content)], "vqa", "test") == [
        Sample(name, "pathvqa", "test", image, (turn,), "pathology", answer_type, kind)
        for name, turn, answer_type, kind in (
            ("t_1-0", ("What is it?", "a lesion"), "open", "what"),
            ("t_1-1", ("Is it large, é?", "No"), "closed", "yes/no"))]  # fmt: skip


@pytest.mark.parametrize(("write", "row", "split"), [
    (slake, SLAKE, "train"), (rad, RAD, "train"), (pathvqa, [CONVERTED], "test"),
    (llava, llava_item(), "test")])  # fmt: skip
def test_an_image_that_is_a_link_is_followed_if_allowed(tmp_path, write, row, split):
    spec = write(tmp_path / "hub", row)
    (image,) = (tmp_path / "hub").rglob("*.jpg")
    image.symlink_to(image.rename(tmp_path / "blob"))  # as in the Hub's cache
    with pytest.raises(UserError, match=r"it is a link to .*/blob, which --follow-links reads"):
        load_samples([spec], "vqa", split)
    assert load_samples([spec], "vqa", split, follow_links=True)[0].image == image


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a pickle"),
    *((pickle.dumps([os.system], p), "does more than hold data: ") for p in PROTOCOLS),
    (b"]r\xff\xff\xff\x7f.", "numbers its value 2147483647"),  # a table of 16 GiB
    (pickle.dumps([QA[0], QA[1] | {"image": "../../../x"}]), 'record 1 (from 0): field "im'),
    ([CONVERTED, CONVERTED | {"labelf": {"pvqa": [{"x": 1}]}}], 'record 1 (from 0): field "se'),
    ([CONVERTED | {"labelf": {"pvqa": [{"x": 1}, {}]}}], 'record 0 (from 0): field "labelf"'),
])  # fmt: skip
def test_a_malicious_or_broken_file_is_refused_in_one_line(tmp_path, content, message):
    match = rf"test(_qa\.pkl|\.json): [^\n]*{re.escape(message)}[^\n]*$"
    with pytest.raises(UserError, match=match):
        load_samples([pathvqa(tmp_path, content)], "vqa", "test")


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the project")
def test_the_real_data_sets_have_their_published_sizes_and_splits():
    found, slake, rad = {}, f"slake:{DATA / 'slake'}", f"vqa-rad:{DATA / 'vqa_rad'}"
    for spec, split, *sizes in (
        (slake, "train", 4918, 1943, 450),  # of 4 919 one has no answer
        (slake, "val", 1053, 422, 96), (slake, "test", 1061, 416, 96),
        (rad, "train", 1797, 1027, 313), (rad, "test", 451, 272, 203),
        (f"medmnist:{DATA}/pneumoniamnist/pneumoniamnist_rebuilt.npz", "test", 624, 624, 624),
    ):  # fmt: skip
        samples = load_samples([spec], "vqa", split)
        n_closed = sum(s.answer_type == "closed" for s in samples)
        found[spec, split] = {s.image for s in samples}
        assert [len(samples), n_closed, len(found[spec, split])] == sizes, spec
    slakes = [found[slake, split] for split in ("train", "val", "test")]
    assert len(set.union(*slakes)) == 642  # 450 + 96 + 96: its English splits share no image
