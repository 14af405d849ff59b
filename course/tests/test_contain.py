"""Cheating is refused, in a sentence with its line: by the source, and while it runs."""

import contextlib
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from config import UserError
from course import contain, score, trial, vet
from course.tests.handed_in import GOOD, JOB, _base  # noqa: F401

BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = BODY + "    def gate(self, logits, mask, x):\n        "


@pytest.mark.parametrize(("text", "line", "word"), [
    (BODY + "    needs: tuple = ('modality',)\n", 3, "modality"),
    (GATE + "return x.hints.modality", 4, "reads the true modality"),
    ("from routers import Router as R\nclass A(R):\n    forward = 1\n", 3, "forward"),
    ("import torch.nn.functional as F\nF.cross_entropy = min\n", 2, "changes F.cross"),
    (GATE + "open('x', 'w')", 4, "open"), ("import torch\ntorch.save(1, 'x')\n", 2, "save"),
    ("import os\nimport sys\n", 1, "imports os"),  # the first
    ("().__class__.__base__.__subclasses__()\n", 1, "__"), ("def f(:\n", 1, "not Python"),
    (GATE + "self.register_forward_hook(1)", 4, "hook"),
    ("from routers import OracleRouter\n", 1, "OracleRouter"),
    ("import routers\nrouters.sys.exit()\n", 2, "uses routers.sys; allowed"),
    ("import dataclasses\ndataclasses.sys.exit()\n", 2, "dataclasses's sys"),
    ("def f(e):\n    return e.f_back\n", 2, "f_back"),
    (BODY + "    def __call__(self):\n        return 1", 3, "defines __call__")])  # fmt: skip
def test_vetting_names_the_line_of_what_is_not_allowed(text, line, word):
    with pytest.raises(UserError, match=rf"^mine.py, line {line}: .*{word}"):
        vet.vet(text, "mine.py")


def test_the_stubs_and_the_solutions_are_allowed_and_lines_of_code_counted():
    stubs = sorted(Path(vet.__file__).parent.glob("a?_*.py"))
    for file in [*stubs, *Path(__file__).parent.glob("solutions/*.py")]:
        vet.vet(file.read_text(), file.name)
    assert len(stubs) == 8
    assert vet.count_lines("x = '''a\n\nb'''\n\n# no\ny = (1,\n     2)  # yes\n") == 5


ACTIONS = {  # what a child does -> what it is refused for; None: allowed
    "open(OUTSIDE, 'w')": ": writes a file outside",
    "os.rename('inside', OUTSIDE)": ": changes files outside",
    "subprocess.run(['true'])": ": starts a process",
    "os.kill(os.getpid(), 0)": ": sends a signal",
    "open('inside', 'w').close()": None, "os.rename('inside', 'other')": None}  # fmt: skip


def in_a_child(folder, outside):
    """Do all actions under guard, each refusal caught -> what the hook noted."""
    os.chdir(folder)
    refused = contain.guard(folder, folder / contain.FILE)
    for action in ACTIONS:
        with contextlib.suppress(PermissionError):
            exec(action, {"OUTSIDE": outside, "os": os, "subprocess": subprocess})
    return refused


def test_a_child_can_write_in_its_own_folder_only_and_what_it_tried_is_known(tmp_path):
    folder, outside = tmp_path / "child", tmp_path / "outside"
    folder.mkdir()
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # a hook cannot be removed
        refused = pool.submit(in_a_child, folder, str(outside)).result()
    expected = [reason for reason in ACTIONS.values() if reason]
    assert len(refused) == len(expected) == 4 and all(map(str.startswith, refused, expected))
    assert [path.name for path in folder.iterdir()] == ["other"] and not outside.exists()


def test_a_child_is_stopped_at_its_limit_and_does_not_know_the_secret(tmp_path, monkeypatch):
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    ended = contain.run(["sh", "-c", f"pwd; echo $HOME${score.SECRET} >&2; exit 3"], tmp_path, 50)
    assert ended == contain.Outcome(3, 2 * f"{tmp_path}\n", "starting")
    (tmp_path / "stage.txt").write_text("training")
    stopped = contain.run(["sleep", "60"], tmp_path, 0.2)
    assert stopped == contain.Outcome(None, "", "training") and not contain.RUNNING
    with pytest.raises(UserError, match=r"^mine.py: ended with code 1, while training, .*absent"):
        contain.run_job("absent", {"where": "mine.py"}, tmp_path, 50.0)  # there is no such module


def run_forked(command, folder, limit_s):
    """In place of contain.run, whose child would import torch again."""
    child = get_context("fork").Process(target=trial.main, args=(command[-1],))
    child.start()
    child.join(limit_s)
    code = child.exitcode
    child.kill()
    return contain.Outcome(code, "", "training")


def test_what_vetting_misses_is_caught_at_run_time(base, tmp_path, monkeypatch):
    monkeypatch.setattr(contain, "run", run_forked)
    written = tmp_path / "written"
    for code, words in (  # of the message
        ("try:\n    open(FILE, 'w')\nexcept OSError:\n    pass", "line 16: writes a file"),
        ("import model\nmodel.MedMoE.loss = lambda *a: None", "changed"),
        ("while True: pass", "stopped after 2 s")):  # fmt: skip
        text = f"{GOOD}\n{code}\n".replace("FILE", repr(str(written)))
        with pytest.raises(UserError, match=rf"^mine.py.*{words}"):
            score.run_seed(JOB | {"init": str(base)}, text, 2 if "while" in code else 100)
    assert not written.exists()
