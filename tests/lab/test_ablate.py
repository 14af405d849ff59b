"""The lab's comparisons: what is trained, what is kept, and the arithmetic of the table."""

import json
import shlex
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import TrainConfig, UserError
from engine.cli import parse
from lab import ablate, comparison, forest
from lab.rows import ROWS, SETS, Row
from metrics import question_ids
from sources.load import load_samples


class Fake:
    """In place of train.py and eval.py: notes the command, leaves a checkpoint or answers."""

    def __init__(self, monkeypatch, fails=()):
        self.commands, self.fails, self.lock = [], fails, threading.Lock()
        monkeypatch.setattr(ablate.Runner, "call", lambda runner, name, command: self(command))
        self.questions = load_samples(["phantoms"], "vqa", "test")[:40]

    def __call__(self, command):
        with self.lock:
            self.commands.append(command)
        value = dict(zip(command, [*command[1:], ""], strict=True))
        if any(word in command for word in self.fails):
            raise UserError("no memory")
        time.sleep(0.01)
        if command[0] == "train.py":
            Path(value["--out"], f"phase{value['--phase']}").mkdir(parents=True)
            return
        folder = Path(command[1]).parent.name
        right = int(folder[0], 16) + 20  # answers that depend on the checkpoint
        ids = question_ids(self.questions)
        answers = {i: s.turns[0][1] if n < right else "?"
                   for n, (i, s) in enumerate(zip(ids, self.questions, strict=True))}  # fmt: skip
        Path(value["--json"]).write_text(json.dumps({
            "answers": answers, "data": ["phantoms"], "split": "test", "limit": 40,
            "params": {"total": 3, "activated": 2},
            "protocols": {"strict": {"overall": right / 40}},
        }))  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    short = load_samples(["phantoms"], "vqa", "test")[:40]
    monkeypatch.setattr(comparison, "questions", lambda data, split: tuple(short))
    return Fake(monkeypatch)


def run(tmp_path, *argv):
    return ablate.main([*argv, "--out", str(tmp_path / "kept"), "--results", str(tmp_path / "r")])


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
    assert all(c[c.index("--batch-size") + 1] == "16" for c in train)
    assert train[3][-2:] == ["--router", "oracle"] and "--router" not in train[1]
    assert train[3][train[3].index("--init") + 1].endswith("phase2")
    evaluated = [c[c.index("--json") + 2 :] for c in fake.commands if c[0] == "eval.py"]
    assert evaluated == [[], [], ["--router", "lab/controls.py:Wrong"]]


def test_after_an_error_what_is_done_stays_and_the_line_names_the_row(monkeypatch, fake, tmp_path,
                                                                      capsys):  # fmt: skip
    fake.fails = ("--no-meta",)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "medmoe", "no-meta", "--seeds", "1", "--jobs", "1")
    assert stopped.value.code == 2 and "no memory" in capsys.readouterr().err
    before, fake.fails = len(fake.commands), ()
    run(tmp_path, "medmoe", "no-meta", "--seeds", "1")
    assert len(fake.commands) == before + 2  # phase 3 of no-meta, and its answers


def test_out_of_time_nothing_new_begins_and_unfinished_rows_are_listed(fake, tmp_path, capsys,
                                                                       monkeypatch):  # fmt: skip
    slow = fake.__call__

    def call(runner, name, command):
        if runner.end < time.monotonic() or len(fake.commands) >= 4:
            raise ablate.OutOfTime
        slow(command)

    monkeypatch.setattr(ablate.Runner, "call", call)
    found = run(tmp_path, "medmoe", "no-meta", "--seeds", "1", "--jobs", "1")
    assert [row["row"] for row in found["rows"]] == ["medmoe"]
    assert "not finished: no-meta" in capsys.readouterr().out


def test_a_failing_command_is_reported_by_its_last_line(tmp_path):
    runner = ablate.Runner(parse(ablate.AblateConfig, ["core", "--out", str(tmp_path)], "x"))
    with pytest.raises(UserError, match=r"--router nobody: 'nobody' is neither"):
        runner.call("row", ["train.py", "--router", "nobody", "--out", str(tmp_path / "o")])
    assert runner.stopped
    runner.end = time.monotonic() - 1
    with pytest.raises(ablate.OutOfTime):
        runner.call("row", ["train.py"])


def test_an_unknown_row_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "corre")
    assert "corre: neither a set (core" in capsys.readouterr().err


def test_the_hash_depends_on_every_flag_before(tmp_path):
    hashes = {ablate.key(seed, *stages) for seed in (0, 1)
              for stages in (["a"], ["b"], ["a", "b"], [["a", "b"]])}  # fmt: skip
    assert len(hashes) == 8


@pytest.mark.parametrize("name", ROWS)
def test_every_rows_flags_are_flags_of_train(name):
    row: Row = ROWS[name]
    assert row.against in ROWS
    for number in (1, 2, 3):
        words = shlex.split(f"{row.common} {getattr(row, f'phase{number}') or ''}")
        parse(TrainConfig, [*words, "--phase", str(number)], "train.py")


def test_every_set_names_rows():
    assert all(name in ROWS for names in SETS.values() for name in names)
    assert {"medmoe", "no-phase-1", "no-meta", "dense-activated", "oracle"} <= set(SETS["core"])


def test_the_paired_interval_by_hand():
    scores = np.array([[1.0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]])
    others = np.array([[0.0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]])
    found = comparison.paired(scores, others, ["a", "a", "b", "b"])
    each = np.array([1, 2, 1]) / 4
    assert found["difference"] == pytest.approx(each.mean())
    half = 4.303 * each.std(ddof=1) / 3**0.5
    assert found["ci95_seeds"] == pytest.approx((each.mean() - half, each.mean() + half))
    # image a gains 1/3 a question, b as much: any sample of images has the same mean
    assert found["ci95"] == pytest.approx((1 / 3, 1 / 3))
    alone = comparison.paired(scores[:1], others[:1], ["a", "a", "b", "b"])
    assert alone["ci95_seeds"] is None and alone["ci95"] == pytest.approx((0, 0.5))


def test_the_table_has_what_was_counted(fake, tmp_path):
    found = run(tmp_path, "medmoe", "top-1", "--seeds", "3")
    text = (tmp_path / "r" / "medmoe-top-1.md").read_text()
    assert found["hash"] in text and found["command"] in text
    first, second = found["rows"]
    assert first["against"] is None and second["against"]["row"] == "medmoe"
    closed = [s.answer_type == "closed" for s in fake.questions]
    # of the first n questions all are right; so many are closed
    kept = sorted(Path(tmp_path / "kept").glob("*/answers-*.json"))
    means = [json.loads(p.read_text())["protocols"]["strict"]["overall"] for p in kept]
    n_closed = sum(closed)
    assert sorted(m for row in found["rows"] for m in [row["together"]["mean"]]) == pytest.approx(
        sorted([first["together"]["mean"], second["together"]["mean"]])
    )
    total = sum(row["together"]["mean"] for row in found["rows"]) * 3
    assert total == pytest.approx(sum(means))
    assert first["together"]["mean"] * 40 == pytest.approx(
        first["closed"]["mean"] * n_closed + first["open"]["mean"] * (40 - n_closed)
    )
    difference = second["together"]["mean"] - first["together"]["mean"]
    assert second["against"]["difference"] == pytest.approx(difference)
    assert f"{difference * 100:+.1f}" in text and "0.00 M / 0.00 M" in text


def test_the_plot_puts_each_dot_where_its_difference_is(fake, tmp_path):
    found = run(tmp_path, "medmoe", "top-1", "no-meta", "--seeds", "2")
    rows = found["rows"][1:]
    for row, difference in zip(rows, (-0.02, 0.01), strict=True):
        row["against"] |= {"difference": difference, "ci95": (-0.03, 0.03), "ci95_seeds": None}
    file = tmp_path / "plot.png"
    forest.forest(found, file)
    plot = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert plot.shape == (forest.TOP + 2 * forest.ROW + 40, forest.WIDTH, 3)
    is_dot = np.abs(plot - (0x0A, 0x58, 0xCA)).sum(axis=2) < 30
    is_line = plot[forest.TOP + 1].sum(axis=1) < 450  # the line at 0; the others are light
    zero = np.flatnonzero(is_line).mean()
    middles = []
    for i in range(2):
        part = is_dot[forest.TOP + i * forest.ROW : forest.TOP + (i + 1) * forest.ROW]
        tall = np.flatnonzero(part.sum(axis=0) > 7)  # the dot is taller than its interval's line
        middles.append(tall.mean() - zero)
    assert middles[0] < 0 < middles[1]
    assert middles[0] / middles[1] == pytest.approx(-2, rel=0.05)
