"""Published weights in each form, whole or in shards; a damaged or hostile file is refused."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from config import UserError
from sources.tensorfiles import header, open_tensors, read_tensors, weight_files

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.tensor(7)}


def write(path, tensors=TENSORS, form="zip"):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")


def check_same(directory):
    found = list(read_tensors(directory))
    assert sorted(name for name, _ in found) == sorted(TENSORS)
    for name, tensor in found:
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])


def refused(path, message=""):
    """Reading ends in one line that begins with the file."""
    with pytest.raises(UserError, match=rf"^{path}: [^\n]*{re.escape(message)}[^\n]*\Z"):
        list(open_tensors(path))


@pytest.mark.parametrize(
    ("name", "form"),
    [("model.safetensors", ""), ("pytorch_model.bin", "zip"), ("pytorch_model.bin", "legacy")],
)
def test_each_form_holds_the_same_whole_or_in_shards_which_come_first(tmp_path, name, form):
    write(tmp_path / name, TENSORS, form)
    check_same(tmp_path)
    where = {k: f"{i % 2}.{name.split('.')[1]}" for i, k in enumerate(TENSORS)}
    for file in set(where.values()):
        write(tmp_path / file, {k: TENSORS[k] for k in TENSORS if where[k] == file}, form)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    assert weight_files(tmp_path) == [tmp_path / f"{i}.{name.split('.')[1]}" for i in (0, 1)]
    check_same(tmp_path)


@pytest.mark.parametrize("where", [{}, [], None, {"a": "../secret.safetensors"}, {"a": "/x"}])
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path, where):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=f"^{index}: "):
        weight_files(tmp_path)


def test_missing_files_are_named_and_safetensors_come_before_bin(tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors: no such file, nor pytorch_model.bin"):
        weight_files(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):
        refused(tmp_path / name, "no such file")
        (tmp_path / name).touch()
        assert weight_files(tmp_path) == [tmp_path / name]
    with pytest.raises(UserError, match=r"x\.safetensors: no such file"):
        header(tmp_path / "x.safetensors")


def test_a_header_gives_the_types_without_the_tensors(tmp_path):
    write(tmp_path / "x.safetensors")
    assert header(tmp_path / "x.safetensors") == {"a": "F32", "b": "BF16", "c": "I64"}


def with_header(entries):
    text = f"{{{entries}}}"
    return struct.pack("<Q", len(text)) + text.encode() + bytes(24)


ENTRY = '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}'
DAMAGED = {
    "ends beyond the file": with_header(ENTRY.replace("24]", "1000000000000]")),
    "claims terabytes": with_header(ENTRY.replace("2, 3", "1000000, 1000000")),
    "has no such type": with_header(ENTRY.replace("F32", "Q4")),
    "is longer than the file": struct.pack("<Q", 2**62) + bytes(24),
    "is not JSON": with_header("{" * 64),
    "has a name twice": with_header(f"{ENTRY}, {ENTRY}"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_inconsistent_header_is_refused(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(ENTRY))
    assert dict(open_tensors(path))["a"].shape == (2, 3)
    path.write_bytes(DAMAGED[damage])
    refused(path, "damaged")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_truncated_file_is_refused_also_while_it_is_read(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write(path)
    for n in (path.stat().st_size - 1, path.stat().st_size // 2, 9, 8, 1, 0):
        os.truncate(path, n)
        refused(path, "damaged")
    path = tmp_path / "y.safetensors"
    path.write_bytes(save(TENSORS))
    tensors = open_tensors(path)
    next(tensors)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"^{path}: damaged"):
        next(tensors)


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form):
    path, state = tmp_path / "x.bin", TENSORS | {"d": Touch(tmp_path / "executed")}
    write(path, state, form)
    if form == "pickle":
        path.write_bytes(pickle.dumps({"d": Touch(tmp_path / "executed")}, protocol=2))
    refused(path, "not only tensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, {"a": {"b": 2}}])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    write(tmp_path / "x.bin", content)
    refused(tmp_path / "x.bin")
