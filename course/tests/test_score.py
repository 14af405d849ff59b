"""A row is reproducible, its hash covers it, and its columns are what counting gives."""

import json
from dataclasses import replace

import pytest
import torch

import metrics
from checkpoint import load_model
from config import MODALITIES, PRESETS
from course import contain, judge, score, trial
from course.tests.handed_in import BUDGET, GOOD, JOB, _base  # noqa: F401
from data import Dataset
from eval import Predictor
from model import count_parameters
from sources.images import Images
from sources.load import load_samples
from sources.phantoms import SPLITS, seeds
from tests.conftest import build
from tests.mini import error_line

LOAD = [[0.0] * 4, [1.0, 1.0, 2.0, 0.0], [0.0, 4.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]  # (M, E)
RESULT = {
    "facts": 0.25,
    "closed": 0.5,
    "open": None,
    "load_cv": 0.1,
    "max_vio": 0.2,
    "dead": 1,
    "experts": 8,
    "dropped": 0.25,
    "activated": 12345,
    "tokens_per_s": 2000.0,
    "load": LOAD,
}
CPU = torch.device("cpu")


@pytest.fixture(name="quick")
def _quick(base, monkeypatch, tmp_path):
    """-> a function that scores a submission's text with fixed results, without training."""

    def run(text=GOOD, name="mine.py", **flags):
        (tmp_path / name).write_text(text)
        spec = f"{tmp_path / name}:Mine"
        return score.score(spec, score.ScoreConfig(router=spec, init=str(base), **flags))

    judged = judge.Judged([judge.Case("a", "passed"), judge.Case("b", "failed")])
    monkeypatch.setattr(judge, "judge", lambda *args: judged)
    monkeypatch.delenv(score.SECRET, raising=False)
    monkeypatch.setattr(score, "run_seeds", lambda text, cls, where, derived, *_: [
        RESULT | {"val_loss": 1.0 + n} for n, _ in enumerate(derived.seeds)])  # fmt: skip
    return run


@pytest.mark.slow
def test_the_same_command_gives_the_same_row(base, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--seeds", "2", "--out", str(tmp_path)]
    first = score.main(argv)
    second = score.main([*argv, "--verify", first["hash"]])
    assert first | {"tokens_per_s": 0} == second | {"tokens_per_s": 0}
    assert len(set(first["val_losses"])) == 2, "the seeds have no effect"


def test_the_hash_covers_all_but_the_file_name_and_the_speed(quick, base, monkeypatch):
    row = quick()
    hashed = {k: v for k, v in row.items() if k not in ("hash", "tokens_per_s")}
    assert score.hash_row(hashed, base) == row["hash"] == quick(name="other_name.py")["hash"]
    for name, value in hashed.items():
        other = value + 1 if isinstance(value, int | float) else "another:thing"
        assert score.hash_row(hashed | {name: other}, base) != row["hash"], name
    rows = [row, quick(GOOD + "#"), quick(student="bert"), quick(seeds=2)]
    monkeypatch.setattr(score, "BUDGET", replace(BUDGET, steps=3))
    rows.append(quick())
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    rows.append(quick())
    assert len({row["hash"] for row in rows}) == 6 and "lecturer" not in json.dumps(rows)


def test_a_row_holds_means_over_the_seeds_and_shares_of_the_load(quick):
    row = quick(seeds=3, student="anna|b")
    assert (row["val_loss"], row["val_loss_sd"], row["val_losses"]) == (2.0, 1.0, [1.0, 2.0, 3.0])
    assert (row["closed"], row["open"], row["lines"], row["contract"]) == (0.5, None, 6, "1/2")
    shares = [[0.0] * 4, [0.25, 0.25, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.75, 0.25, 0.0, 0.0]]
    assert row["load_by_modality"] == dict(zip(MODALITIES, shares, strict=True))
    assert "\n| mine.py:Mine | anna/b | 25.0% ± 0.0% | 2.0000 ± 1.0000 | 50.0% | - |" in score.show(
        row
    )
    assert f"\n{MODALITIES[3]:<12}     75.0%     25.0%      0.0%      0.0%" in score.show(row)


def test_a_row_is_written_and_verified_by_its_hash(quick, base, tmp_path, capsys):
    row = quick()
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--init", str(base)]
    assert score.main([*argv, "--verify", row["hash"], "--json", str(tmp_path / "row")]) == row
    printed = capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "row").read_text()) == json.loads(printed) == row
    (tmp_path / "bad.py").write_text("import os\n" + GOOD)
    for more, word in ((["--verify", "0" * 32], row["hash"]), (["--init", str(tmp_path)], "config"),
                       (["--router", f"{tmp_path}/bad.py:Mine"], "bad.py, line 1: imports os"),
                       (["--router", f"{tmp_path}/bad.py:No"], "named No; it has Mine"),
                       (["--json", f"{tmp_path}/no/file"], "no/file")):  # fmt: skip
        assert word in error_line(capsys, score.main, *argv, *more)


def test_the_data_of_a_student_are_their_own_and_no_default_images():
    of_anna = (770_200_000, [560422228, 1104710979], [3, 0, 2, 1])
    assert score.derive("anna", "", 2) == of_anna, "every row changes: raise Budget.version"
    found = [score.derive(s, secret, 3) for s in map(str, range(50)) for secret in ("", "x")]
    assert len({d.first for d in found}) == len({tuple(d.seeds) for d in found}) == 100
    for split in SPLITS:
        images = {s.image for s in load_samples(["phantoms:5+770200000"], "vqa", split)}
        default = seeds(split, 10**6)  # all that --data phantoms:N can name
        assert images and all(i in SPLITS[split] and i not in default for i in images)


@pytest.fixture(name="watch")
def _watch(base, tmp_path, monkeypatch):
    """-> the run of a submission, in this process and without the audit hook of contain.guard."""

    def run(text):
        (tmp_path / contain.FILE).write_text(text)
        return trial.watch(JOB | {"init": str(base)}, tmp_path)

    monkeypatch.setitem(PRESETS, "scored", None)
    monkeypatch.setattr(contain, "guard", lambda folder, file: [])
    return run


def test_the_columns_of_a_run_are_those_of_counting_token_by_token(watch, tmp_path):
    gate = "top_k_gates(logits.softmax(dim=-1), self.top_k)"
    text = GOOD.replace("sums_to_one = True", "at_most_k = False").replace(gate, "logits.relu()")
    found, spec = watch(text), f"{tmp_path / contain.FILE}:Mine"
    model, text, saved = load_model(tmp_path / "run/phase3", CPU, torch.float32, spec)
    names = ("seed", "steps", "batch_size", "lr", "experts", "top_k")
    assert [saved["flags"][name] for name in names] == [JOB[name] for name in names]
    val, test = (trial.first_images(load_samples([JOB["data"]], "vqa", split), 3)
                 for split in ("val", "test"))  # fmt: skip
    assert len({sample.image for sample in val}) == 3 < len(val)
    data = Dataset(val, text, model.config, plain=False, images=Images(32))
    load, total, n_tokens, n_real, dropped = torch.zeros(4, 2, 4), 0.0, 0, 0, 0
    for batch in (data.batch([i]) for i in range(len(val))):
        out = model.loss(batch)
        total, n_tokens = total + out.total.item(), n_tokens + out.n_tokens
        n_real += int(batch.mask.sum())
        for layer, routing in enumerate(out.routings):
            for gates in routing.gates[0][batch.mask[0]]:
                dropped += int(not gates.any())
                load[batch.modality[0], layer] += gates != 0
    answers = [p.answer for p in Predictor(model, text, CPU, torch.float32).answer(test)]
    signs = [s.kind == "sign" for s in test]
    apart = {which: [(s, a) for s, a, is_sign in zip(test, answers, signs, strict=True)
                     if is_sign == which] for which in (True, False)}  # fmt: skip
    scores = {which: metrics.score(*zip(*pairs, strict=True)) for which, pairs in apart.items()}
    balance = trial.balance(load, n_real, dropped)
    assert dropped > 0 and found["val_loss"] == pytest.approx(total / n_tokens, abs=1e-5)
    assert found["load"] == balance.pop("load")
    assert {k: found[k] for k in balance} == pytest.approx(balance)
    assert found["facts"] == scores[True]["open_recall"]
    assert [found["closed"], found["open"]] == [
        scores[False][name] for name in ("closed_accuracy", "open_recall")
    ]
    assert found["activated"] == trial.activated(model, balance["experts_per_token"])


def test_cv_and_max_vio_are_0_at_balance_and_largest_for_a_single_expert():
    model = build("phi", {"router": "topk", "top_k": 2})
    assert trial.activated(model, 2.0) == count_parameters(model)["activated"]
    even = trial.balance(torch.full((4, 2, 4), 3.0), n_real=24, dropped=0)
    assert even.pop("load") == [[6.0] * 4] * 4
    assert list(even.values()) == [0, 0, 0, 8, 0, 2]
    one = torch.tensor([0.0, 3.0, 0.0, 0.0]).expand(4, 2, 4)
    single = trial.balance(one, n_real=24, dropped=12)
    assert (single["max_vio"], single["dead"], single["dropped"]) == (3.0, 6, 0.25)
    assert single["load_cv"] == pytest.approx(3**0.5)


def test_a_router_that_looks_ahead_has_no_accuracy_and_a_mistake_is_one_sentence(watch):
    found = watch(GOOD.replace("sums_to_one = True", "causal = False"))
    assert found["facts"] is found["closed"] is None and found["val_loss"] > 0
    refused = watch(GOOD.replace("# top-k", "1 / 0"))["refused"]
    assert refused == ", line 12: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", ["constant", "oracle"])
def test_a_name_stands_for_a_router_of_ours_to_compare_with(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr(contain, "guard", lambda folder, file: [])
    monkeypatch.setitem(PRESETS, "scored", None)

    def run(text, cls, where, derived, base, limit_s):
        (tmp_path / contain.FILE).write_text(text)
        return [trial.watch(JOB | {"init": str(base), "class": cls}, tmp_path)]

    monkeypatch.setattr(score, "run_seeds", run)
    row = score.score(name, score.ScoreConfig(init=str(base), seeds=1))
    of = {MODALITIES.index(m): shares for m, shares in row["load_by_modality"].items()}
    expected = {m: [0.5, 0.5, 0, 0] if name == "constant" else torch.eye(4)[m].tolist()
                for m, shares in of.items() if any(shares)}  # fmt: skip
    assert (row["router"], row["contract"]) == (name, "-") and len(expected) > 1
    assert {m: of[m] for m in expected} == expected
