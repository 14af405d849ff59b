"""The commands and code on the pages of the course.

The commands that train are run in test_solutions_train.py, on a smaller model.
"""

import os
import re
import subprocess
import sys

import pytest

import chat
import eval as evaluation
import train
from course.grade import GradeConfig
from course.score import ScoreConfig
from course.tests.pages import PAGES, ROOT, blocks, commands, of_assignment
from course.tests.test_assignments import STUBS
from engine.cli import parse

FLAGS = {"train.py": train.TrainConfig, "eval.py": evaluation.EvalConfig,
         "chat.py": chat.ChatConfig}  # fmt: skip
MODULES = {"course.score": ScoreConfig, "course.grade": GradeConfig}
COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]
SECTIONS = ["Idea", "Equation", "What to write", "How it is judged", "Common mistakes",
            "Predict before you run", "Then"]  # fmt: skip
NUMBERS = pytest.mark.parametrize("number", STUBS)


@NUMBERS
def test_a_page_has_its_sections_its_time_and_its_own_commands(number):
    page = of_assignment(number)
    text = page.read_text()
    there = [s for s in re.findall(r"^## (.*)", text, re.MULTILINE) if s != "Measure the leak"]
    assert there == SECTIONS
    minutes = int(re.search(r"^Time: about (\d+) minutes", text, re.MULTILINE)[1])
    assert 0 < minutes <= 120
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert f"course/{page.stem}.py" in text and (ROOT / "course" / f"{page.stem}.py").is_file()
    for words in commands(page):
        if "--router" in words:
            assert words[words.index("--router") + 1] == f"course/{STUBS[number]}", words
        if "--assignment" in words:
            assert words[words.index("--assignment") + 1] == str(number), words
    scripts = [" ".join(words[:3]) for words in commands(page)]
    for needed in ("python -m pytest", "python train.py --phase", "python -m course.score"):
        assert needed in scripts, f"{page.name} does not say how to run {needed}"


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_a_command_has_a_file_and_flags_that_exist(page, words):
    if words[0] == "python" and words[1] != "-m":
        parse(FLAGS[words[1]], words[2:], words[1])
        return
    words = words[2:] if words[1] == "-m" else words
    if words[0] != "pytest":
        parse(MODULES[words[0]], words[1:], words[0])
        return
    targets = [w.partition("::")[0] for w in words if w.startswith("tests/")]
    assert targets and all((ROOT / target).is_file() for target in targets), page


def run_pytest(*argv: str) -> str:
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout


def test_the_command_on_the_page_skips_what_is_not_implemented():
    (argv,) = [words[3:] for words in commands(of_assignment(5)) if "--assignment" in words]
    output = run_pytest(*argv)
    assert "not implemented yet" in output, output
    assert re.search(r"=+ 6 skipped in", output), output


def test_with_a_router_that_one_and_its_assignment_alone_are_checked():
    wrong = ROOT / "tests" / "wrong_answers" / "a5_wrong_sign.py"
    if not wrong.is_file():
        pytest.skip("the wrong answers are withheld")
    spec = f"{wrong.relative_to(ROOT)}:LossFree"
    output = run_pytest("course/tests/test_assignments.py", "--assignment", "5", "--router", spec)
    assert "the sign is wrong" in output, output
    assert "pytest.fail" not in output and "Traceback" not in output, output  # the sentence alone
    assert re.search(r"=+ 1 failed, 5 passed in", output), output


def test_the_code_on_the_page_measures_the_leak(capsys):
    solution = ROOT / "tests" / "solutions" / "a4.py"
    if not solution.is_file():
        pytest.skip("the solutions are withheld")
    (code,) = blocks(of_assignment(4), "python")
    exec(code.replace("course/a4_expert_choice.py", str(solution)), {})
    counts = dict(re.findall(r"^(\w+) .*: (\d+)$", capsys.readouterr().out, re.MULTILINE))
    assert counts["TopKRouter"] == "0" and int(counts["ExpertChoice"]) > 0, counts
