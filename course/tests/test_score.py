"""A row is reproducible, and its hash covers it: python -m pytest course/tests/test_score.py"""

import json
from dataclasses import replace

import pytest
import torch

from config import MODALITIES
from course import score, trial
from course.tests.handed_in import BUDGET, GOOD, small_base
from course.vet import count_lines
from model import count_parameters
from sources.load import load_samples
from sources.phantoms import SPLITS, seeds

RESULT = {"val_loss": 1.0, "closed": 0.5, "open": None, "load_cv": 0.1, "max_vio": 0.2, "dead": 0,
          "experts": 8, "dropped": 0.0, "activated": 9, "tokens_per_s": 100.0,
          "load": [[1.0, 2.0, 3.0, 4.0]] * 4}  # fmt: skip


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
    with small_base(tmp_path_factory.mktemp("score")) as base:
        yield base


@pytest.fixture(name="quick")
def _quick(base, monkeypatch, tmp_path):
    """-> a function that scores a submission's text with fixed results, without training."""
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


@pytest.mark.slow
def test_the_same_command_gives_the_same_row(base, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(GOOD)
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--student", "anna", "--seeds", "2",
            "--out", str(base.parent.parent)]  # fmt: skip
    first = score.main([*argv, "--json", str(tmp_path / "row.json")])
    out = capsys.readouterr().out
    assert "training the common checkpoint" not in out, "the common checkpoint exists already"
    assert last_line(out) == first == json.loads((tmp_path / "row.json").read_text())
    second = score.main([*argv, "--verify", first["hash"]])
    assert f"verified: {first['hash']}" in capsys.readouterr().out
    speed = "tokens_per_s"
    assert {k: v for k, v in first.items() if k != speed} == {
        k: v for k, v in second.items() if k != speed
    }, "a number of the row differs in a second run: it is random and not seeded"
    assert first["val_losses"][0] != first["val_losses"][1], "the seeds have no effect"
    assert first["contract"] == "-"
    assert first["dropped"] == 0 and first["dead"] < first["experts"] == 8


def test_two_experts_per_token_activate_what_count_parameters_counts(build):
    model = build("phi", {"router": "topk", "top_k": 2})
    assert trial.activated(model, 2.0) == count_parameters(model)["activated"]
    assert trial.activated(model, 4.0) == count_parameters(model)["total"]


def test_cv_and_max_vio_are_0_at_balance_and_largest_for_a_single_expert():
    even = trial.balance(torch.full((4, 2, 4), 3.0), n_real=24, dropped=0)
    assert (even["load_cv"], even["max_vio"], even["dead"], even["experts"]) == (0, 0, 0, 8)
    assert even["experts_per_token"] == 2.0
    one = torch.zeros(4, 2, 4)
    one[:, :, 1] = 3.0
    single = trial.balance(one, n_real=24, dropped=12)
    assert single["max_vio"] == 3.0 and single["load_cv"] == pytest.approx(3**0.5)
    assert single["dead"] == 6 and single["dropped"] == 0.25


def test_a_wrong_hash_is_one_line_and_exit_code_2(quick, base, tmp_path, capsys):
    row = quick()
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--init", str(base)]
    score.main([*argv, "--verify", row["hash"]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        score.main([*argv, "--verify", "0" * 32])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and row["hash"] in error


def test_the_hash_covers_the_text_the_student_the_secret_and_the_budget(quick, monkeypatch):
    first = quick()["hash"]
    assert quick(name="other_name.py")["hash"] == first, "it depends on the file's name"
    others = [quick(GOOD + "#")["hash"], quick(student="bert")["hash"], quick(seeds=2)["hash"]]
    monkeypatch.setattr(score, "BUDGET", replace(BUDGET, steps=3))
    others.append(quick()["hash"])
    monkeypatch.setattr(score, "BUDGET", BUDGET)
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    others.append(quick()["hash"])
    assert len({first, *others}) == 6


def test_the_hash_covers_every_number_of_the_row(quick, base):
    row = quick()
    hashed = {k: v for k, v in row.items() if k not in ("hash", "tokens_per_s")}
    assert score.hash_row(hashed, base) == row["hash"]
    for name, value in hashed.items():
        other = value + 1 if isinstance(value, int | float) else "another:thing"
        assert score.hash_row(hashed | {name: other}, base) != row["hash"], name


def test_every_student_and_secret_has_its_own_images_and_seeds():
    found = [score.derive(s, secret, 3) for s in map(str, range(50)) for secret in ("", "x")]
    assert len({d.first for d in found}) == len(found)
    assert len({tuple(d.seeds) for d in found}) == len(found)
    assert len({tuple(d.modalities) for d in found}) > 10
    assert found[0] == score.derive("0", "", 3)


def test_no_image_of_a_student_is_a_default_image():
    for student in ("", "anna", "bert"):
        derived = score.derive(student, "", 3)
        assert sorted(derived.modalities) == list(range(len(MODALITIES)))
        for split in SPLITS:
            spec = f"phantoms:5+{derived.first}"
            images = {s.image for s in load_samples([spec], "vqa", split)}
            default = seeds(split, 10**6)  # all that --data phantoms:N can name
            assert images and not any(image in default for image in images)
            assert all(image in SPLITS[split] for image in images)


def test_lines_of_code_leave_out_blank_lines_comments_and_docstrings():
    assert count_lines(GOOD) == 6
    assert count_lines("x = '''a\n\nb'''\n\n# no\ny = (1,\n     2)  # yes\n") == 5


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
