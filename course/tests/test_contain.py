"""Cheating is refused, in a sentence with its line: by the source, and while it runs."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from config import UserError
from course import contain, score, trial, vet
from course.tests.handed_in import GOOD, JOB, _base  # noqa: F401

BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = BODY + "    def gate(self, logits, mask, x):\n        "


# The callers of gate know the true modality (Hints in Router.forward): no way to frames is allowed.
@pytest.mark.parametrize(("text", "line", "word"), [
    (BODY + "    needs: tuple = ('modality',)\n", 3, "modality"),
    (BODY + "    needs = ['modal' + 'ity']", 3, "other than a tuple"),
    (GATE + "self.needs.append('modality')", 4, "uses needs"), ("x.f_back", 1, "f_back"),
    (GATE + "return x.hints.modality", 4, "reads the true modality"), ("def f(:", 1, "not Python"),
    (GATE + "(i for i in x).gi_frame", 4, "gi_frame"), ("type(*a)", 1, "uses type"),
    (GATE + "match x:\n            case object(tb_frame=f): pass", 4, "uses match"),
    (GATE + "try: x.no\n        except AttributeError as e: e.obj", 5, "uses obj"),
    (GATE + "x.grad_fn", 4, "grad_fn"), ("from dataclasses import dataclass", 1, "dataclasses"),
    (GATE + "self.t.item = 1", 4, "of self only"), ("import torch\ntorch.ops", 2, "torch.ops"),
    (GATE + "try: 1 / 0\n        except Exception as e: e.__traceback__", 5, "__traceback__"),
    (GATE + "'{0.__class__}'.format(self)", 4, "uses format"), ("import os\n", 1, "imports os"),
    ("().__class__.__base__.__subclasses__()\n", 1, "__"), ("a\n1 + eval\nopen", 2, "uses eval"),
    ("from routers import Router as R\nclass A:\n    forward = 1\nclass B(A, R): 1", 3, "forward"),
    (BODY + "    if True:\n        def forward(self): pass", 4, "replaces Router.forward"),
    (BODY + "    def __call__(self): 1", 3, "defines __call"), ("from torch import *", 1, "torch"),
    (GATE + "self.forward = 1", 4, "changes forward"), ("from torch import os", 1, "torch.os"),
    (GATE + "self.__class__ = 1", 4, "__class__"), (GATE + "Mine.causal = 1", 4, "changes causal"),
    (GATE + "type(self.proj).weight = 1", 4, "of self only"), (GATE + "open('x')", 4, "uses open"),
    (GATE + "self._forward_pre_hooks[0] = 1", 4, "_hooks"), ("class B(metaclass=M): 1", 1, "meta"),
    (GATE + "self.register_forward_hook(1)", 4, "hook"), ("import torch.utils", 1, "torch.utils"),
    ("import torch.nn.functional as F\nF.cross_entropy = min\n", 2, "changes F.cross_entropy"),
    ("import torch\nt = torch\nt.save(1)", 2, "as a value"), (GATE + "x.tofile('x')", 4, "files"),
    ("import torch\ntorch.save(1)", 2, "save"), ("import routers\nrouters.sys", 2, "routers.sys; "),
    ("import torch\ntorch.PyTorchFileWriter", 2, "effects"), ("from typing import io", 1, "g.io; "),
    ("from routers import OracleRouter", 1, "Oracle")])  # fmt: skip
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
    "open(OUTSIDE, 'w')": ": writes a file",
    "os.rename('inside', OUTSIDE)": ": changes files",
    "open('/proc/1/environ')": ": reads another process",
    "os.open('environ', 0, dir_fd=os.open('/proc/self', 0))": ": reads another process",
    "open('inside', 'w')  # submitted": ", line 1: writes a file",
    "subprocess.run(['true'])": ": starts a process",
    "os.kill(os.getpid(), 0)": ": sends a signal",
    "open('inside', 'w').close()": None, "os.rename('inside', 'other')": None}  # fmt: skip


def in_a_child(folder, outside):
    """Do all actions under guard, each refusal caught -> what the hook noted."""
    os.chdir(folder)
    refused = contain.guard(folder, folder / contain.FILE)
    for action in ACTIONS:
        with contextlib.suppress(PermissionError):
            name = str(folder / contain.FILE) if "# submitted" in action else ""
            names = {"OUTSIDE": outside, "os": os, "subprocess": subprocess}
            exec(compile(action, name, "exec"), names)
    return refused


def test_a_child_can_write_in_its_own_folder_only_and_what_it_tried_is_known(tmp_path):
    folder, outside = tmp_path / "child", tmp_path / "outside"
    folder.mkdir()
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # a hook cannot be removed
        refused = pool.submit(in_a_child, folder, str(outside)).result()
    expected = [reason for reason in ACTIONS.values() if reason]
    assert len(refused) == len(expected) == 7 and all(map(str.startswith, refused, expected))
    assert [path.name for path in folder.iterdir()] == ["other"] and not outside.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="it has no /proc")
def test_a_command_keeps_the_secret_out_of_its_environment(tmp_path):
    (tmp_path / "course").mkdir()  # a command of ours is `python -m course.…`
    (tmp_path / "course" / "show.py").write_text("""from course.contain import take_secret
print(take_secret(), take_secret(), "lecturer" in open("/proc/self/environ").read())""")
    env = os.environ | {contain.SECRET: "lecturer", "PYTHONPATH": f"{tmp_path}:{contain.ROOT}"}
    command = [sys.executable, "-P", "-m", "course.show"]
    assert subprocess.check_output(command, env=env) == b"lecturer lecturer False\n"


def test_a_child_is_stopped_at_its_limit_and_does_not_know_the_secret(tmp_path, monkeypatch):
    monkeypatch.setenv(contain.SECRET, "of the lecturer")
    assert contain.take_secret() == "of the lecturer"  # no command of ours: not started again
    ended = contain.run(["sh", "-c", f"pwd; echo $HOME${contain.SECRET} >&2; exit 3"], tmp_path, 50)
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
        ("import torch\nclass Sub(torch.Tensor): pass", "makes a subclass of Tensor"),
        ("import torch\ntorch.Tensor.nonzero = len", "changed torch.Tensor.nonzero"),
        ("import routers\nrouters.Routing.logits = property(len)", "changed routers.Routing"),
        ("while True: pass", "stopped after 2 s")):  # fmt: skip
        text = f"{GOOD}\n{code}\n".replace("FILE", repr(str(written)))
        with pytest.raises(UserError, match=rf"^mine.py.*{words}"):
            score.run_seed(JOB | {"init": str(base)}, text, 2 if "while" in code else 100)
    assert not written.exists()
