"""lab.ablate: what is trained, what is kept, and the arithmetic of the table."""

import json
import math
import shlex
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from config import TrainConfig, UserError
from engine.cli import parse
from lab import ablate
from lab.ablate import ROWS, SETS, Row
from metrics import question_ids
from sources.load import load_samples

QUESTIONS = load_samples(["phantoms"], "vqa", "test")[:40]


class Fake:
    """In place of train.py and eval.py: notes the command, leaves a checkpoint or answers."""

    def __init__(self):
        self.commands, self.fails, self.lock = [], "", threading.Lock()

    def __call__(self, runner, row, command):
        with self.lock:
            self.commands.append(command)
        value = dict(zip(command, [*command[1:], ""], strict=True))
        if self.fails in command:
            raise UserError("no memory")
        time.sleep(0.001)
        if command[0] == "train.py":
            Path(value["--out"], f"phase{value['--phase']}").mkdir(parents=True)
            return
        right = int(Path(command[1]).parent.name[0], 16) + 20  # the first n answers are right
        answers = {name: s.turns[0][1] if i < right else "?"
                   for i, (name, s) in enumerate(zip(question_ids(QUESTIONS), QUESTIONS))}  # noqa: B905 # fmt: skip
        Path(value["--json"]).write_text(json.dumps({
            "answers": answers, "data": ["phantoms"], "split": "test",
            "params": {"total": 3_000_000, "activated": 2_000_000},
        }))  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(ablate.Runner, "call", lambda *call: fake(*call))
    monkeypatch.setattr(ablate, "load_samples", lambda data, task, split: QUESTIONS)
    return fake


def run(tmp_path, *argv):
    return ablate.main([*argv, "--out", str(tmp_path)])


def test_rows_share_what_they_have_in_common_and_nothing_is_done_twice(fake, tmp_path):
    names = ("medmoe", "no-meta", "no-phase-3", "asked-oracle", "no-phase-2")
    found = run(tmp_path, *names, "--seeds", "2", "--jobs", "2")
    phases = [c[c.index("--phase") + 1] for c in fake.commands if c[0] == "train.py"]
    # a seed: phase 1 once, phase 2 as it is and skipped, phase 3 of medmoe, no-meta, no-phase-2
    assert {n: phases.count(n) for n in "123"} == {"1": 2, "2": 4, "3": 6}
    assert sum(c[0] == "eval.py" for c in fake.commands) == 10
    assert [row["row"] for row in found["rows"]] == list(names)
    before = len(fake.commands)
    assert run(tmp_path, *names, "--seeds", "2")["rows"] == found["rows"]
    assert len(fake.commands) == before
    run(tmp_path, *names, "--seeds", "3")
    assert len(fake.commands) == before * 3 // 2


def test_a_row_and_what_it_is_compared_with_are_trained_with_their_flags(fake, tmp_path):
    run(tmp_path, "oracle-asked-wrong", "--seeds", "1", "--jobs", "1", "--flags", "--batch-size 16")
    train = [c for c in fake.commands if c[0] == "train.py"]
    assert [c[2] for c in train] == ["1", "2", "3", "3"]  # medmoe and oracle
    assert all(c[-2:] == ["--batch-size", "16"] for c in train[:3])
    assert train[3][-4:] == ["--batch-size", "16", "--router", "oracle"]
    assert "--init" not in train[0] and train[3][train[3].index("--init") + 1].endswith("phase2")
    assert all(c[c.index("--seed") + 1] == "0" and "--no-eval" in c for c in train)
    evaluated = [c[c.index("--json") + 2 :] for c in fake.commands if c[0] == "eval.py"]
    assert evaluated == [[], [], ["--router", "lab/controls.py:Wrong"]]


def test_after_an_error_what_is_done_stays_and_out_of_time_is_said(
    fake, tmp_path, capsys, monkeypatch
):
    fake.fails = "--no-meta"
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "medmoe", "no-meta", "--seeds", "1", "--jobs", "1")
    assert "no memory" in capsys.readouterr().err
    n_before, fake.fails = len(fake.commands), ""

    def stop(*call):
        raise ablate.OutOfTime

    with monkeypatch.context() as patch:
        patch.setattr(ablate.Runner, "call", stop)
        found = run(tmp_path, "medmoe", "no-meta", "--seeds", "1")
    assert [row["row"] for row in found["rows"]] == ["medmoe"]
    assert "not finished: no-meta; the same" in capsys.readouterr().out
    run(tmp_path, "medmoe", "no-meta", "--seeds", "1")
    assert len(fake.commands) == n_before + 2  # phase 3 of no-meta, and its answers


def test_a_failing_command_is_reported_by_its_last_line_and_stops_the_rest(tmp_path):
    runner = ablate.Runner(parse(ablate.AblateConfig, ["core", "--out", str(tmp_path)], "x"))
    assert runner.end == math.inf
    runner.call(
        Row("Row"), ["-c", "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '1')"]
    )
    with pytest.raises(UserError, match=r"^Row: python -c .*: the last$"):
        runner.call(Row("Row"), ["-c", "import sys; sys.exit('a line\\nthe last')"])
    with pytest.raises(ablate.OutOfTime):
        runner.call(Row("Row"), ["train.py", "--no-such-flag"])
    late = ablate.Runner(parse(ablate.AblateConfig, ["core", "--minutes", "0"], "x"))
    with pytest.raises(ablate.OutOfTime):
        late.call(Row("Row"), ["train.py", "--no-such-flag"])


def test_rows_and_sets(tmp_path, capsys):
    assert len(SETS["core"]) == 23 and len(SETS["experts"]) == 36 and len(ROWS) == 64
    assert {name for names in SETS.values() for name in names} == ROWS.keys()
    assert list(ablate.chosen_rows(["oracle-asked-wrong"])) == ["medmoe", "oracle",
                                                                "oracle-asked-wrong"]  # fmt: skip
    assert ROWS["d2-e8-k4"].phase3 == "--router topk --balance 0.01 --experts 8 --top-k 4"
    for row in ROWS.values():
        assert row.against in ROWS
        for number in (1, 2, 3):
            words = shlex.split(f"{row.common} {getattr(row, f'phase{number}') or ''}")
            parse(TrainConfig, [*words, "--phase", str(number)], "train.py")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "corre")
    assert "corre: neither a set" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["core", "hard"])
def test_the_published_tables_are_those_of_their_numbers(name):
    file = ablate.ROOT / "results" / "ablations" / f"{name}.json"
    assert ablate.table(json.loads(file.read_text())) == file.with_suffix(".md").read_text()


def test_the_paired_interval_by_hand():
    scores = np.array([[1.0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]])
    others = np.array([[0.0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]])
    found = ablate.paired(scores, others, ["a", "a", "b", "b"])
    each = np.array([1, 2, 1]) / 4
    half = 4.303 * each.std(ddof=1) / 3**0.5
    assert found["difference"] == pytest.approx(1 / 3)
    assert found["ci95_seeds"] == pytest.approx((1 / 3 - half, 1 / 3 + half))
    assert found["ci95"] == pytest.approx((1 / 3, 1 / 3))
    assert ablate.paired(scores[:1], others[:1], ["a", "a", "b", "b"])["ci95_seeds"] is None


def test_the_table_has_what_was_counted(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # the table is there without it
    found = run(tmp_path, "medmoe", "top-1", "--seeds", "3")
    assert "pip install -r requirements-lab.txt" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert json.loads((tmp_path / "medmoe-top-1.json").read_text())["hash"] == found["hash"]
    text = (tmp_path / "medmoe-top-1.md").read_text()
    assert f"`{found['command']}`, hash {found['hash']}" in text
    first, second = found["rows"]
    closed = np.array([s.answer_type == "closed" for s in QUESTIONS])
    assert 0 < closed.sum() < 40
    means = []
    for row in (first, second):
        runner = ablate.Runner(ablate.AblateConfig(names=(), out=str(tmp_path)))
        folders = [runner.phase(3, ROWS[row["row"]], seed).parent.name for seed in range(3)]
        rights = [np.arange(40) < int(name[0], 16) + 20 for name in folders]  # of each seed
        for part, which in (("closed", closed), ("open", ~closed), ("together", closed | True)):
            shares = [right[which].mean() for right in rights]
            assert row[part] == pytest.approx({"mean": np.mean(shares),
                                               "sd": np.std(shares, ddof=1)})  # fmt: skip
        means.append(row["together"]["mean"])
        sd = row["together"]["sd"]
        assert f"| {100 * means[-1]:.1f} ± {100 * sd:.1f} |" in text
    assert first["against"] is None and second["against"]["row"] == "medmoe"
    assert second["against"]["difference"] == pytest.approx(means[1] - means[0])
    assert f"| medmoe | {(means[1] - means[0]) * 100:+.1f} | [" in text
    assert text.count("| 2.00 M / 3.00 M |") == 2


def test_the_plot_is_drawn_with_matplotlib(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    against = {"row": "a", "difference": 0.01, "ci95": [0, 0.02], "ci95_seeds": None}
    rows = [{"title": "b", "against": None}, {"title": "c", "against": against}]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, file, **_: drawn.append(self))
        ablate.plot({"rows": rows, "seeds": [0]}, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert lines[:2] == [[[0, 0], [2, 0]], [[1, 0]]]  # the interval, then the difference
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c (less a)"]
