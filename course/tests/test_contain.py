"""Cheating is refused, in a sentence with its line: by the source, and while it runs."""

import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import pytest

from config import UserError
from course import contain, score, trial, vet
from course.tests.handed_in import BUDGET, GOOD, _base  # noqa: F401

BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = BODY + "    def gate(self, logits, mask, x):\n        "
CHEATS = [  # (a submission, the line, a word of the message)
    (BODY + "    needs: tuple = ('modality',)\n", 3, "modality"),
    (GATE + "return x.hints.modality", 4, "reads the true modality"),
    ("from routers import Router as R\nclass A(R):\n    forward = 1\n", 3, "forward"),
    ("import torch.nn.functional as F\nF.cross_entropy = min\n", 2, "changes F.cross"),
    (GATE + "open('x', 'w')", 4, "open"),
    ("import torch\ntorch.save(1, 'x')\n", 2, "save"),
    ("import os\nimport sys\n", 1, "imports os"),  # the first
    ("().__class__.__base__.__subclasses__()\n", 1, "__"),
    (GATE + "self.register_forward_hook(1)", 4, "hook"),
    ("from routers import OracleRouter\n", 1, "OracleRouter"),
    ("def f(:\n", 1, "not Python"),
]


@pytest.mark.parametrize(("text", "line", "word"), CHEATS)
def test_vetting_names_the_line_of_what_is_not_allowed(text, line, word):
    with pytest.raises(UserError, match=rf"^mine.py, line {line}: .*{word}"):
        vet.vet(text, "mine.py")


def test_the_stubs_and_the_solutions_are_allowed_and_lines_of_code_counted():
    stubs = sorted(Path(vet.__file__).parent.glob("a?_*.py"))
    for file in [*stubs, *Path(__file__).parent.glob("solutions/*.py")]:
        vet.vet(file.read_text(), file.name)
    assert vet.only_router(stubs[0].read_text(), "a.py") == "NoisyTopK"
    assert vet.count_lines("x = '''a\n\nb'''\n\n# no\ny = (1,\n     2)  # yes\n") == 5


def test_a_submission_has_one_router_that_no_other_inherits_from(tmp_path):
    file, text = tmp_path / "mine.py", GOOD + "\n\nclass Other(Mine):\n    pass\n"
    file.write_text(text)
    assert vet.only_router(text, "mine.py") == "Other"
    assert vet.read_submission(f"{file}:Mine") == (file, text, "Mine")
    with pytest.raises(UserError, match=r"must have one .* has Mine, B"):
        vet.only_router(GOOD + "class B(Router):\n    pass\n", "mine.py")
    with pytest.raises(UserError, match="it has Mine, Other"):
        vet.read_submission(f"{file}:No")


ACTIONS = {  # what a child does, one a line -> what it is refused for; None: allowed
    "open(OUTSIDE, 'w')": "writes a file outside",
    "os.rename('inside', OUTSIDE)": "changes files outside",
    "subprocess.run(['true'])": "starts a process",
    "os.kill(os.getpid(), 0)": "sends a signal",
    "open('inside', 'w').close()": None,
    "open(__file__).close()": None,
    "os.rename('inside', 'other')": None,
}


def in_a_child(file, outside):
    """Do all actions under guard, each refusal caught -> what the hook noted."""
    os.chdir(file.parent)
    refused = contain.guard(file.parent, file)
    names = {"OUTSIDE": outside, "__file__": str(file), "os": os, "subprocess": subprocess}
    for line, action in enumerate(ACTIONS):
        try:
            exec(compile("\n" * line + action, str(file), "exec"), names)
        except PermissionError:
            continue
    return refused


def test_a_child_can_write_in_its_own_folder_only_and_what_it_tried_is_known(tmp_path):
    file, outside = tmp_path / "child" / contain.FILE, tmp_path / "outside"
    file.parent.mkdir()
    file.write_text("")
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # a hook cannot be removed
        refused = pool.submit(in_a_child, file, str(outside)).result()
    expected = [f", line {n}: {action}" for n, action in enumerate(ACTIONS.values(), 1) if action]
    assert len(refused) == len(expected) == 4 and not outside.exists()
    assert all(map(str.startswith, refused, expected)), refused
    assert sorted(path.name for path in file.parent.iterdir()) == ["other", contain.FILE]


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


RUNS = [  # a submission that is not vetted, and words of the message
    (GOOD + "\ntry:\n    open(FILE, 'w')\nexcept OSError:\n    pass\n", "line 16: writes a file"),
    (GOOD + "\nimport model\nmodel.MedMoE.loss = lambda *a: None\n", "changed"),
    (GOOD.replace("# top-k", "while True: pass"), "stopped after 2 s, while training"),
]


def test_what_vetting_misses_is_caught_at_run_time(base, tmp_path, monkeypatch):
    monkeypatch.setattr(contain, "run", run_forked)
    written = tmp_path / "written"
    job = asdict(BUDGET) | {"class": "Mine", "init": str(base), "seed": 1, "where": "mine.py",
                            "data": "phantoms:8+10000"}  # fmt: skip
    for text, words in RUNS:
        with pytest.raises(UserError, match=rf"^mine.py.*{words}"):
            text = text.replace("FILE", repr(str(written)))
            score.run_seed(job, text, 2 if "while" in text else 100)
    assert not written.exists()
