"""SLAKE, VQA-RAD and PathVQA are read in every form, and pickles never executed."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest

from config import UserError, warn_once
from data import Sample
from sources.load import load_samples
from sources.records import open_file
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


def test_a_folder_in_no_known_form_is_told_which_there_are(tmp_path):
    def refused(kind, message):
        with pytest.raises(UserError, match=message):
            load_samples([f"{kind}:{tmp_path}"], "vqa", "train")

    refused("slake", "no SPLIT.json in it")
    refused("vqa-rad", r"no VQA_RAD .* or SPLITset.json or data/SPLIT-\*.parquet or")
    refused("llava", "train.json: No such")
    slake(tmp_path, SLAKE)
    refused("pathvqa", "no qas/SPLIT/SPLIT_qa.pkl or .*looks like slake:")
    rad(tmp_path, RAD, images="elsewhere")
    refused("vqa-rad", "no folder images or VQA_RAD")


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


SPLITS = {"slake": ("train", "val", "test"), "pathvqa": ("test",)}
TWO = [CONVERTED, CONVERTED | {"img_id": "t_2"}]


def owners(kind, folder, is_real):
    """A data set as published; images of PathVQA, which may not be passed on, are made up."""
    if is_real and kind != "pathvqa":
        return DATA / ("slake" if kind == "slake" else "vqa_rad")
    for split in ("train", "validate", "test"):
        slake(folder, SLAKE, SLAKE | {"qid": 12, "answer": split}, file=f"{split}.json")
    rad(folder, RAD, RAD | {"qid": 7, "phrase_type": "test_para", "question_frame": "A?"})
    file = DATA / "pathvqa" / "pvqa_test.json"
    pathvqa(folder, values := json.loads(file.read_text())[:99] if is_real else TWO)
    for i, value in enumerate(values):
        save_image(folder / "images" / "test" / f"{value['img_id']}.jpg", 40 * i)
    return folder


def hub_json(source, folder, nested):
    for name in ("train", "validate", "test"):
        shutil.copy(source / f"{name}.json", folder / f"{name.replace('ate', 'ation')}.json")
    archive = shutil.make_archive(folder / "imgs", "zip", source, "imgs")
    if nested:
        shutil.unpack_archive(archive, folder / "imgs")
        os.remove(archive)


def data_rad(samples, folder, split):
    if not (folder / "images").exists():
        (folder / "images").symlink_to(samples[0].image.parent)
    rows = [RAD | {"qid": s.id, "question": s.turns[0][0], "answer": s.turns[0][1], "answer_type":
            s.answer_type, "image_name": s.image.name} for s in samples]  # fmt: skip
    (folder / f"{split}set.json").write_text(json.dumps(rows))


def shards(samples, folder, split):
    """Two, with an image's bytes at each of its questions."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow as pa

    rows = [{"image": {"bytes": s.image.read_bytes()}, "question": s.turns[0][0],
             "answer": s.turns[0][1]} for s in samples]  # fmt: skip
    n = min(len(rows), 2)
    for i in range(n):
        file = folder / f"{split}-0000{i}-of-0000{n}.parquet"
        part = rows[i * len(rows) // n : (i + 1) * len(rows) // n]
        pq.write_table(pa.Table.from_pylist(part), file, max(1, len(rows) // 9))


@pytest.mark.parametrize("is_real", [False, True])
@pytest.mark.parametrize(("kind", "write", "fields"), [
    ("slake", False, "id answer_type kind modality"), ("slake", True, "id"),
    ("vqa-rad-3515", data_rad, "id answer_type"), ("vqa-rad", shards, "modality"),
    ("pathvqa", shards, "answer_type kind modality")])  # fmt: skip
def test_a_set_in_another_form_is_the_same(tmp_path, kind, write, fields, is_real, capsys):
    if is_real and not DATA.is_dir():
        pytest.skip("the data sets are not beside the project")
    (folder := tmp_path / "form").mkdir()
    source, splits = owners(kind, tmp_path, is_real), SPLITS.get(kind, ("train", "test"))
    found = {s: load_samples([f"{kind}:{source}"], "vqa", s, open_images=False) for s in splits}
    if kind == "slake":
        hub_json(source, folder, nested=write)
    for split, theirs in found.items():
        if kind != "slake":
            write(theirs, folder, split)
        ours = load_samples([f"{kind}:{folder}"], "vqa", split, open_images=not is_real)
        assert len({s.image for s in ours}) <= 2 * len({s.image for s in theirs})  # two shards
        for s, t in zip(ours, theirs, strict=True):
            assert (s.turns, open_file(s.image)) == (t.turns, open_file(t.image))
            assert all(getattr(s, field) == getattr(t, field) for field in fields.split())
            if write is shards:
                assert (s.answer_type == "closed") == (s.turns[0][1].lower() in ("yes", "no"))
    assert ("the rest is open" in capsys.readouterr().err) == (write is shards)
    if kind == "pathvqa":
        (folder / "test-00001-of-00002.parquet").unlink()
        with pytest.raises(UserError, match="1 of 2 files of this split are here"):
            load_samples([f"pathvqa:{folder}"], "vqa", "test")


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
