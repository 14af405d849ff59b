"""JSON files are read so that every mistake is named with its file, record and field."""

import re
from pathlib import Path

import pytest

from sources.records import Record, read_lines, read_records
from tests.sources.written import refused


@pytest.mark.parametrize(("kind", "values"), [
    ("text", (3, " ", None, "\ud83d?")),  # half a surrogate pair
    ("text_or_number", (None, True, float("nan"), ["b"], 10**5000, "\ud83d?")),
    ("choice", (3, "PET")), ("image", (3, "../b.jpg", "/etc/hosts", "link.jpg", "a\0b")),
])  # fmt: skip
def test_a_wrong_field_is_named_with_its_record(tmp_path, kind, values):
    (tmp_path / "link.jpg").symlink_to(tmp_path.parent / "outside.jpg")
    more = {"choice": [("CT", "X-ray")], "image": [tmp_path]}.get(kind, ())
    message = r'^x\.json: record 3 \(from 0\): field "a" [^\n]*; must be [^\n]*$'
    for value in values:
        refused(message, getattr(Record(Path("x.json"), 3, {"a": value}), kind), "a", *more)


def test_a_link_may_lead_into_the_folder_of_its_file_or_where_it_is_allowed_to(tmp_path):
    images, outside = tmp_path / "data" / "images", tmp_path / "store"
    images.mkdir(parents=True)
    outside.mkdir()
    for name, target in (("in", "a"), ("near", "../b"), ("out", outside / "x"), ("sub", outside)):
        (images / name).symlink_to(target)
    (tmp_path / "linked").symlink_to(images)
    names = {"in": "sub/../in", "near": "./near", "out": "out", "sub/x": "sub/x",
             "a": f"{tmp_path}/linked/a"}  # fmt: skip
    record = Record(images.parent / "x.json", 0, names)
    for name in names:
        is_outside = name in ("out", "sub/x")
        assert record.image(name, images, follow_links=is_outside) == images / name
        if is_outside:
            refused(f"a link to {outside}/x, which --follow-links", record.image, name, images)


@pytest.mark.parametrize(("content", "message"), [
    ('[{"a": 1},\n {"a": 2,}]', "line 2, column"), ("[" * 100_000, "not JSON"),
    ('[{"a": 1, "b": 2, "b": 3}]', '"b" twice'), ('{"rows": []}', 'list, is {"rows": []}'),
    ('[{"a": 1}, "x"]', 'record 1 (from 0) is not an object: "x"')])  # fmt: skip
def test_a_file_that_is_no_list_of_objects_is_refused_with_the_place(tmp_path, content, message):
    file = tmp_path / "x.json"
    file.write_text(content)
    refused(f"^{file}: .*{re.escape(message)}", read_records, file)


def test_records_are_counted_from_0_and_lines_from_1_and_empty_ones_skipped(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('[{"a": 1}, {"a": 2}]', encoding="utf-8-sig")  # with a byte order mark
    assert [(r.number, r.values) for r in read_records(file)] == [(0, {"a": 1}), (1, {"a": 2})]
    file.write_text('{"a": 1}\n\n{"a": 2}\n{"a"\n')
    lines = read_lines(file)
    first, second = next(lines), next(lines)
    assert (first.values, second.values) == ({"a": 1}, {"a": 2})
    refused(f'^{file}: line 3: field "a" 2; must be', second.text, "a")
    refused(f"^{file}: line 4 is not JSON", next, lines)
    refused(f"^{tmp_path}: is not a regular file", list, read_lines(tmp_path))
