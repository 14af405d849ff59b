"""Cheating is refused, in a sentence with its line: by the source, and while it runs."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

import metrics
from config import UserError
from course import contain, score, vet
from course.tests.handed_in import BUDGET, GOOD, small_base

BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = "    def gate(self, logits, mask, x):\n"
CHEATS = {  # name: (the submission, the line, a word of the message)
    "modality": (BODY + "    needs = ('modality',)\n" + GATE + "        return x", 3, "modality"),
    "modality's type": (BODY + "    needs: tuple = ('modality',)\n", 3, "modality"),
    "hints": (BODY + GATE + "        return x.hints.modality", 4, "reads the true modality"),
    "forward": (BODY + "    def forward(self, x, mask, hints):\n        return x", 3, "forward"),
    "its call": (BODY + "    _call_impl = None\n", 3, "replaces Router._call_impl"),
    "alias": ("from routers import Router as R\nclass A(R):\n    forward = 1\n", 3, "forward"),
    "dunder": (BODY + "    def __call__(self):\n        return 1", 3, "defines __call__"),
    "loss": ("import model\nmodel.MedMoE.loss = None\n", 1, "imports model"),
    "torch": ("import torch.nn.functional as F\nF.cross_entropy = min\n", 2, "changes F.cross"),
    "del": ("import torch\ndel torch.nn\n", 2, "changes torch.nn"),
    "file": (BODY + GATE + "        open('x', 'w')", 4, "open"),
    "torch save": ("import torch\ntorch.save(1, 'x')\n", 2, "save"),
    "from torch": ("from torch import load\n", 1, "load"),
    "os": ("import math\nimport os\n", 2, "imports os"),
    "the first": ("import os\nimport sys\n", 1, "imports os"),
    "os elsewhere": ("import dataclasses\ndataclasses.sys.exit()\n", 2, "sys"),
    "private": ("import functools\nfunctools._c3_merge\n", 2, "_c3_merge"),
    "relative": ("from . import x\n", 1, "imports ..x"),
    "routers' os": ("import routers\nrouters.sys.exit()\n", 2, "routers.sys"),
    "process": ("from subprocess import run\n", 1, "imports subprocess"),
    "import": ("x = 1\n__import__('os')\n", 2, "__import__"),
    "classes": ("().__class__.__base__.__subclasses__()\n", 1, "__"),
    "frames": ("def f(e):\n    return e.f_back\n", 2, "f_back"),
    "exec": ("exec('1')\n", 1, "exec"),
    "extension": ("import torch.utils.cpp_extension\n", 1, "cpp_extension"),
    "threads": ("import torch\ntorch.set_num_threads(4)\n", 2, "set_num_threads"),
    "seed": ("import torch\ntorch.manual_seed(0)\n", 2, "manual_seed"),
    "hook": (BODY + GATE + "        self.register_forward_hook(1)", 4, "hook"),
    "oracle": ("from routers import OracleRouter\n", 1, "OracleRouter"),
    "syntax": ("def f(:\n", 1, "not Python"),
    "nul": ("x\0", 1, "not Python"),
    "nested": ("x = " + "-" * 5000 + "1\n", 1, ""),
}


@pytest.mark.parametrize("name", CHEATS)
def test_vetting_names_the_line_of_what_is_not_allowed(name):
    text, line, word = CHEATS[name]
    with pytest.raises(UserError, match=rf"^mine.py, line {line}: .*{word}"):
        vet.vet(text, "mine.py")


HONEST = (
    "import math\nimport routers\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
    "from moe import MLP\nclass Mine(routers.TopKRouter):\n    needs = ('prompt', 'previous')\n"
    "    def __init__(self, d, e, **more):\n        super().__init__(d, e, **more)\n"
    "        self.scale = nn.Parameter(torch.zeros(e))\n        self._open = os = self.scale.save\n"
    "        self.register_buffer('bias', torch.zeros(e))\n"
    "    def update(self, load):\n        self.bias += 0.1 * load.sign()\n"
    "class Other(nn.Module):\n    def forward(self, x):\n        return x\n"
).replace(" os =", "")


def test_vetting_accepts_honest_routers():
    vet.vet(GOOD, "mine.py")
    vet.vet(HONEST, "mine.py")
    assert vet.only_router(HONEST, "mine.py") == "Mine", "the other class is no router"


def test_a_submission_has_one_router_that_no_other_inherits_from(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(GOOD + "\n\nclass Other(Mine):\n    pass\n")
    assert vet.only_router(file.read_text(), "mine.py") == "Other"
    assert vet.read_submission(f"{file}:Mine") == (file, file.read_text(), "Mine")
    with pytest.raises(UserError, match=r"must have one .* has Mine, B"):
        vet.only_router(GOOD + "class B(Router):\n    pass\n", "mine.py")
    with pytest.raises(UserError, match="has none"):
        vet.only_router("class Router:\n    pass\n", "mine.py")
    no_spec = "not FILE.py:Class"
    for spec, word in ((f"{file}:No", "it has Mine, Other"), (f"{file}:", no_spec),
                       ("absent.py:Mine", no_spec), (f"{tmp_path}:Mine", no_spec)):  # fmt: skip
        with pytest.raises(UserError, match=word):
            vet.read_submission(spec)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        vet.read_submission(f"{file}:Mine")


def test_lines_of_code_leave_out_blank_lines_comments_and_docstrings():
    assert vet.count_lines(GOOD) == 6
    assert vet.count_lines("x = '''a\n\nb'''\n\n# no\ny = (1,\n     2)  # yes\n") == 5
    assert vet.count_lines("class A:\n    '''Two\n    lines.'''\n\n    x = 1\n") == 2


# While it runs

ACTIONS = """
attempt(lambda: open(OUTSIDE, 'w'))
attempt(lambda: os.open(OUTSIDE, os.O_CREAT | os.O_RDWR))
attempt(lambda: os.remove(OUTSIDE))
attempt(lambda: os.rename('inside', OUTSIDE))
attempt(lambda: os.symlink('inside', OUTSIDE))
attempt(lambda: os.system('true'))
attempt(lambda: subprocess.run(['true']))
attempt(lambda: os.kill(os.getpid(), 0))
attempt(lambda: socket.socket())
attempt(lambda: sys.settrace(None))
attempt(lambda: open('inside', 'w').close())
attempt(lambda: open('/dev/null', 'w').close())
attempt(lambda: open(__file__).close())
attempt(lambda: os.open('inside', os.O_RDONLY))
attempt(lambda: os.rename('inside', 'other'))
"""
CHILD = """
import json, os, socket, subprocess, sys
from pathlib import Path
from course import contain

def attempt(action):
    try:
        action()
    except PermissionError:
        pass

file, outside = Path(sys.argv[1]), sys.argv[2]
refused = contain.guard(file.parent, file)
names = globals() | {"OUTSIDE": outside, "__file__": str(file)}
exec(compile(file.read_text(), str(file), "exec"), names)
print(json.dumps([refused, "lecturer" in str(os.environ)]))
"""


def test_a_child_can_write_in_its_own_folder_only_and_start_nothing(tmp_path, monkeypatch):
    """And what it did is known with its line, even if it caught the refusal."""
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    folder, outside = tmp_path / "child", tmp_path / "outside"
    folder.mkdir()
    (folder / contain.FILE).write_text(ACTIONS)
    command = [sys.executable, "-c", CHILD, str(folder / contain.FILE), str(outside)]
    outcome = contain.run(command, folder, 100)
    assert (outcome.code, outcome.stage) == (0, "starting") and not contain.RUNNING
    refused, knows_secret = json.loads(outcome.tail)
    actions = 2 * ["writes a file outside"] + 3 * ["changes files outside"]
    actions += 2 * ["starts a process"] + ["sends a signal", "opens a connection", "traces other"]
    assert len(refused) == len(actions) == 10 and not knows_secret and not outside.exists()
    for line, (sentence, action) in enumerate(zip(refused, actions, strict=True), 2):
        assert sentence.startswith(f", line {line}: {action}")


def test_a_child_gets_none_of_our_environment_but_its_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": "p", "COURSE_SECRET": "s"})
    assert contain.environment(tmp_path) == {
        "PATH": "p", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(contain.ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path), "LANG": "C.UTF-8",
    }  # fmt: skip


def test_how_a_child_ended_is_one_sentence(tmp_path, monkeypatch):
    def ended(code, tail="", result=None):
        outcome = contain.Outcome(code, tail, "training")
        monkeypatch.setattr(contain, "run", lambda *args: commands.append(args) or outcome)
        (tmp_path / "result.json").unlink(missing_ok=True)
        if result is not None:
            (tmp_path / "result.json").write_text(json.dumps(result))
        try:
            return contain.run_job("course.trial", {"where": "mine.py"}, tmp_path, 7.0)
        except UserError as error:
            return str(error)

    commands = []
    assert ended(0, result={"val_loss": 1}) == {"val_loss": 1}
    command = [sys.executable, "-s", "-P", "-B", "-m", "course.trial", str(tmp_path / "job.json")]
    assert commands == [(command, tmp_path, 7.0)]
    assert json.loads((tmp_path / "job.json").read_text()) == {"where": "mine.py"}
    assert ended(0, result={"refused": ", line 3: no"}) == "mine.py, line 3: no"
    assert ended(None) == "mine.py: stopped after 7 s, while training"
    assert ended(-9, "a\nb\n \n") == "mine.py: ended with code -9, while training, last output: b"
    assert ended(1, "\n").endswith("last output: none")


def test_a_child_is_stopped_at_its_limit_and_all_of_them_after_a_failure(tmp_path):
    sleep = ["sleep", "60"]
    (tmp_path / "stage.txt").write_text("training")
    assert contain.run(sleep, tmp_path, 0.2) == (contain.Outcome(None, "", "training"))
    folders = [tmp_path / "a", tmp_path / "b"]
    with ThreadPoolExecutor(2) as pool:
        for folder in folders:
            folder.mkdir()
        waits = [pool.submit(contain.run, sleep, folder, 50) for folder in folders]
        while len(contain.RUNNING) < 2:
            time.sleep(0.01)
        contain.stop_all()
        assert [wait.result().code for wait in waits] == [-9, -9]
    assert not contain.RUNNING


def test_the_snapshot_notices_functions_methods_and_constants(monkeypatch):
    before = contain.snapshot()
    assert contain.changed(before) == []
    for name in (
        "metrics.mean",
        "sources.records.Record.text",
        "torch.nn.functional.cross_entropy",
    ):
        monkeypatch.setattr(name, lambda *args: 1.0)
        assert name in contain.changed(before)
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "added", 1, raising=False)  # new names do not count
    metrics.ARTICLES.add("das")
    assert contain.changed(before) == ["metrics.ARTICLES"]
    metrics.ARTICLES.remove("das")
    code, metrics.mean.__code__ = metrics.mean.__code__, (lambda values: 1.0).__code__
    try:
        found = contain.changed(before)  # also under the names that other modules import it by
        assert "metrics.mean" in found and all(name.endswith(".mean") for name in found)
    finally:
        metrics.mean.__code__ = code


AT_RUN_TIME = {  # a submission that is not vetted, and words of the message
    "writes a file, and swallows the refusal": (
        GOOD + "\ntry:\n    open(FILE, 'w')\nexcept OSError:\n    pass\n",
        "line 16: writes a file",
    ),
    "patches the loss": (GOOD + "\nimport model\nmodel.MedMoE.loss = lambda *a: None\n", "changed"),
    "starts a process": (
        GOOD.replace("# top-k", "import os\n        os.system('true')"),
        "line 13: starts a process",
    ),
    "raises": (GOOD.replace("# top-k", "1 / 0"), "line 12: ZeroDivisionError"),
    "hangs": (GOOD.replace("# top-k", "while True: pass"), "s, while training"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in AT_RUN_TIME]


@pytest.mark.parametrize("name", [*list(AT_RUN_TIME)[:1], *SLOW[1:]])
def test_what_vetting_misses_is_caught_at_run_time(name, tmp_path):
    text, words = AT_RUN_TIME[name]
    outside, limit = tmp_path / "written", 10 if name == "hangs" else 100
    with small_base(tmp_path) as base:
        job = asdict(BUDGET) | {"class": "Mine", "init": str(base), "seed": 1, "where": "mine.py",
                                "data": "phantoms:8+10000"}  # fmt: skip
        with pytest.raises(UserError, match=rf"^mine.py.*{words}"):
            score.run_seed(job, text.replace("FILE", repr(str(outside))), limit)
    assert not outside.exists()
