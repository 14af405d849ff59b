"""The commands and the code on the pages of the course, and that its solutions train with them."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import chat
import eval as evaluation
import train
from checkpoint import load_model
from config import PRESETS, UserError
from course.grade import GradeConfig
from course.score import ScoreConfig
from course.tests.test_answers import NUMBERS, spec_of, with_solutions
from course.tests.test_assignments import STUBS
from engine.cli import parse
from model import generate
from tests.conftest import collate
from tests.mini import losses, mini, weights

ROOT = Path(__file__).parents[2]
WRONG_SIGN = """from course.tests.solutions.a5 import LossFree as Right
class LossFree(Right):
    def update(self, load):
        super().update(-load)
"""
PAGES = [*sorted((ROOT / "course").glob("*.md")), ROOT / "course" / "museum" / "README.md"]
FLAGS = {"train.py": train.TrainConfig, "eval.py": evaluation.EvalConfig,
         "chat.py": chat.ChatConfig, "course.score": ScoreConfig,
         "course.grade": GradeConfig}  # fmt: skip
SECTIONS = ["Idea", "Equation", "What to write", "How it is judged", "Common mistakes",
            "Predict before you run", "Then"]  # fmt: skip


def commands(page):
    """Every line that calls python, in a block or between backquotes, as words."""
    found = re.findall(r"^python .*|(?<=`)python [^`\n]*", page.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in found]


def page_of(number):
    (page,) = (ROOT / "course").glob(f"a{number}_*.md")
    return page


@NUMBERS
def test_a_page_has_its_sections_its_time_and_its_own_commands(number):
    page = page_of(number)
    text = page.read_text()
    assert [s for s in re.findall(r"^## (.*)", text, re.M) if s != "Measure the leak"] == SECTIONS
    assert 0 < int(re.search(r"^Time: about (\d+) minutes", text, re.M)[1]) <= 120
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert f"course/{page.stem}.py" in text and (ROOT / "course" / f"{page.stem}.py").is_file()
    spec, found = f"course/{STUBS[number]}", commands(page)
    tests = ["-m", "pytest", "course/tests/test_assignments.py", "--assignment", str(number)]
    assert tests in found
    routed = [words[: words.index("--router") + 2] for words in found if "--router" in words]
    assert routed[0] == ["-m", "pytest", "course/tests/test_router.py", "--router", spec]
    assert routed[1][0] == "train.py" and routed[2] == ["-m", "course.score", "--router", spec]
    assert [words[-1] for words in routed] == [spec] * 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_has_a_file_and_flags_that_exist(page):
    assert commands(page)
    for words in commands(page):
        name, *argv = words[words[0] == "-m" :]
        if name in FLAGS:
            parse(FLAGS[name], argv, name)
        else:
            assert name == "pytest" and (ROOT / argv[0]).is_file(), words


def test_the_command_on_the_page_skips_what_is_not_implemented(capsys):
    pytest.main([*commands(page_of(5))[0][2:], "-rs", "-p", "no:cacheprovider"])
    output = capsys.readouterr().out
    assert "not implemented yet" in output and re.search(r"=+ 6 skipped in", output), output


@with_solutions
def test_with_a_router_that_one_and_its_assignment_alone_are_checked(capsys, tmp_path):
    (tmp_path / "a.py").write_text(WRONG_SIGN)
    pytest.main([*commands(page_of(5))[0][2:], "--router", f"{tmp_path / 'a.py'}:LossFree"])
    output = capsys.readouterr().out
    assert "The sign is wrong" in output, output
    assert "pytest.fail" not in output and "Traceback" not in output, output  # the sentence alone
    assert re.search(r"=+ 1 failed, 5 passed in", output), output


@with_solutions
def test_the_code_on_the_page_measures_the_leak(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", page_of(4).read_text(), re.M | re.DOTALL)
    assert code.count(f"course/{STUBS[4]}") == 1
    exec(code.replace(f"course/{STUBS[4]}", spec_of(4)), {})
    counts = dict(re.findall(r"^(\w+) .*: (\d+)$", capsys.readouterr().out, re.MULTILINE))
    assert counts["TopKRouter"] == "0" and int(counts["ExpertChoice"]) > 0, counts


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
    """A checkpoint of phase 2 of a model of 30 000 parameters, and the flags that fit it."""
    flags = ["--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--no-eval",
             "--router-images", "16", "--steps", "2", "--batch-size", "4"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        out = tmp_path_factory.mktemp("base")
        train.main(["--phase", "2", "--out", str(out), *flags])
        yield out / "phase2", flags


@with_solutions
@NUMBERS
def test_a_solution_trains_by_its_pages_command_and_generates_or_is_refused(number, base, tmp_path):
    (argv,) = [words[1:] for words in commands(page_of(number)) if "--init" in words]
    for flag, value in {"--init": base[0], "--router": spec_of(number), "--out": tmp_path}.items():
        argv[argv.index(flag) + 1] = str(value)
    train.main([*argv, *base[1]])
    assert [record["step"] for record in losses(tmp_path)] == [0, 1]
    tensors = weights(tmp_path / "phase3")
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    assert tensors and not broken
    if number in (5, 8):  # what they update is saved
        buffer, start = {5: ("bias", 0.0), 8: ("coefficient", 1e-8)}[number]
        found = [t for name, t in tensors.items() if name.endswith(f".router.{buffer}")]
        assert len(found) == 2 and all((t != torch.tensor(start)).any() for t in found)
    model, text, _ = load_model(tmp_path / "phase3", torch.device("cpu"))
    prompts = collate([([5, 6, 7], [-100] * 3), ([9, 8, 7, 6, 5], [-100] * 5)], side="left")
    steps = generate(model, prompts, text.eos_id, max_new=3)
    if number == 4:
        with pytest.raises(UserError, match="ExpertChoice looks at later tokens"):
            next(steps)
        return
    first, *later = [step.routings for step in steps]
    assert later and all(routing.gates.isfinite().all() for routing in first)
    if number == 7:  # generation keeps the route of the prompt
        for before, after in zip(first, later[0], strict=True):
            assert torch.equal(before.gates[:, -1:], after.gates)
