"""The row comes out twice, and who cheats is told so: python -m pytest tests/test_score.py"""

import csv
import json
import re
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from mini import mini

from config import MODALITIES, PRESETS, UserError
from course import contain, grade, judge, score, trial
from course.vet import count_lines, only_router, vet
from model import count_parameters
from phantoms import SPLITS
from sources import load_samples

GOOD = '''"""Submitted."""
import torch
from routers import Router, top_k_gates


class Mine(Router):
    """The likeliest experts."""

    sums_to_one = True

    def gate(self, logits, mask, x):
        # as learnt
        return top_k_gates(logits.softmax(dim=-1), self.top_k)
'''
BUDGET = score.Budget(preset="mini", base_pictures=8, base_steps=2, train_pictures=8, steps=2,
                      batch_size=4, lr=1e-2, pictures=3)  # fmt: skip
RESULT = {"val_loss": 1.0, "closed": 0.5, "open": None, "load_cv": 0.1, "max_vio": 0.2, "dead": 0,
          "slots": 8, "dropped": 0.0, "activated": 9, "tokens_per_s": 100.0,
          "visits": [[1.0, 2.0, 3.0, 4.0]] * 4}  # fmt: skip


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
    """The common checkpoint of a model of 30 000 parameters; score then uses its budget."""
    folder = tmp_path_factory.mktemp("score")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(folder / "mini"))
        patch.setattr(score, "BUDGET", BUDGET)
        patch.setattr(judge, "CONTRACT", folder / "absent.py")
        yield score.make_base(BUDGET, folder)


@pytest.fixture(name="quick")
def _quick(base, monkeypatch, tmp_path):
    """-> a function that scores a text with results that nobody had to train for."""
    monkeypatch.delenv(score.SECRET, raising=False)
    monkeypatch.setattr(score, "run_seeds", lambda *args: [dict(RESULT) for _ in args[3].seeds])

    def run(text=GOOD, name="mine.py", **flags):
        file = tmp_path / name
        file.write_text(text)
        spec = f"{file}:Mine"
        return score.score(spec, score.ScoreConfig(router=spec, init=str(base), **flags))

    return run


def last_line(text):
    return json.loads(text.splitlines()[-1])


def test_the_same_command_gives_the_same_row(base, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(GOOD)
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--student", "anna", "--seeds", "2",
            "--out", str(base.parent.parent)]  # fmt: skip
    first = score.main([*argv, "--json", str(tmp_path / "row.json")])
    out = capsys.readouterr().out
    assert "training the common checkpoint" not in out, "the base was there already"
    assert last_line(out) == first == json.loads((tmp_path / "row.json").read_text())
    second = score.main([*argv, "--verify", first["hash"]])
    assert f"verified: {first['hash']}" in capsys.readouterr().out
    speed = "tokens_per_s"
    assert {k: v for k, v in first.items() if k != speed} == {
        k: v for k, v in second.items() if k != speed
    }, "a number of the row is another in a second run: what is random there and not seeded?"
    assert first["val_losses"][0] != first["val_losses"][1], "the seeds change nothing"
    assert first["contract"] == "-"
    assert first["dropped"] == 0 and first["dead"] < first["slots"] == 8


def test_two_visits_a_token_activate_what_the_table_of_parameters_says(build):
    model = build("phi", {"router": "topk", "top_k": 2})
    assert trial.activated(model, 2.0) == count_parameters(model)["activated"]
    assert trial.activated(model, 4.0) == count_parameters(model)["total"]


def test_balance_is_0_and_a_sole_expert_is_the_worst():
    even = trial.load(torch.full((4, 2, 4), 3.0), n_real=24, dropped=0)
    assert (even["load_cv"], even["max_vio"], even["dead"], even["slots"]) == (0, 0, 0, 8)
    assert even["visits_per_token"] == 2.0
    one = torch.zeros(4, 2, 4)
    one[:, :, 1] = 3.0
    sole = trial.load(one, n_real=24, dropped=12)
    assert sole["max_vio"] == 3.0 and sole["load_cv"] == pytest.approx(3**0.5)
    assert sole["dead"] == 6 and sole["dropped"] == 0.25


def test_a_wrong_hash_is_one_line_and_exit_code_2(quick, base, tmp_path, capsys):
    row = quick()
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--init", str(base)]
    score.main([*argv, "--verify", row["hash"]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        score.main([*argv, "--verify", "0" * 32])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1 and row["hash"] in told


def test_the_hash_holds_the_text_the_student_the_secret_and_the_budget(quick, monkeypatch):
    first = quick()["hash"]
    assert quick(name="other_name.py")["hash"] == first, "a file's name is no part of the row"
    others = [quick(GOOD + "#")["hash"], quick(student="bert")["hash"], quick(seeds=2)["hash"]]
    monkeypatch.setattr(score, "BUDGET", replace(BUDGET, steps=3))
    others.append(quick()["hash"])
    monkeypatch.setattr(score, "BUDGET", BUDGET)
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    others.append(quick()["hash"])
    assert len({first, *others}) == 6


def test_the_hash_holds_every_number_of_the_row(quick, base):
    row = quick()
    hashed = {k: v for k, v in row.items() if k not in ("hash", "tokens_per_s")}
    assert score.hash_row(hashed, base) == row["hash"]
    for name, value in hashed.items():
        other = value + 1 if isinstance(value, int | float) else "another:thing"
        assert score.hash_row(hashed | {name: other}, base) != row["hash"], name


def test_students_and_secrets_have_other_pictures_and_seeds():
    found = [score.derive(s, secret, 3) for s in map(str, range(50)) for secret in ("", "x")]
    assert len({d.first for d in found}) == len(found)
    assert len({tuple(d.seeds) for d in found}) == len(found)
    assert len({tuple(d.modalities) for d in found}) > 10
    assert found[0] == score.derive("0", "", 3)


def test_no_students_pictures_are_default_pictures():
    for student in ("", "anna", "bert"):
        derived = score.derive(student, "", 3)
        assert sorted(derived.modalities) == list(range(len(MODALITIES)))
        for split, seeds in SPLITS.items():
            spec = f"phantoms:5@{derived.first}@1"
            pictures = {s.image for s in load_samples([spec], "vqa", split)}
            default = {s.image for s in load_samples(["phantoms"], "vqa", split)}
            assert all(p in seeds for p in pictures) and not pictures & default
            assert min(pictures) - seeds[0] >= 10**6, "--data phantoms:1000000 would hold it"


def test_lines_of_code_leave_out_blank_lines_comments_and_docstrings():
    assert count_lines(GOOD) == 6
    assert count_lines("x = '''a\n\nb'''\n\n# no\ny = (1,\n     2)  # yes\n") == 5


BODY = "from routers import Router\nclass Mine(Router):\n"
GATE = "    def gate(self, logits, mask, x):\n"
CHEATS = {  # what is submitted, the line, and a word of what is told
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
        BODY + "    def update(self, visits):\n        self.register_forward_hook(1)",
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


def test_vetting_lets_honest_routers_through():
    vet(GOOD, "mine.py")
    vet(
        "import math\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
        "from moe import MLP\n" + BODY + "    needs = ('prompt', 'held')\n"
        "    def __init__(self, d, e, **more):\n        super().__init__(d, e, **more)\n"
        "        self.seen = nn.Parameter(torch.zeros(e))\n"
        "        self.register_buffer('bias', torch.zeros(e))\n"
        "    def update(self, visits):\n        self.bias += 0.1 * visits.sign()\n",
        "mine.py",
    )
    assert only_router(GOOD + "\n\nclass Other(Mine):\n    pass\n", "mine.py") == "Other"


INSIDE = {  # what vetting would have found, had it been hidden better: what is told at run time
    "fine": (GOOD, None),
    "patches the loss": (GOOD + "\nimport model\nmodel.MedMoE.loss = lambda *a: None\n", "changed"),
    "writes a file": (GOOD.replace("# as learnt", "open(FILE, 'w')"), "line 12: writes a file"),
    "starts a process": (
        GOOD.replace("# as learnt", "import os\n        os.system('true')"),
        "line 13: starts a process",
    ),
    "reads the modality": (GOOD.replace("sums", "needs = ('modal' + 'ity',)\n    sums"), "needs"),
    "swallows the refusal": (
        GOOD + "\ntry:\n    open(FILE, 'a')\nexcept OSError:\n    pass\n", "writes a file"
    ),
    "raises": (GOOD.replace("# as learnt", "1 / 0"), "line 12: ZeroDivisionError"),
    "hangs": (GOOD.replace("# as learnt", "while True: pass"), "stopped after"),
}  # fmt: skip


@pytest.fixture(name="told", scope="module")
def _told(base, tmp_path_factory):
    """What became of each of INSIDE, two at a time, unvetted; and the file that some write."""
    file = tmp_path_factory.mktemp("outside") / "written"
    derived = score.derive("", "", 1)
    job = asdict(BUDGET) | {
        "class": "Mine", "init": str(base), "seed": 1, "where": "mine.py",
        "data": f"phantoms:8@{derived.first}@1",
    }  # fmt: skip

    def run(name):
        text = INSIDE[name][0].replace("FILE", repr(str(file)))
        try:
            score.run_seed(job, text, 3 if name == "hangs" else 100)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(INSIDE, pool.map(run, INSIDE), strict=True)), file


@pytest.mark.parametrize("name", INSIDE)
def test_what_vetting_does_not_see_is_caught_while_it_runs(told, name):
    sentences, file = told
    wanted = INSIDE[name][1]
    if wanted is None:
        assert sentences[name] is None
    else:
        assert wanted in (sentences[name] or "nothing was told"), sentences[name]
        assert sentences[name].startswith("mine.py") and "\n" not in sentences[name]
    assert not file.exists()


def test_the_snapshot_notices_functions_methods_and_constants(monkeypatch):
    import scoring

    before = contain.snapshot()
    assert contain.changed(before) == []
    monkeypatch.setattr(scoring, "mean", lambda values: 1.0)
    monkeypatch.setattr(scoring.Record, "text", None)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)
    monkeypatch.setattr(score.Budget, "steps", 1)
    found = contain.changed(before)
    assert {"scoring.mean", "records.Record.text", "torch.nn.functional.cross_entropy"} <= {*found}
    monkeypatch.undo()
    was = scoring.mean.__code__
    scoring.mean.__code__ = (lambda values: 1.0).__code__
    try:
        assert contain.changed(before) == ["scoring.mean"]
    finally:
        scoring.mean.__code__ = was


CONTRACT = """
import pathlib

def test_named_after_the_paper(request):
    text = pathlib.Path(request.config.getoption("--router").rpartition(":")[0]).read_text()
    while "hangs" in text:
        pass
    assert "fails" not in text, "gates must not fail"
    assert (request.config.getoption("--assignment") or 3) == 3

def test_of_others():
    pass
"""
OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--router")
    parser.addoption("--assignment", type=int)
"""


@pytest.fixture(name="folder")
def _folder(tmp_path, monkeypatch):
    """Five submissions, and a contract that takes no time to load."""
    (tmp_path / "conftest.py").write_text(OPTIONS)
    (tmp_path / "test_stub.py").write_text(CONTRACT)
    monkeypatch.setattr(judge, "CONTRACT", tmp_path / "test_stub.py")
    monkeypatch.setattr(judge, "ASSIGNMENTS", tmp_path / "test_stub.py")
    folder = tmp_path / "handed in"
    folder.mkdir()
    texts = {"a_broken": GOOD + ")", "b_cheats": "import os\n" + GOOD, "c_fails": GOOD + "# fails",
             "d_hangs": GOOD + "# hangs", "e_good": GOOD, "f_none": "x = 1\n"}  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_no_submission_stops_the_others(folder, tmp_path, capsys):
    table, report = tmp_path / "grades.csv", tmp_path / "grades.xml"
    grade.main([str(folder), "--limit", "3", "--csv", str(table), "--junit", str(report)])
    rows = {row["file"]: row for row in csv.DictReader(table.open())}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {"a_broken.py": "refused", "b_cheats.py": "refused",
                        "c_fails.py": "failed", "d_hangs.py": "stopped", "e_good.py": "passed",
                        "f_none.py": "refused"}  # fmt: skip
    assert rows["e_good.py"]["contract"] == "2/2" and rows["c_fails.py"]["contract"] == "1/2"
    assert "gates must not fail" in rows["c_fails.py"]["note"]
    assert "line 1: imports os" in rows["b_cheats.py"]["note"]
    suites = {s.get("name"): s for s in ET.parse(report).getroot()}
    failures = {name: int(s.get("failures")) for name, s in suites.items()}
    assert failures == {name: int(v != "passed") for name, v in verdicts.items()}
    assert len(suites["e_good.py"]) == 3, "vetting and the two tests of the contract"
    assert re.search(r"^d_hangs.py +Mine +stopped", capsys.readouterr().out, re.MULTILINE)


def test_an_assignments_own_tests_and_the_score_stand_beside(folder, monkeypatch):
    for file in folder.glob("[a-df]_*.py"):
        file.unlink()
    monkeypatch.setattr(score, "score", lambda *a, **k: {"val_loss": 0.5, "hash": "abc"})
    (done,) = grade.main([str(folder), "--limit", "30", "--assignment", "3", "--score"])
    assert (done.assignment, done.val_loss, done.hash) == ("2/2", 0.5, "abc")
    (done,) = grade.main([str(folder), "--limit", "30", "--assignment", "4"])
    assert (done.contract, done.assignment, done.verdict) == ("2/2", "1/2", "failed")


def test_tests_that_are_not_there_are_skipped(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "CONTRACT", tmp_path / "absent.py")
    done = grade.grade_file(folder / "e_good.py", grade.GradeConfig(folder=str(folder)))
    assert (done.contract, done.verdict) == ("-", "passed")
    assert done.suites["contract"][0].state == "skipped"


@pytest.mark.parametrize("argv", [[], ["--router", "x.py:Mine"], ["--router", "topk"]])
def test_a_mistake_of_the_user_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        score.main(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_real_budget_gives_the_same_row_twice(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    argv = ["--router", f"{file}:Mine", "--student", "anna", "--out", str(tmp_path / "base")]
    first = score.main(argv)
    assert score.main([*argv, "--verify", first["hash"]])["hash"] == first["hash"]
