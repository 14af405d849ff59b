"""JSON files are read so that every mistake is named with its file, record and field."""

import os
import re
from pathlib import Path

import pytest

from config import UserError
from sources.records import Record, read_json, read_lines, read_records, shown

NAN = float("nan")


def read(kind, value, folder=Path("/etc")):
    record = Record(Path("x.json"), 3, {"a": value} if value != "" else {})
    how = {"text": record.text, "number": record.text_or_number,
           "choice": lambda name: record.choice(name, ("CT", "X-ray")),
           "image": lambda name: record.image(name, folder)}  # fmt: skip
    return how[kind]("a")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [("text", " Is it? ", "Is it?"), ("number", 4, "4"), ("number", 2.5, "2.5"),
     ("number", " ", ""), ("choice", "x-RAY ", "X-ray"),
     ("image", "a/../missing.jpg", Path("/etc/missing.jpg"))],
)  # fmt: skip
def test_a_field_is_read_without_spaces_at_its_ends(kind, value, expected):
    assert read(kind, value) == expected


@pytest.mark.parametrize(
    ("kinds", "value", "written"),
    [("text choice image", 3, "3"), ("text choice image", " ", '" "'),
     ("text number choice image", None, "null"), ("text number choice image", "", "is missing"),
     ("text number choice", "\ud83d?", '"\\ud83d?"'),  # half a surrogate pair
     ("number", True, "true"), ("number", NAN, "NaN"), ("number", ["b"], '["b"]'),
     ("choice", "PET", '"PET"'), ("image", "../b.jpg", '"../b.jpg"'),
     ("image", "/etc/hosts", '"/etc/hosts"'),
     ("image", "link.jpg", '"link.jpg"'),  # to a file outside the folder
     ("image", "a\0b", '"a\\u0000b"'), ("image", "a" * 300, '"aaa')],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_record_and_value(tmp_path, kinds, value, written):
    (tmp_path / "link.jpg").symlink_to(tmp_path.parent / "outside.jpg")
    start = r'^x\.json: record 3 \(from 0\): field "a" '
    for kind in kinds.split():
        with pytest.raises(UserError, match=rf"{start}{re.escape(written)}[^\n]*; must be [^\n]*$"):
            read(kind, value, tmp_path)


def test_values_that_are_endless_or_have_too_many_digits_are_shown_in_60_characters():
    endless, doubling = [], ["x"]
    endless.append(endless)
    for _ in range(40):  # 2 ** 40 leaves
        doubling = [doubling, doubling]
    assert shown({"a": [1, None]}) == '{"a": [1, null]}'
    assert shown("b" * 100) == '"' + "b" * 59 and len(shown(doubling)) == 60
    assert shown(endless) == "a list" and shown({1}) == "a set"
    with pytest.raises(UserError, match="fewer digits"):
        read("number", 10**5000)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'[{"a": 1},\n {"a": 2,}]', "line 2, column"), (b"", "line 1, column 1"),
     (b'["\xff"]', "not JSON"), (b"[" * 100_000, "not JSON"),
     (b'[{"a": 1, "b": 2, "b": 3}]', '"b" twice'), (b'{"rows": []}', 'list, is {"rows": []}'),
     (b'[{"a": 1}, "x"]', 'record 1 (from 0) is not an object: "x"')],
)  # fmt: skip
def test_a_file_that_is_no_list_of_objects_is_refused_with_the_place(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{file}: .*{re.escape(message)}[^\n]*$"):
        read_records(file)


def test_records_are_counted_from_0_and_lines_from_1_and_empty_ones_skipped(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('[{"a": 1}, {"a": 2}]', encoding="utf-8-sig")  # with a byte order mark
    assert [(r.number, r.values) for r in read_records(file)] == [(0, {"a": 1}), (1, {"a": 2})]
    with pytest.raises(UserError, match="must be a JSON object, is"):
        read_json(file, dict)
    file.write_text('{"a": 1}\n\n{"a": 2}\n{"a"\n')
    lines = read_lines(file)
    first, second = next(lines), next(lines)
    assert (first.values, second.values) == ({"a": 1}, {"a": 2})
    with pytest.raises(UserError, match=f'^{file}: line 3: field "a" 2; must be'):
        second.text("a")
    with pytest.raises(UserError, match=f"^{file}: line 4 is not JSON"):
        next(lines)


def test_a_long_line_and_a_large_file_are_refused_before_they_are_in_memory(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": ' + b" " * (1_000_000 - 9) + b"1}\n" + b" " * 1_000_001)
    os.truncate(file, 4_000_000_000)  # sparse: no room is taken
    lines = read_lines(file)
    assert next(lines).values == {"a": 1}
    with pytest.raises(UserError, match="line 2 is longer than 1000000 bytes"):
        next(lines)
    os.truncate(file, 4_000_000_001)
    for reader in (read_json, lambda file: next(read_lines(file))):
        with pytest.raises(UserError, match="4000000001 bytes; at most 4000000000"):
            reader(file)


@pytest.mark.parametrize("name", ["nowhere", ".", "pipe", "a\0b"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    for reader in (read_json, lambda file: next(read_lines(file))):
        with pytest.raises(UserError, match=f"^{tmp_path}"):
            reader(tmp_path / name)
