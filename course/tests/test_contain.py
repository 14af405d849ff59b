"""Cheating is refused, in a sentence with its line: by the source, and while it runs."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

import pytest

import metrics
from config import UserError
from course import contain, score, trial, vet
from course.tests.handed_in import BUDGET, GOOD, small_base

BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = BODY + "    def gate(self, logits, mask, x):\n        "
CHEATS = [  # (a submission, the line, a word of the message)
    (BODY + "    needs = ('modality',)\n    x = 1", 3, "modality"),
    (BODY + "    needs: tuple = ('modality',)\n", 3, "modality"),
    (GATE + "return x.hints.modality", 4, "reads the true modality"),
    (BODY + "    def forward(self, x, mask, hints):\n        return x", 3, "forward"),
    (BODY + "    _call_impl = None\n", 3, "replaces Router._call_impl"),
    ("from routers import Router as R\nclass A(R):\n    forward = 1\n", 3, "forward"),
    (BODY + "    def __call__(self):\n        return 1", 3, "defines __call__"),
    ("import model\nmodel.MedMoE.loss = None\n", 1, "imports model"),
    ("import torch.nn.functional as F\nF.cross_entropy = min\n", 2, "changes F.cross"),
    ("import torch\ndel torch.nn\n", 2, "changes torch.nn"),
    (GATE + "open('x', 'w')", 4, "open"),
    ("import torch\ntorch.save(1, 'x')\n", 2, "save"),
    ("from torch import load\n", 1, "load"),
    ("import math\nimport os\n", 2, "imports os"),
    ("import os\nimport sys\n", 1, "imports os"),  # the first
    ("import dataclasses\ndataclasses.sys.exit()\n", 2, "sys"),
    ("import functools\nfunctools._c3_merge\n", 2, "_c3_merge"),
    ("from . import x\n", 1, "imports ..x"),
    ("import routers\nrouters.sys.exit()\n", 2, "routers.sys"),
    ("from subprocess import run\n", 1, "imports subprocess"),
    ("x = 1\n__import__('os')\n", 2, "__import__"),
    ("().__class__.__base__.__subclasses__()\n", 1, "__"),
    ("def f(e):\n    return e.f_back\n", 2, "f_back"),
    ("exec('1')\n", 1, "exec"),
    ("import torch.utils.cpp_extension\n", 1, "cpp_extension"),
    ("import torch\ntorch.set_num_threads(4)\n", 2, "set_num_threads"),
    ("import torch\ntorch.manual_seed(0)\n", 2, "manual_seed"),
    (GATE + "self.register_forward_hook(1)", 4, "hook"),
    ("from routers import OracleRouter\n", 1, "OracleRouter"),
    ("def f(:\n", 1, "not Python"),
    ("x\0", 1, "not Python"),
    ("x = " + "-" * 5000 + "1\n", 1, ""),  # nested too deeply
]
HONEST = (
    "import math\nimport routers\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
    "from moe import MLP\nclass Mine(routers.TopKRouter):\n    needs = ('prompt', 'previous')\n"
    "    def __init__(self, d, e, **more):\n        super().__init__(d, e, **more)\n"
    "        self.register_buffer('bias', torch.zeros(e))\n        self._open = self.bias.save\n"
    "    def update(self, load):\n        self.bias += 0.1 * load.sign()\n"
    "class Other(nn.Module):\n    def forward(self, x):\n        return x\n"
)


@pytest.mark.parametrize(("text", "line", "word"), CHEATS)
def test_vetting_names_the_line_of_what_is_not_allowed(text, line, word):
    with pytest.raises(UserError, match=rf"^mine.py, line {line}: .*{word}"):
        vet.vet(text, "mine.py")


def test_a_submission_has_one_router_that_no_other_inherits_from(tmp_path):
    vet.vet(GOOD, "mine.py")
    vet.vet(HONEST, "mine.py")
    assert vet.only_router(HONEST, "mine.py") == "Mine", "the other class is no router"
    file, text = tmp_path / "mine.py", GOOD + "\n\nclass Other(Mine):\n    pass\n"
    file.write_text(text)
    assert vet.only_router(text, "mine.py") == "Other"
    assert vet.read_submission(f"{file}:Mine") == (file, text, "Mine")
    (tmp_path / "bytes.py").write_bytes(b"\xff")
    two, no_spec = GOOD + "class B(Router):\n    pass\n", "not FILE.py:Class"
    for text, words in ((two, "must have one .* has Mine, B"), ("class Router:\n    1", "none")):
        with pytest.raises(UserError, match=words):
            vet.only_router(text, "mine.py")
    for spec, words in ((f"{file}:No", "it has Mine, Other"), (f"{file}:", no_spec),
                        ("absent.py:Mine", no_spec), (f"{tmp_path}:Mine", no_spec),
                        (f"{tmp_path / 'bytes.py'}:Mine", "not UTF-8")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            vet.read_submission(spec)


def test_lines_of_code_leave_out_blank_lines_comments_and_docstrings():
    assert vet.count_lines(GOOD) == 6
    assert vet.count_lines("x = '''a\n\nb'''\n\n# no\ny = (1,\n     2)  # yes\n") == 5
    assert vet.count_lines("class A:\n    '''Two\n    lines.'''\n\n    x = 1\n") == 2


# While it runs

ACTIONS = {  # what a child does, one a line -> what it is refused for; None: allowed
    "open(OUTSIDE, 'w')": "writes a file outside",
    "os.open(OUTSIDE, os.O_CREAT | os.O_RDWR)": "writes a file outside",
    "os.remove(OUTSIDE)": "changes files outside",
    "os.rename('inside', OUTSIDE)": "changes files outside",
    "os.symlink('inside', OUTSIDE)": "changes files outside",
    "os.system('true')": "starts a process",
    "subprocess.run(['true'])": "starts a process",
    "os.kill(os.getpid(), 0)": "sends a signal",
    "socket.socket()": "opens a connection",
    "sys.settrace(None)": "traces other",
    "open('inside', 'w').close()": None,
    "open('/dev/null', 'w').close()": None,
    "open(__file__).close()": None,
    "os.open('inside', os.O_RDONLY)": None,
    "os.rename('inside', 'other')": None,
}


def in_a_child(file, outside):
    """Do all actions under guard, each refusal caught -> what the hook noted."""
    os.chdir(file.parent)
    refused = contain.guard(file.parent, file)
    names = {"OUTSIDE": outside, "__file__": str(file), "os": os, "socket": socket,
             "subprocess": subprocess, "sys": sys}  # fmt: skip
    for line, action in enumerate(ACTIONS):
        try:
            exec(compile("\n" * line + action, str(file), "exec"), names)
        except PermissionError:
            continue
    return refused


def test_a_child_can_write_in_its_own_folder_only_and_start_nothing(tmp_path):
    """And what it did is known with its line, even if it caught the refusal."""
    file, outside = tmp_path / "child" / contain.FILE, tmp_path / "outside"
    file.parent.mkdir()
    file.write_text("")
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # a hook cannot be removed
        refused = pool.submit(in_a_child, file, str(outside)).result()
    expected = [f", line {n}: {action}" for n, action in enumerate(ACTIONS.values(), 1) if action]
    assert len(refused) == len(expected) == 10 and not outside.exists()
    assert all(map(str.startswith, refused, expected)), refused
    assert sorted(path.name for path in file.parent.iterdir()) == ["other", contain.FILE]


def test_a_child_gets_none_of_our_environment_but_its_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": "p", score.SECRET: "s"})
    assert contain.environment(tmp_path) == {
        "PATH": "p", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(contain.ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path), "LANG": "C.UTF-8",
    }  # fmt: skip


ENDS = [  # how a child ended, the result that it left, and what run_job gives or raises
    (contain.Outcome(0, "", ""), {"val_loss": 1}, {"val_loss": 1}),
    (contain.Outcome(0, "", ""), {"refused": ", line 3: no"}, "mine.py, line 3: no"),
    (contain.Outcome(None, "", "training"), None, "mine.py: stopped after 7 s, while training"),
    (contain.Outcome(-9, "a\nb\n \n", "training"), None,
     "mine.py: ended with code -9, while training, last output: b"),
    (contain.Outcome(1, "\n", "x"), None, "mine.py: ended with code 1, while x, last output: none"),
]  # fmt: skip


@pytest.mark.parametrize(("outcome", "result", "expected"), ENDS)
def test_how_a_child_ended_is_one_sentence(outcome, result, expected, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(contain, "run", lambda *args: commands.append(args) or outcome)
    if result:
        (tmp_path / "result.json").write_text(json.dumps(result))
    try:
        found = contain.run_job("a.b", {"where": "mine.py"}, tmp_path, 7.0)
    except UserError as error:
        found = str(error)
    assert found == expected
    job = tmp_path / "job.json"
    command = [sys.executable, "-s", "-P", "-B", "-m", "a.b", str(job)]
    assert commands == [(command, tmp_path, 7.0)]
    assert json.loads(job.read_text()) == {"where": "mine.py"}


def test_a_child_is_stopped_at_its_limit_and_all_of_them_after_a_failure(tmp_path):
    shell = ["sh", "-c", "pwd; echo $HOME >&2; exit 3"]
    ended = contain.run(shell, tmp_path, 50)
    assert ended == contain.Outcome(3, 2 * f"{tmp_path}\n", "starting")
    (tmp_path / "stage.txt").write_text("training")
    sleep = ["sleep", "60"]
    assert contain.run(sleep, tmp_path, 0.2) == contain.Outcome(None, "", "training")
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
    names = ["metrics.mean", "sources.records.Record.text", "torch.nn.functional.cross_entropy"]
    for name in names:
        monkeypatch.setattr(name, id)
    monkeypatch.setattr(metrics, "added", 1, raising=False)  # new names do not count
    monkeypatch.setattr(metrics, "ARTICLES", {*metrics.ARTICLES, "das"})
    assert {*names, "metrics.ARTICLES"} <= {*contain.changed(before)}
    monkeypatch.undo()
    metrics.ARTICLES.add("das")
    code, metrics.mean.__code__ = metrics.mean.__code__, (lambda values: 1.0).__code__
    try:
        found = contain.changed(before)  # also under the names that other modules import it by
    finally:
        metrics.mean.__code__ = code
        metrics.ARTICLES.remove("das")
    assert {"metrics.mean", "metrics.ARTICLES"} <= {*found}
    assert {name.rpartition(".")[2] for name in found} == {"mean", "ARTICLES"}


def run_forked(command, folder, limit_s):
    """In place of contain.run, whose child would import torch again."""
    child = get_context("fork").Process(target=trial.main, args=(command[-1],))
    child.start()
    child.join(limit_s)
    code = child.exitcode
    child.kill()
    return contain.Outcome(code, "", "training")


RUNS = [  # a submission that is not vetted, and words of the message
    (GOOD + "\ntry:\n    open(FILE, 'w')\nexcept OSError:\n    pass\n", "line 16: writes a file"),
    (GOOD + "\nimport model\nmodel.MedMoE.loss = lambda *a: None\n", "changed"),
    (GOOD.replace("# top-k", "import os; os.system('true')"), "line 12: starts a process"),
    (GOOD.replace("# top-k", "while True: pass"), "s, while training"),
]


@pytest.mark.parametrize("forks", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("text", "words"), RUNS)
def test_what_vetting_misses_is_caught_at_run_time(forks, text, words, tmp_path, monkeypatch):
    if forks:
        monkeypatch.setattr(contain, "run", run_forked)
    written, limit = tmp_path / "written", 2 + 8 * (not forks) if "while" in text else 100
    with small_base(tmp_path) as base:
        job = asdict(BUDGET) | {"class": "Mine", "init": str(base), "seed": 1, "where": "mine.py",
                                "data": "phantoms:8+10000"}  # fmt: skip
        with pytest.raises(UserError, match=rf"^mine.py.*{words}"):
            score.run_seed(job, text.replace("FILE", repr(str(written))), limit)
    assert not written.exists()
