"""Phi-2 at full size, with random weights: 15 GB of memory, 7 GB of disk.

python -m pytest -m slow tests/slow/test_fullsize.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(what, directory):
    command = [sys.executable, "-m", "tests.fullsize", what, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fullsize") / "weights"
    if shutil.disk_usage(directory.parent).free < 8e9:
        pytest.skip("less than 8 GB of disk")
    found = run("write", directory)
    assert 6.1e9 < found["bytes"] < 6.2e9
    assert len(list((directory / "phi").glob("*.safetensors"))) == 2
    yield directory
    shutil.rmtree(directory)


def test_phi_2_loads_in_its_own_size_and_answers(shards):
    found = run("dense", shards)
    assert found["peak_bytes"] <= 1.1 * found["bytes"]
    assert found["positions"] > 576 and len(found["tokens"]) == 8


def test_the_upcycled_model_answers_within_24_gb(shards):
    found = run("sparse", shards)
    assert found["parameters"] > 6.1e9 and len(found["tokens"]) == 8
    assert found["final_peak_bytes"] < 24e9
