"""lab.ablate: what is trained, what is kept, and the arithmetic of the table."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from config import TrainConfig
from engine.cli import parse
from lab import ablate
from lab.ablate import ROWS, SETS
from metrics import question_ids
from sources.load import load_samples
from tests.mini import error_line

QUESTIONS = load_samples(["phantoms"], "vqa", "test")[:40]


class Fake:
    """In place of train.py and eval.py: notes the command, leaves a checkpoint or answers."""

    def __init__(self):
        self.commands, self.fails = {"train.py": [], "eval.py": []}, ""

    def __call__(self, words, **options):
        _, script, *command = words
        self.commands[script].append(command)
        if self.fails in command:
            return SimpleNamespace(returncode=1, stderr="a line\nno memory\n")
        value = dict(zip(command, [*command[1:], ""], strict=True))
        if script == "train.py":
            Path(value["--out"], f"phase{value['--phase']}").mkdir(parents=True)
        else:
            found = {"data": ["phantoms"], "params": {"total": 3, "activated": 2}}
            found["answers"] = dict.fromkeys(question_ids(QUESTIONS), "yes")
            Path(value["--json"]).write_text(json.dumps(found))
        return SimpleNamespace(returncode=0)

    def count(self):  # of train.py, of eval.py
        return [len(commands) for commands in self.commands.values()]


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(ablate.subprocess, "run", fake)
    monkeypatch.setattr(ablate, "load_samples", lambda data, task, split: QUESTIONS)
    monkeypatch.setattr(ablate, "code", lambda: "")
    return fake


def run(tmp_path, *argv):
    return ablate.main([*argv, "--jobs", "1", "--out", str(tmp_path)])


def test_rows_share_what_they_have_in_common_and_nothing_is_done_twice(fake, tmp_path):
    names = ("medmoe", "no-meta", "no-phase-3", "asked-oracle", "no-phase-2")
    found = run(tmp_path, *names, "--seeds", "2")
    phases = [c[c.index("--phase") + 1] for c in fake.commands["train.py"]]
    # a seed: phase 1 once, phase 2 as it is and skipped, phase 3 of medmoe, no-meta, no-phase-2
    assert {n: phases.count(n) for n in "123"} == {"1": 2, "2": 4, "3": 6}
    about_images = [s for s in QUESTIONS if s.kind != "sign"]
    yes = [s.turns[0][1] == "yes" for s in about_images if s.answer_type == "closed"]  # answered
    assert found["rows"][0]["closed"] == pytest.approx({"mean": np.mean(yes), "sd": 0})
    assert found["rows"][0]["facts"]["mean"] == 0 and len(about_images) < 40
    scores = np.load(tmp_path / f"{'-'.join(names)}.npz")
    assert scores["no-meta"].shape == (2, 40)
    assert run(tmp_path, *names, "--seeds", "2")["rows"] == found["rows"]
    assert fake.count() == [12, 10]
    kept = shutil.copy(tmp_path / f"{'-'.join(names)}.npz", tmp_path / "kept.npz")
    assert run(tmp_path / "again", *names, "--scores", str(kept)) == found and fake.count() == [
        12,
        10,
    ]


def test_scores_that_are_none_or_lack_a_row_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", medmoe=np.zeros((1, 3)))
    (tmp_path / "y.npz").write_text("no scores")
    argv = ["medmoe", "no-meta", "--out", tmp_path, "--scores"]
    np.save(tmp_path / "z.npy", np.zeros(3))
    for file, named in (("x.npz", "has no no-meta, hash, images"), ("y.npz", "not what lab.abl"),
                        ("z.npy", "not what lab.abl")):  # fmt: skip
        line = error_line(capsys, ablate.main, *argv, tmp_path / file)
        assert f"{tmp_path / file}: {named}" in line
    assert "No closing" in error_line(capsys, ablate.main, *argv[:-1], "--flags", "--lr '1")


def test_after_an_error_what_is_done_stays_and_rows_have_their_flags(fake, tmp_path, capsys):
    fake.fails, argv = "oracle", ("oracle-asked-wrong", "--seeds", "1", "--flags", "--steps 9")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, *argv)
    assert capsys.readouterr().err.endswith(": no memory\n")
    assert fake.count() == [4, 1]  # medmoe, with which it is compared; the rest is stopped
    fake.fails = ""
    run(tmp_path, *argv)
    oracle = fake.commands["train.py"][-1]
    assert fake.count() == [5, 5] and oracle[-5:] == ["9", "--router", "oracle", "--top-k", "1"]
    assert oracle[oracle.index("--init") + 1].endswith("phase2")
    asked = [c[-1] for c in fake.commands["eval.py"][-3:]]
    assert asked == [f"lab/controls.py:Wrong{n}" for n in (1, 2, 3)]


def test_all_rows_are_in_a_set_and_have_flags_of_train():
    assert {name for names in SETS.values() for name in names} == ROWS.keys()
    assert not {"images", "kinds", "sizes", "bits", "hash"} & ROWS.keys()  # kept beside the scores
    for row in ROWS.values():
        assert row.against in ROWS
        for number in (1, 2, 3):
            words = shlex.split(f"{row.common} {getattr(row, f'phase{number}') or ''}")
            parse(TrainConfig, [*words, "--phase", str(number)], "train.py")


def test_the_paired_interval_by_hand():
    scores = np.array([[1.0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]])
    others = np.array([[0.0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]])
    found = ablate.paired(scores, others, ["a", "a", "b", "b"], 10)
    sd = np.std([1 / 4, 2 / 4, 1 / 4], ddof=1) / 3**0.5
    low, high = found["ci95"]
    assert found["difference"] == pytest.approx(1 / 3)
    assert (low, high) == pytest.approx((-0.3243, 0.9910), abs=1e-4)  # both images the same
    # two-sided quantiles of Student's t with 2 degrees of freedom, and of the normal distribution
    for name, t in (("ci95_seeds", 4.3027), ("all_seeds", 14.089)):
        assert found[name] == pytest.approx((1 / 3 - t * sd, 1 / 3 + t * sd), rel=1e-3), name
    ratio = (found["all_images"][1] - 1 / 3) / (high - 1 / 3)
    assert ratio == pytest.approx(2.807 / 1.960, rel=1e-3) and not found["stands"]
    assert ablate.paired(1 + 0 * scores, 0 * scores, list("abcd"), 1)["stands"]


COMMITTED = ("facts", "routers", "parts", "experts", "signs", "rates", "long")


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_tables_are_those_of_the_committed_scores(name):
    folder = ablate.ROOT / "results/ablations"
    result = json.loads((folder / f"{name}.json").read_text())
    again = ablate.summarise(ablate.chosen_rows([name]), dict(np.load(folder / f"{name}.npz")))
    assert json.loads(json.dumps(again)) == result["rows"]
    table = (folder / f"{name}.md").read_text()
    assert table == ablate.table(result)
    page = (ablate.ROOT / "results/README.md").read_text()
    if name != "signs":  # its picture stands there
        assert table.partition("|")[2].strip() in page
