"""SLAKE, VQA-RAD and PathVQA are read in every form, and pickles never executed."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from config import warn_once
from data import Sample
from sources.records import open_file
from sources.vqa import RAD_FOLDERS, read_slake, read_vqa_rad
from tests.sources import written
from tests.sources.written import RAD, SLAKE, load, rad, refused, save_image, slake

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
    found = [[(s.id, s.turns[0][0]) for s in load(f"{kind}:{tmp_path}", "vqa", split)]
             for kind in ("vqa-rad", "vqa-rad-3515") for split in ("train", "test")]  # fmt: skip
    framed = [("0", "How many?"), ("1", "B?"), ("1-frame", "Framed B?"), ("2-frame", "F C?")]
    assert load(f"vqa-rad:{tmp_path}", "vqa", "val") == []  # it has none
    assert found == [[framed[0], framed[1]], [("2", "C?")], framed, [("2", "C?")]]
    assert "1 of the framed questions in training restate" in capsys.readouterr().err


@pytest.mark.parametrize(("write", "row"), [(slake, SLAKE), (rad, RAD)])
def test_every_field_that_is_read_must_be_there_and_no_number_come_twice(tmp_path, write, row):
    for field in row.keys() - {"question_frame"}:  # which 3515 alone reads
        broken = {k: v for k, v in row.items() if k != field}
        spec, place = write(tmp_path, row | {"qid": 9}, broken), r"record 1 \(from 0\): field "
        refused(f'{place}"{field}" is missing', load, spec)
    spec = write(tmp_path, row | {"qid": 9}, row | {"qid": "9"})
    refused(f'{place}"qid" .*another than that of record 0', load, spec)


def test_a_folder_in_no_known_form_is_told_which_there_are(tmp_path):
    refused("no SPLIT.json in it", load, f"slake:{tmp_path}")
    refused(r"no VQA_RAD .* or SPLITset.json or data/SPLIT-\*.par", load, f"vqa-rad:{tmp_path}")
    refused("train.json: No such", load, f"llava:{tmp_path}")
    slake(tmp_path, SLAKE)
    refused("no qas/SPLIT/SPLIT_qa.pkl or .*looks like slake:", load, f"pathvqa:{tmp_path}")
    refused("no folder images or VQA_RAD", load, rad(tmp_path, RAD, images="elsewhere"))


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
    assert load(pathvqa(tmp_path, content), "vqa", "test") == [
        Sample(name, "pathvqa", "test", image, (turn,), "pathology", answer_type, kind)
        for name, turn, answer_type, kind in (
            ("t_1-0", ("What is it?", "a lesion"), "open", "what"),
            ("t_1-1", ("Is it large, é?", "No"), "closed", "yes/no"))]  # fmt: skip


@pytest.mark.parametrize(("write", "row", "split"), [
    (slake, SLAKE, "train"), (rad, RAD, "train"), (pathvqa, [CONVERTED], "test"),
    (written.llava, written.llava_item(), "test")])  # fmt: skip
def test_an_image_that_is_a_link_is_followed_if_allowed(tmp_path, write, row, split):
    spec = write(tmp_path / "hub", row)
    (image,) = (tmp_path / "hub").rglob("*.jpg")
    image.symlink_to(image.rename(tmp_path / "blob"))  # as in the Hub's cache
    refused("it is a link to .*/blob, which --follow-links reads", load, spec, "vqa", split)
    assert load(spec, "vqa", split, follow_links=True)[0].image == image


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a pickle"),
    *((pickle.dumps([os.system], p), "does more than hold data: ") for p in PROTOCOLS),
    (b"]r\xff\xff\xff\x7f.", "numbers its value 2147483647"),  # a table of 16 GiB
    (pickle.dumps([QA[0], QA[1] | {"image": "../../../x"}]), 'record 1 (from 0): field "im'),
    ([CONVERTED, CONVERTED | {"labelf": {"pvqa": [{"x": 1}]}}], 'record 1 (from 0): field "se'),
    ([CONVERTED | {"labelf": {"pvqa": [{"x": 1}, {}]}}], 'record 0 (from 0): field "labelf"'),
])  # fmt: skip
def test_a_malicious_or_broken_file_is_refused_in_one_line(tmp_path, content, message):
    match = rf"test(_qa\.pkl|\.json): .*{re.escape(message)}"
    refused(match, load, pathvqa(tmp_path, content), split="test")


def read(spec, split):
    return [replace(s, image=open_file(s.image)) for s in load(spec, "vqa", split)]


def test_slake_and_vqa_rad_are_the_same_in_other_forms(tmp_path, capsys):
    one, two, three = (tmp_path / name for name in "123")
    theirs = read(slake(one, SLAKE, file="validate.json"), "val")
    spec = slake(two, SLAKE, file="validation.json")
    shutil.make_archive(two / "imgs", "zip", two, "imgs")
    shutil.rmtree(two / "imgs")
    slake(three / "imgs", SLAKE, file="../validation.json")  # imgs/imgs
    assert theirs == read(spec, "val") == read(f"slake:{three}", "val")
    test = RAD | {"qid": 8, "question": "B?"}
    spec = rad(one, RAD, test | {"phrase_type": "test_para"}, kind="vqa-rad-3515")
    for split, row in (("train", RAD), ("test", test)):
        ours = rad(two, row, kind="vqa-rad-3515", file=f"{split}set.json")
        assert read(ours, split) == read(spec, split)
    assert "as vqa-rad-3515 has them" in capsys.readouterr().err


def test_a_zip_of_images_that_was_not_loaded_whole_is_named(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "imgs.zip").write_bytes(b"PK")
    refused(f"{tmp_path / 'imgs.zip'}: not a zip", load, f"slake:{tmp_path}")


@pytest.mark.parametrize(("kind", "modality"), [("vqa-rad", None), ("pathvqa", "pathology")])
def test_shards_are_read_with_the_images_in_them(tmp_path, capsys, kind, modality):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    warn_once.cache_clear()
    images = [save_image(tmp_path / "x.png", 99 * n).read_bytes() for n in (0, 1, 2, 0, 3)]
    rows = [{"image": {"bytes": image}, "question": f"Is {n}?", "answer": ("No", "A lung")[n % 2]}
            for n, image in enumerate(images)]  # fmt: skip
    for n, part in enumerate((rows[:4], rows[4:])):  # in parts of two rows
        file = tmp_path / "data" / f"test-0000{n}-of-00002.parquet"
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(part), file, 2)
    assert read(f"{kind}:{tmp_path}", "test") == [
        Sample(str(n), kind, "test", images[n], ((f"Is {n}?", row["answer"]),), modality,
               *(("open", "is") if n % 2 else ("closed", "yes/no"))) for n, row in enumerate(rows)
    ]  # fmt: skip
    assert len({s.image for s in load(f"{kind}:{tmp_path}", split="test")}) == 4
    assert "the rest is open" in capsys.readouterr().err
    file.unlink()
    refused("1 of 2 files of this split are here", load, f"{kind}:{tmp_path}", split="test")


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the project")
def test_the_real_data_sets_have_their_published_sizes_and_splits():
    found, slake, rad = {}, f"slake:{DATA / 'slake'}", f"vqa-rad:{DATA / 'vqa_rad'}"
    for spec, split, *sizes in (
        (slake, "train", 4918, 1943, 450),  # of 4 919 one has no answer
        (slake, "val", 1053, 422, 96), (slake, "test", 1061, 416, 96),
        (rad, "train", 1797, 1027, 313), (rad, "test", 451, 272, 203),
        (f"medmnist:{DATA}/pneumoniamnist/pneumoniamnist_rebuilt.npz", "test", 624, 624, 624),
    ):  # fmt: skip
        samples = load(spec, "vqa", split)
        n_closed = sum(s.answer_type == "closed" for s in samples)
        found[spec, split] = {s.image for s in samples}
        assert [len(samples), n_closed, len(found[spec, split])] == sizes, spec
    slakes = [found[slake, split] for split in ("train", "val", "test")]
    assert len(set.union(*slakes)) == 642  # 450 + 96 + 96: its English splits share no image
