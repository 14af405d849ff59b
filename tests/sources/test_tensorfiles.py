"""Published weights in each form, whole or in shards; a damaged or hostile file is refused."""

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sources.tensorfiles import header, open_tensors, read_tensors, weight_files
from tests.sources.written import refused

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.tensor(7)}


def write(path, tensors=TENSORS, form="zip"):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize(("name", "form"), [
    ("model.safetensors", ""), ("pytorch_model.bin", "zip"), ("pytorch_model.bin", "legacy"),
])  # fmt: skip
def test_each_form_is_read_whole_or_in_shards_and_refused_if_truncated(tmp_path, name, form):
    write(tmp_path / name, TENSORS, form)
    whole = dict(read_tensors(tmp_path))
    where = {k: f"{i % 2}.{name.split('.')[1]}" for i, k in enumerate(TENSORS)}
    for file in set(where.values()):
        write(tmp_path / file, {k: TENSORS[k] for k in TENSORS if where[k] == file}, form)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    assert weight_files(tmp_path) == [tmp_path / f"{i}.{name.split('.')[1]}" for i in (0, 1)]
    for found in (whole, dict(read_tensors(tmp_path))):
        torch.testing.assert_close(found, TENSORS, rtol=0, atol=0)  # types too
    if name == "model.safetensors":
        assert header(tmp_path / name) == {"a": "F32", "b": "BF16", "c": "I64"}
    for n in ((tmp_path / name).stat().st_size - 1, 9, 0):
        os.truncate(tmp_path / name, n)
        refused(f"^{tmp_path}/{name}: .*damaged", list, open_tensors(tmp_path / name))


def test_missing_files_and_bad_indices_are_named_and_safetensors_come_before_bin(tmp_path):
    refused(r"model.safetensors: no such file, nor pytorch_model.bin", weight_files, tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):
        refused(f"^{tmp_path}/{name}: .*no such file", list, open_tensors(tmp_path / name))
        (tmp_path / name).touch()
        assert weight_files(tmp_path) == [tmp_path / name]
    index = tmp_path / "model.safetensors.index.json"
    for where in ({}, None, {"a": "../secret.safetensors"}):
        index.write_text(json.dumps({"weight_map": where}))
        refused(f"^{index}: ", weight_files, tmp_path)


def test_a_file_is_opened_once_and_again_only_when_much_of_it_is_mapped(tmp_path, monkeypatch):
    write(file := tmp_path / "x.safetensors", {str(i): torch.full((2,), i) for i in range(9)})
    monkeypatch.setattr("sources.tensorfiles.safe_open", spy := Mock(side_effect=safe_open))
    monkeypatch.setattr("sources.tensorfiles.MAX_MAPPED", 40)  # of 9 * 16 bytes: three times 48
    assert sum(t[1] for _, t in open_tensors(file)) == 36 and spy.call_count == 1 + 3  # the header


class Touch:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [{"a": Touch()}, [1, 2], {"a": 1}, {1: torch.zeros(1)}])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_code_or_anything_but_named_tensors_is_refused(tmp_path, monkeypatch, content, form):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.bin", content, form)
    refused(f"^{tmp_path}/x.bin: .*", list, open_tensors(tmp_path / "x.bin"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]
