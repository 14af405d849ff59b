"""Files damaged at random are refused in one line that names them, or give the right shapes."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from config import UserError
from sources.medmnist import read_split
from sources.tensorfiles import open_tensors

pytestmark = pytest.mark.slow
TENSORS = {f"blocks.{i}.weight": torch.randn(8, i + 1) for i in range(4)}


def write_npz(file):
    images, labels = np.zeros((6, 28, 28), np.uint8), np.zeros((6, 1), np.uint8)
    images[:] = np.random.default_rng(0).integers(256, size=images.shape)
    np.savez_compressed(file, test_images=images, test_labels=labels)


def read_npz(file):
    read_split.cache_clear()
    images, labels = read_split(file, "test")
    assert images.shape == (6, 28, 28) and labels.shape == (6,)


def read_weights(file):  # shapes are checked against the model's, a weight has no checksum
    assert all(isinstance(tensor, torch.Tensor) for _, tensor in open_tensors(file))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "write", "read"), [
    ("octmnist.npz", write_npz, read_npz),
    ("x.bin", lambda file: torch.save(TENSORS, file), read_weights),
    ("x.safetensors", lambda file: save_file(TENSORS, file), read_weights)])  # fmt: skip
def test_any_damage_is_refused_in_one_line_or_does_no_harm(tmp_path, name, write, read):
    file, generator, n_refused = tmp_path / name, random.Random(0), 0
    write(file)
    whole = file.read_bytes()
    damaged = [whole[: generator.randrange(len(whole))] for _ in range(300)]
    for i in range(3000):  # one bit or four, at the beginning or near the end
        content = bytearray(whole)
        for _ in range((1, 4)[i % 2]):
            at = generator.choice((0, len(whole) - 400)) + generator.randrange(400)
            content[at] ^= 1 << generator.randrange(8)
        damaged.append(bytes(content))
    for content in damaged:
        file.write_bytes(content)
        try:
            read(file)
        except UserError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            n_refused += 1
    assert n_refused > 900
