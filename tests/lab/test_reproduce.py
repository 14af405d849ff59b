"""lab.reproduce: which commands it runs, and where their results go."""

from types import SimpleNamespace

import pytest

from lab import ablate, reproduce
from tests.mini import error_line


def test_all_is_every_set_of_the_ablations_and_three_seeds(tmp_path, monkeypatch):
    ran, kept = [], tmp_path / "runs/ablations/facts.json"
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, cwd: (
        ran.append(" ".join(words[1:])), SimpleNamespace(returncode=0))[1])  # fmt: skip
    kept.parent.mkdir(parents=True)
    (tmp_path / "results/ablations").mkdir(parents=True)
    kept.write_text("{}")
    reproduce.main(["all"])
    sets = {command.split()[2] for command in ran if "lab.ablate" in command}
    assert sets == ablate.SETS.keys() and len(ran) == len(sets) + 5
    assert (tmp_path / "results/ablations/facts.json").read_text() == "{}"
    ran.clear()
    reproduce.main(["slake:a b", "--list"])
    assert ran == []
    reproduce.main(["slake:a b"])
    assert [command[-33:] for command in ran] == [
        f"slake-tiny-seed{seed}.json --data slake:a b"[-33:] for seed in range(3)]  # fmt: skip
    ran.clear()
    reproduce.main(["medmnist:/d/pneumoniamnist_64.npz"])
    name = "pneumoniamnist-tiny-router-topk-steps-300-seed2.json"
    assert f"--out runs/pneumoniamnist-tiny-2 --resume --json results/{name} " in ran[2]
    ran.clear()
    reproduce.main(["slake:a+vqa-rad:b"])
    assert len(ran) == 9 and ran[6:] == [
        "train.py --phase 3 --seed 2 --out runs/slake+vqa-rad-tiny-2 --resume --no-eval "
        "--data slake:a --data vqa-rad:b",
        "eval.py runs/slake+vqa-rad-tiny-2/phase3 --data slake:a --blind "
        "--json results/slake+vqa-rad-tiny-seed2-slake.json",
        "eval.py runs/slake+vqa-rad-tiny-2/phase3 --data vqa-rad:b --blind "
        "--json results/slake+vqa-rad-tiny-seed2-vqa-rad.json"]  # fmt: skip


@pytest.mark.parametrize("name", ["nope", "phantoms:9", "slake"])
def test_an_unknown_name_is_refused_before_anything_runs(name, capsys):
    assert f"{name}: not one of all" in error_line(capsys, reproduce.main, "facts", name)
