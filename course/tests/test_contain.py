"""Cheating is refused, in a sentence with its line."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

import metrics
from config import UserError
from course import contain, score
from course.tests.handed_in import BUDGET, GOOD, small_base
from course.vet import only_router, vet
from sources import records


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
    with small_base(tmp_path_factory.mktemp("score")) as base:
        yield base


BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = "    def gate(self, logits, mask, x):\n"
CHEATS = {  # name: (the submission, the line, a word of the message)
    "modality": (BODY + "    needs = ('modality',)\n" + GATE + "        return x", 3, "modality"),
    "hints": (BODY + "    def forward(self, x, mask, hints):\n        return x", 3, "forward"),
    "loss": ("import model\nmodel.MedMoE.loss = None\n", 1, "imports model"),
    "torch": ("import torch.nn.functional as F\nF.cross_entropy = min\n", 2, "changes F.cross"),
    "file": (BODY + GATE + "        open('x', 'w')", 4, "open"),
    "torch save": ("import torch\ntorch.save(1, 'x')\n", 2, "save"),
    "from torch": ("from torch import load\n", 1, "load"),
    "os": ("import math\nimport os\n", 2, "imports os"),
    "os elsewhere": ("import dataclasses\ndataclasses.sys.exit()\n", 2, "sys"),
    "routers' os": ("import routers\nrouters.sys.exit()\n", 2, "routers.sys"),
    "process": ("from subprocess import run\n", 1, "imports subprocess"),
    "import": ("x = 1\n__import__('os')\n", 2, "__import__"),
    "classes": ("().__class__.__base__.__subclasses__()\n", 1, "__"),
    "exec": ("exec('1')\n", 1, "exec"),
    "extension": ("import torch.utils.cpp_extension\n", 1, "cpp_extension"),
    "threads": ("import torch\ntorch.set_num_threads(4)\n", 2, "set_num_threads"),
    "seed": ("import torch\ntorch.manual_seed(0)\n", 2, "manual_seed"),
    "hook": (
        BODY + "    def update(self, load):\n        self.register_forward_hook(1)",
        4,
        "hook",
    ),
    "oracle": ("from routers import OracleRouter\n", 1, "OracleRouter"),
    "syntax": ("def f(:\n", 1, "not Python"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_vetting_names_the_line_of_what_is_not_allowed(name):
    text, line, word = CHEATS[name]
    with pytest.raises(UserError, match=rf"^mine.py, line {line}: .*{word}"):
        vet(text, "mine.py")


def test_vetting_accepts_honest_routers():
    vet(GOOD, "mine.py")
    vet(
        "import math\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
        "from moe import MLP\n" + BODY + "    needs = ('prompt', 'previous')\n"
        "    def __init__(self, d, e, **more):\n        super().__init__(d, e, **more)\n"
        "        self.scale = nn.Parameter(torch.zeros(e))\n"
        "        self.register_buffer('bias', torch.zeros(e))\n"
        "    def update(self, load):\n        self.bias += 0.1 * load.sign()\n",
        "mine.py",
    )
    assert only_router(GOOD + "\n\nclass Other(Mine):\n    pass\n", "mine.py") == "Other"


AT_RUN_TIME = {  # name: (a submission that is not vetted, words of the message)
    "looks ahead": (GOOD.replace("sums_to_one = True", "causal = False"), None),
    "patches the loss": (GOOD + "\nimport model\nmodel.MedMoE.loss = lambda *a: None\n", "changed"),
    "writes a file, and swallows the refusal": (
        GOOD + "\ntry:\n    open(FILE, 'w')\nexcept OSError:\n    pass\n",
        "line 16: writes a file",
    ),
    "starts a process": (
        GOOD.replace("# top-k", "import os\n        os.system('true')"),
        "line 13: starts a process",
    ),
    "reads the modality": (GOOD.replace("sums", "needs = ('modal' + 'ity',)\n    sums"), "needs"),
    "raises": (GOOD.replace("# top-k", "1 / 0"), "line 12: ZeroDivisionError"),
    "hangs": (GOOD.replace("# top-k", "while True: pass"), "s, while training"),
}  # fmt: skip


DAILY = ("writes a file, and swallows the refusal", "reads the modality")


@pytest.fixture(name="outcomes", scope="module")
def _outcomes(request, base, tmp_path_factory):
    """{name: message} of those of AT_RUN_TIME, two at a time; and the file that one may write."""
    is_daily = "not slow" in request.config.getoption("-m")
    names = DAILY if is_daily else tuple(AT_RUN_TIME)
    file = tmp_path_factory.mktemp("outside") / "written"
    derived = score.derive("", "", 1)
    job = asdict(BUDGET) | {
        "class": "Mine", "init": str(base), "seed": 1, "where": "mine.py",
        "data": f"phantoms:8+{derived.first}",
    }  # fmt: skip

    def run(name):
        text = AT_RUN_TIME[name][0].replace("FILE", repr(str(file)))
        try:
            result = score.run_seed(job, text, 10 if name == "hangs" else 100)
        except UserError as error:
            return str(error)
        return result["closed"]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(run, names), strict=True)), file


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in AT_RUN_TIME]
)
def test_what_vetting_misses_is_caught_at_run_time(outcomes, name):
    message, expected = outcomes[0][name], AT_RUN_TIME[name][1]
    if expected is None:
        assert message is None, "generation refuses it, so it has a loss and no accuracy"
    else:
        assert expected in (message or "no message"), message
        assert message.startswith("mine.py") and "\n" not in message


def test_no_submission_wrote_outside_of_its_folder(outcomes):
    assert not outcomes[1].exists()


def test_children_do_not_know_the_secret(tmp_path, monkeypatch):
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    code = "import os, sys; sys.exit('lecturer' in str(os.environ))"
    assert contain.run([sys.executable, "-c", code], tmp_path, 60).code == 0


def test_when_one_seed_fails_the_others_are_stopped(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        waits = []
        for folder in folders:
            folder.mkdir()
            waits.append(pool.submit(contain.run, sleep, folder, 50))
        while len(contain.RUNNING) < 2:
            time.sleep(0.01)
        contain.stop_all()
        assert [wait.result().code for wait in waits] == [-9, -9]
    assert time.monotonic() - began < 20 and not contain.RUNNING


def test_the_snapshot_notices_functions_methods_and_constants(monkeypatch):
    before = contain.snapshot()
    assert contain.changed(before) == []
    monkeypatch.setattr(metrics, "mean", lambda values: 1.0)
    monkeypatch.setattr(records.Record, "text", None)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)
    monkeypatch.setattr(score.Budget, "steps", 1)
    found = contain.changed(before)
    assert {"metrics.mean", "sources.records.Record.text", "torch.nn.functional.cross_entropy"} <= {
        *found
    }
    monkeypatch.undo()
    code = metrics.mean.__code__
    metrics.mean.__code__ = (lambda values: 1.0).__code__
    try:
        found = contain.changed(before)  # also under the names that other modules import it by
        assert "metrics.mean" in found and all(name.endswith(".mean") for name in found)
    finally:
        metrics.mean.__code__ = code
