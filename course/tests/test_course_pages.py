"""The solutions train by the commands on the pages; tests/test_readme.py has the pages' links."""

import re
import shlex

import pytest
import torch

import train
from checkpoint import load_model
from config import UserError
from course.tests.handed_in import _base  # noqa: F401
from course.tests.test_answers import NUMBERS, spec_of, with_solutions
from course.tests.test_assignments import STUBS
from model import generate
from tests.conftest import prompts
from tests.mini import losses, weights
from tests.test_readme import TEXTS, commands

WRONG_SIGN = """from course.tests.solutions.a5 import LossFree as Right
class LossFree(Right):
    update = lambda self, load: Right.update(self, -load)"""
SMALL = ["--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--no-eval",
         "--steps", "2", "--batch-size", "4"]  # fmt: skip


def words_of(number):
    """The commands on an assignment's page, each as words after `python`."""
    (text,) = [text for page, text in TEXTS.items() if page.startswith(f"course/a{number}_")]
    return [shlex.split(line, comments=True)[1:] for line in commands(text)]


@with_solutions
def test_with_a_router_that_one_and_its_assignment_alone_are_checked(capsys, tmp_path):
    (tmp_path / "a.py").write_text(WRONG_SIGN)
    pytest.main([*words_of(5)[0][2:], "--router", f"{tmp_path / 'a.py'}:LossFree"])
    output = capsys.readouterr().out
    assert "The sign is wrong" in output, output
    assert "pytest.fail" not in output and "Traceback" not in output, output  # the sentence alone
    assert re.search(r"=+ 1 failed, 1 passed in", output), output


@with_solutions
@NUMBERS
def test_a_solution_trains_by_its_pages_command_and_generates_or_is_refused(number, base, tmp_path):
    (argv,) = [words[1:] for words in words_of(number) if "--init" in words]
    assert argv[argv.index("--router") + 1] == f"course/{STUBS[number]}"
    for flag, value in {"--init": base, "--router": spec_of(number), "--out": tmp_path}.items():
        argv[argv.index(flag) + 1] = str(value)
    train.main([*argv, *SMALL])
    assert [record["step"] for record in losses(tmp_path)] == [0, 1]
    tensors = weights(tmp_path / "phase3")
    assert tensors and all(t.isfinite().all() for t in tensors.values())
    if number == 5:  # what it updates is saved
        found = [t for name, t in tensors.items() if name.endswith(".router.bias")]
        assert len(found) == 2 and all(t.any() for t in found)
    model, text, _ = load_model(tmp_path / "phase3", torch.device("cpu"), router=spec_of(number))
    steps = generate(model, prompts((1,)), text.eos_id, max_new=3)
    if number == 4:
        with pytest.raises(UserError, match="ExpertChoice looks at later tokens"):
            next(steps)
        return
    first, *later = [step.routings for step in steps]
    assert later and all(routing.gates.isfinite().all() for routing in first)
    if number == 7:  # generation keeps the route of the prompt
        for before, after in zip(first, later[0], strict=True):
            assert torch.equal(before.gates[:, -1:], after.gates)
