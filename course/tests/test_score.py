"""A row is reproducible, its hash covers it, and its columns are what counting gives."""

import json
from dataclasses import asdict, astuple, replace
from pathlib import Path

import pytest
import torch

import metrics
import train
from checkpoint import load_model
from config import MODALITIES, PRESETS, UserError
from course import contain, judge, score, trial
from course.tests.handed_in import BUDGET, GOOD, small_base
from data import Dataset
from eval import Predictor
from model import count_parameters
from sources.images import Images
from sources.load import load_samples
from sources.phantoms import SPLITS, seeds
from tests.mini import losses

LOAD = [[0.0] * 4, [1.0, 1.0, 2.0, 0.0], [0.0, 4.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]  # (M, E)
RESULT = {"closed": 0.5, "open": None, "load_cv": 0.1, "max_vio": 0.2, "dead": 1, "experts": 8,
          "dropped": 0.25, "activated": 12345, "tokens_per_s": 2000.0, "load": LOAD}  # fmt: skip
JOB = asdict(BUDGET) | {"class": "Mine", "seed": 1, "where": "mine.py", "data": "phantoms:8+10000"}
CPU = torch.device("cpu")


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory):
    with small_base(tmp_path_factory.mktemp("score")) as base:
        yield base


@pytest.fixture(name="quick")
def _quick(base, monkeypatch, tmp_path):
    """-> a function that scores a submission's text with fixed results, without training."""

    def results(text, cls, where, derived, base, limit_s):
        return [RESULT | {"val_loss": 1.0 + n} for n, _ in enumerate(derived.seeds)]

    def run(text=GOOD, name="mine.py", **flags):
        (tmp_path / name).write_text(text)
        spec = f"{tmp_path / name}:Mine"
        return score.score(spec, score.ScoreConfig(router=spec, init=str(base), **flags))

    monkeypatch.delenv(score.SECRET, raising=False)
    monkeypatch.setattr(score, "run_seeds", results)
    return run


def exit_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        score.main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# The row and its hash


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tmp_path", "base"])  # the real budget; then a small one
def test_the_same_command_gives_the_same_row(fixture, request, tmp_path):
    request.getfixturevalue(fixture)
    assert (score.Budget() == score.BUDGET) == (fixture == "tmp_path")
    (tmp_path / "mine.py").write_text(GOOD)
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--seeds", "2", "--out", str(tmp_path)]
    first = score.main(argv)
    second = score.main([*argv, "--verify", first["hash"]])
    assert first | {"tokens_per_s": 0} == second | {"tokens_per_s": 0}
    assert first["val_losses"][0] != first["val_losses"][1], "the seeds have no effect"


def test_the_hash_covers_all_but_the_file_name_and_the_speed(quick, base, monkeypatch):
    row = quick()
    first = row["hash"]
    assert len(first) == 32 and len(row["secret"]) == 16
    assert quick(name="other_name.py")["hash"] == first
    others = [quick(GOOD + "#")["hash"], quick(student="bert")["hash"], quick(seeds=2)["hash"]]
    monkeypatch.setattr(score, "BUDGET", replace(BUDGET, steps=3))
    others.append(quick()["hash"])
    monkeypatch.setattr(score, "BUDGET", BUDGET)
    monkeypatch.setenv(score.SECRET, "of the lecturer")
    others.append(quick()["hash"])
    assert len({first, *others}) == 6 and "lecturer" not in json.dumps(quick())
    hashed = {k: v for k, v in row.items() if k not in ("hash", "tokens_per_s")}
    assert score.hash_row(hashed, base) == first and len(hashed) > 15
    for name, value in hashed.items():
        other = value + 1 if isinstance(value, int | float) else "another:thing"
        assert score.hash_row(hashed | {name: other}, base) != first, name


def test_a_row_holds_means_over_the_seeds_and_shares_of_the_load(quick):
    row = quick(seeds=3, student="anna")
    assert (row["val_loss"], row["val_loss_sd"], row["val_losses"]) == (2.0, 1.0, [1.0, 2.0, 3.0])
    assert row["closed"] == 0.5 and row["open"] is None and row["tokens_per_s"] == 2000
    assert list(row["load_by_modality"]) == [MODALITIES[m] for m in (3, 0, 2, 1)]
    shares = [[0.75, 0.25, 0.0, 0.0], [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]]
    assert list(row["load_by_modality"].values()) == shares
    assert (row["lines"], row["contract"], row["router"]) == (6, "-", "mine.py:Mine")
    assert quick(seeds=1)["val_loss_sd"] is None


def test_the_row_is_a_table(quick):
    row = quick(seeds=2, student="a|b") | {"contract": "2/2", "hash": "abc"}
    lines = score.show(row).split("\n")
    assert lines[2] == (
        "| mine.py:Mine | a/b | 1.5000 ± 0.7071 | 50.0% | - | 0.100 | 0.200 | 1.0/8 "
        "| 25.0% | 12,345 | 6 | 2/2 | abc |"
    )
    assert lines[0].count("|") == lines[1].count("|") == 14
    assert lines[4] == " " * 12 + "  expert 0  expert 1  expert 2  expert 3"
    assert f"{MODALITIES[3]:<12}     75.0%     25.0%      0.0%      0.0%" in lines[5:9]
    assert lines[10].startswith("2,000 tokens/s in training") and len(lines) == 11


def test_a_row_is_written_and_verified_by_its_hash(quick, base, tmp_path, capsys):
    row = quick()
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--init", str(base)]
    assert score.main([*argv, "--verify", row["hash"], "--json", str(tmp_path / "row")]) == row
    out = capsys.readouterr().out
    assert f"verified: {row['hash']}" in out and json.loads(out.splitlines()[-1]) == row
    assert json.loads((tmp_path / "row").read_text()) == row
    for more, word in ((["--verify", "0" * 32], row["hash"]), (["--seeds", "0"], "--seeds"),
                       (["--init", str(tmp_path)], "config"), (["--router", "topk"], "--router"),
                       (["--router", "x.py:Mine"], "--router"), (["--limit", "0"], "--limit"),
                       (["--json", f"{tmp_path}/no/file"], "no/file")):  # fmt: skip
        assert word in exit_of([*argv, *more], capsys)
    assert "--router" in exit_of([], capsys)


def test_a_submission_is_vetted_and_runs_the_contract(quick, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"mine.py, line 1: imports os"):
        quick("import os\n" + GOOD)
    found = judge.Judged([judge.Case("a", "passed"), judge.Case("b", "failed")])
    calls = []
    monkeypatch.setattr(judge, "judge", lambda *args: calls.append(args) or found)
    assert quick()["contract"] == "1/2" and calls == [(judge.CONTRACT, GOOD, "Mine", "mine.py")]
    monkeypatch.setattr(judge, "judge", lambda *args: contain.run_job("", {}, Path(), 0))
    monkeypatch.setattr(contain, "run_job", raise_user_error)
    assert quick()["contract"] == "stopped" and capsys.readouterr().err == "contract: fails\n"


def raise_user_error(*args):
    raise UserError("fails")


# The data, the seeds and the runs


def test_the_budget_and_the_derived_data_change_only_with_a_new_version():
    assert astuple(score.Budget()) == (2, "tiny", 4000, 60, 2000, 60, 64, 1e-3, 4, 2, 100)
    of_anna = (770_200_000, [560422228, 1104710979], [3, 0, 2, 1])
    assert score.derive("anna", "", 2) == of_anna
    found = [score.derive(s, secret, 3) for s in map(str, range(50)) for secret in ("", "x")]
    assert len({d.first for d in found}) == len({tuple(d.seeds) for d in found}) == 100


def test_no_image_of_a_student_is_a_default_image():
    for split in SPLITS:
        images = {s.image for s in load_samples(["phantoms:5+770200000"], "vqa", split)}
        default = seeds(split, 10**6)  # all that --data phantoms:N can name
        assert images and not any(image in default for image in images)
        assert all(image in SPLITS[split] for image in images)


def test_the_common_checkpoint_is_trained_once_by_phases_1_and_2(base, tmp_path, monkeypatch):
    assert score.make_base(BUDGET, base.parent.parent) == base
    calls = []
    monkeypatch.setattr(train, "main", lambda argv: calls.append((*argv, torch.get_num_threads())))
    torch.set_num_threads(2)
    other = score.make_base(replace(BUDGET, base_images=9), tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert other.parent.parent == tmp_path and other.parent.name != base.parent.name
    assert len(other.parent.name) == len("base-") + 12 and other.name == "phase2"
    first, second = calls
    assert first[:2] == ("--phase", "1") and second[:4] == ("--phase", "2", "--steps", "2")
    assert first[2:] == second[4:] and "phantoms:9" in first and (first[-1], threads) == (1, 2)


def test_each_seed_is_a_job_in_a_folder_of_its_own_and_one_failure_stops_all(base, monkeypatch):
    def run_job(module, job, folder, limit_s):
        assert (folder / contain.FILE).read_text() == GOOD and module == "course.trial"
        folders.add(folder)
        return raise_user_error() if job["seed"] == 8 else job | {"limit": limit_s}

    folders, stopped = set(), []
    monkeypatch.setattr(contain, "run_job", run_job)
    monkeypatch.setattr(contain, "stop_all", lambda: stopped.append(True))
    derived = score.Derived(10_000, [5, 6, 7], [0, 1, 2, 3])
    jobs = score.run_seeds(GOOD, "Mine", "mine.py", derived, base, 9.0)
    common = JOB | {"init": str(base.resolve()), "limit": 9.0}
    assert jobs == [common | {"seed": seed} for seed in (5, 6, 7)] and not stopped
    with pytest.raises(UserError, match="fails"):
        score.run_seeds(GOOD, "Mine", "mine.py", derived._replace(seeds=[8, 9]), base, 9.0)
    assert stopped and len(folders) >= 4 and not any(folder.exists() for folder in folders)


# One seed: course/trial.py


@pytest.fixture(name="watch")
def _watch(base, tmp_path, monkeypatch):
    """-> the run of a submission, in this process and without the audit hook of contain.guard."""
    refused = []
    monkeypatch.setitem(PRESETS, "scored", None)
    monkeypatch.setattr(contain, "guard", lambda folder, file: refused)

    def run(text, *refusals):
        refused[:] = refusals
        (tmp_path / contain.FILE).write_text(text)
        return trial.watch(JOB | {"init": str(base)}, tmp_path)

    return run


def first_images(split):
    samples = load_samples([JOB["data"]], "vqa", split)
    images = list(dict.fromkeys(s.image for s in samples))[:3]
    return [s for s in samples if s.image in images]


def test_the_columns_of_a_run_are_those_of_counting_token_by_token(watch, tmp_path):
    gate = "top_k_gates(logits.softmax(dim=-1), self.top_k)"
    text = GOOD.replace("sums_to_one = True", "at_most_k = False").replace(gate, "logits.relu()")
    found = watch(text)
    assert (tmp_path / "stage.txt").read_text() == "measuring"
    assert [r["step"] for r in losses(tmp_path / "run")] == [0, 1]
    spec = f"{tmp_path / contain.FILE}:Mine"
    model, text, saved = load_model(tmp_path / "run/phase3", CPU, torch.float32, spec)
    flags = {k: JOB[k] for k in ("seed", "steps", "batch_size", "lr", "experts", "top_k")}
    flags |= {"eval": False, "jitter": False, "tune_vision": False, "data": [JOB["data"]]}
    assert {k: saved["flags"][k] for k in flags} == flags
    val, test = first_images("val"), first_images("test")
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
    assert dropped > 0 and n_real == found["n_real"]
    balance = trial.balance(load, n_real, dropped)
    assert found["val_loss"] == pytest.approx(total / n_tokens, abs=1e-5)
    assert found["load"] == balance.pop("load")
    assert {k: found[k] for k in balance} == pytest.approx(balance)
    answers = [p.answer for p in Predictor(model, text, CPU, torch.float32).answer(test)]
    scores = metrics.score(test, answers)
    assert (found["closed"], found["open"]) == (scores["closed_accuracy"], scores["open_recall"])
    assert found["activated"] == trial.activated(model, balance["experts_per_token"])
    assert found["tokens_per_s"] == trial.speed(tmp_path / "run/log.jsonl") > 0


def test_cv_and_max_vio_are_0_at_balance_and_largest_for_a_single_expert(build):
    model = build("phi", {"router": "topk", "top_k": 2})
    assert trial.activated(model, 2.0) == count_parameters(model)["activated"]
    assert trial.activated(model, 4.0) == count_parameters(model)["total"]
    even = trial.balance(torch.full((4, 2, 4), 3.0), n_real=24, dropped=0)
    assert (even["load_cv"], even["max_vio"], even["dead"], even["experts"]) == (0, 0, 0, 8)
    assert even["experts_per_token"] == 2.0 and even["load"] == [[6.0] * 4] * 4
    one = torch.zeros(4, 2, 4)
    one[:, :, 1] = 3.0
    single = trial.balance(one, n_real=24, dropped=12)
    assert single["max_vio"] == 3.0 and single["load_cv"] == pytest.approx(3**0.5)
    assert single["dead"] == 6 and single["dropped"] == 0.25


def test_the_speed_is_the_median_over_the_steps(tmp_path):
    lines = [{"flags": 1}, *({"tokens_per_s": n} for n in (1.0, 9.0, 2.0))]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, lines)))
    assert trial.speed(tmp_path / "log") == 2.0


def test_a_router_that_looks_ahead_has_no_accuracy_and_one_that_writes_no_row(watch):
    text = GOOD.replace("sums_to_one = True", "causal = False")
    assert watch(text, ", line 3: writes") == {"refused": ", line 3: writes"}  # noted by the hook
    found = watch(text)
    assert found["closed"] is found["open"] is None and found["val_loss"] > 0


REFUSED = {
    ", line 12: ZeroDivisionError: division by zero": GOOD.replace("# top-k", "1 / 0"),
    ", line 12: SystemExit: 3": GOOD.replace("# top-k", "exit(3)"),
    ": needs the true modality": GOOD.replace("sums", "needs = ('modality',)\n    sums"),
    ": replaces Router.forward": GOOD.replace("gate(self, logits,", "forward(self,"),
    ": changed metrics.ARTICLES": GOOD + "\nimport metrics\nmetrics.ARTICLES = 1\n",
    ": SyntaxError": "1 +",
}


@pytest.mark.parametrize(("sentence", "text"), REFUSED.items(), ids=REFUSED)
def test_what_a_run_is_refused_for_is_one_sentence(watch, text, sentence, monkeypatch):
    monkeypatch.setattr(metrics, "ARTICLES", metrics.ARTICLES)
    (refused,) = watch(text).values()
    assert refused.startswith(sentence) and "\n" not in refused
