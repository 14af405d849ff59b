"""A table of one's own is read, or refused with its place, in one line."""

import re

import pytest
from PIL import Image

from sources import show
from sources.tables import tenth
from tests.mini import error_line
from tests.sources.written import load, refused, save_image

HEAD, ROW = "image,question,answer\n", "a/b.png,What?,A lung\n"


def table(folder, text, name="t.csv"):
    save_image(folder / "a" / "b.png")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"table:{folder / name}"


@pytest.mark.parametrize(("text", "turn"), [
    (HEAD + ROW, None), ("\ufeff" + (HEAD + ROW).replace("\n", "\r\n"), None),
    ((HEAD + ROW).replace(",", ";"), None), (HEAD + "a/b.png,Is it é?,Yes", ("Is it é?", "Yes")),
    ("Image\tquestion\tANSWER\na\\b.png\tWhat?\tA lung", None),
    (HEAD + 'a/b.png,"What,\nor ""who""?",A lung\n', ('What,\nor "who"?', "A lung")),
    ('{"image": "a/b.png", "question": "What?", "answer": "A lung", "id": null}\n', None),
    ('{"Image": "a/b.png", "question ": "What?", "ANSWER": 1.0}\n', ("What?", "1")),
    ('image, question, answer\na/b.png, "Is it, or not?", "Yes"', ("Is it, or not?", "Yes")),
])  # fmt: skip
def test_a_table_is_read_whatever_wrote_it(tmp_path, text, turn):
    spec = table(tmp_path, text, "t.jsonl" if text.startswith("{") else "t.csv")
    (sample,) = load(spec, "vqa", "test")  # an only image is held out
    assert (sample.turns[0], sample.image) == (turn or ("What?", "A lung"), tmp_path / "a/b.png")
    assert (sample.answer_type == "closed", sample.source) == ("Yes" in sample.turns[0], "table/t")


@pytest.mark.parametrize(("text", "message"), [
    ("image,question\n", "lacks the column answer; its columns: image, question"),
    ("id,id," + HEAD, "has two columns of the same name"), ("", "lacks the column image"),
    (HEAD + ROW + "a/b.png,What, or who?,A lung", "line 3: 4 cells under 3 columns"),
    (HEAD + 'a/b.png,"What?,A', "line 2: unexpected end"),
    (b"image,question,answer\n\xe9,b,c", "line 2 is not UTF-8; save"),
    (HEAD + "https://x/y.png,What?,A", "a file: nothing is fetched"),
    ("id," + HEAD + f"7,{ROW}7,{ROW}", 'field "id" "7"; must be another than that of record 0'),
    ("modality," + HEAD + f"PET,{ROW}", "must be one of CT, MRI, X-ray, pathology, or empty"),
    ("split," + HEAD + f"tset,{ROW}", 'field "split" "tset"; must be one of train'),
    (HEAD + "../b.png,What?,A", "inside"), ("PAR1", "parquet file")])  # fmt: skip
def test_a_bad_table_is_refused_with_its_place(tmp_path, text, message):
    spec = table(tmp_path, text, "t.parquet" if text == "PAR1" else "t.csv")
    refused(re.escape(message), load, spec, split="test")


def test_empty_answers_are_left_out_and_rows_without_an_id_get_one_of_their_own(tmp_path):
    for empty in ('"answer": null, ', '"answer": "", '):
        row = '{"image": "a/b.png", "question": "What?", '
        text = f'{row}{empty}"split": "test"}}\n{row}"answer": "A", "split": "test"}}\n'
        (sample,) = load(table(tmp_path, text, "t.jsonl"), "vqa", "test")
        assert sample.id == "2"
    lacks = table(tmp_path, text.replace('"answer": "", ', ""), "t.jsonl")
    refused('field "answer" is missing', load, lacks, split="test")
    spec = table(tmp_path, "split,id," + HEAD + f"test,1,{ROW}test,,{ROW}")
    assert [s.id for s in load(spec, "vqa", "test")] == ["1", "row 1"]


def test_labels_of_training_images_alone_are_enough(tmp_path):
    (labels := tmp_path / "labels.json").write_text('{"c.png": "CT"}')
    save_image(tmp_path / "c.png")
    spec = table(tmp_path, "split," + HEAD + f"test,{ROW}train,c.png,What?,A lung\n")
    found = [load(spec, "vqa", split, router_labels=str(labels)) for split in ("train", "test")]
    assert [part[0].modality for part in found] == ["CT", None]


def test_the_tenth_is_the_same_however_a_parquet_file_is_reached(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    images = [save_image(tmp_path / "x.png", n).read_bytes() for n in range(40)]
    rows = [{"Image": {"bytes": image}, "question": "Q?", "answer": None if n else "A"}
            for n, image in enumerate(images)]  # fmt: skip
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "real" / "t.parquet")
    assert len(load(f"table:{tmp_path / 'real' / 't.parquet'}", "vqa", "train")) == 1  # of 40
    rows = [row | {"answer": "A"} for row in rows]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "real" / "t.parquet")
    real, link = ([s.id for s in load(f"table:{tmp_path / name / 't.parquet'}", "vqa", "test")]
                  for name in ("real", "link"))  # fmt: skip
    assert real == link and 0 < len(real) < 40


def test_no_image_of_the_data_is_written_over(tmp_path, capsys):
    before = save_image(tmp_path / "0.png").read_bytes()
    spec = table(tmp_path, HEAD + "0.png,What?,A lung\n")
    line = error_line(capsys, show.main, "--data", spec, "--out", tmp_path)
    assert f"{tmp_path / '0.png'} is an image of the data" in line
    assert (tmp_path / "0.png").read_bytes() == before


def test_splits_are_the_tables_or_a_fixed_tenth_and_show_tells_what_is_odd(tmp_path, capsys):
    row = "valid,7,mr,open,a/b.png,Is it?,yes\n"
    spec = table(tmp_path, "split,id,modality,answer_type," + HEAD + row + row.replace("valid",
                 "train").replace("open", "") + row.replace("valid,7", "train,8"))  # fmt: skip
    (sample,), (other, _) = (load(spec, "vqa", s) for s in ("val", "train"))
    assert (sample.id, sample.modality, sample.answer_type) == ("7", "MRI", "open")
    assert other.answer_type == "closed"
    assert "1 of 1 images are in more than one split" in capsys.readouterr().err
    show.main(["--data", spec, "--out", str(tmp_path / "o"), "--samples", "1"])
    said = capsys.readouterr().out
    assert "USER: <image: 49 patches>\nIs it? ASSISTANT:[[ yes<|endoftext|>]]" in said
    assert "train: 2 questions, 1 images; MRI 2; closed 1, open 1\nval: 1 questions" in said
    assert "odd: 1 images are in more than one split\nodd: 1 questions are asked again" in said
    assert Image.open(tmp_path / "o" / "0.png").size == (112, 112)
    names = {f"{n}.png" for n in range(1000)}
    assert 70 < len(tenth(names)) < 130
    assert tenth(names | {"1000.png"}) - {"1000.png"} == tenth(names)  # as a table grows
