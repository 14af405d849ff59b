"""A row is reproducible, its hash covers it, and its columns are what counting gives."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import metrics
from checkpoint import load_model
from config import MODALITIES, PRESETS, UserError
from course import board, contain, judge, picture, score, trial
from course.tests.handed_in import BUDGET, GOOD, JOB, _base  # noqa: F401
from data import Dataset
from eval import Predictor
from model import count_parameters
from routers import Routing, TopKRouter
from sources.images import Images
from sources.load import load_samples
from sources.phantoms import SPLITS, seeds
from sources.records import read_json
from tests.conftest import build
from tests.mini import error_line, losses

LOAD = [[[0.0] * 4] * 2, [[2.0, 0.0, 2.0, 0.0], [0.0, 2.0, 2.0, 0.0]], [[0.0, 4.0, 0.0, 0.0]] * 2,
        [[3.0, 1.0, 0.0, 0.0]] * 2]  # fmt: skip  # (M, L, E)
RESULT = {"facts": 0.25, "closed": 0.5, "open": None, "experts_per_question": None, "dead": 1,
          "experts": 8, "activated": 12345, "tokens_per_s": 2000.0, "load": LOAD,
          "load_by_step": [[[0.5] * 4] * 2] * 3, "dropped_in_training": 0.5, "leak": 0.125,
          **dict.fromkeys((*score.LEADS[1][1], "load_cv", "max_vio", "dropped", "largest_logit",
                           "experts_per_token"), 0.25)}  # fmt: skip
LEADS = [vio := "0.25, 0.25, 0.25 ± 0.00", "50.0% ± 0.0%", "0.25 ± 0.00", "12.5% ± 0.0%", vio,
         "25.0% ± 0.0%", "-", "0.25 ± 0.00 (k = 1)"]  # fmt: skip  # of each assignment
CPU = torch.device("cpu")


@pytest.fixture(name="quick")
def _quick(base, monkeypatch, tmp_path):
    """-> a function that scores a submission's text with fixed results, without training."""

    def run(text=GOOD, name="mine.py", **flags):
        (tmp_path / name).write_text(text)
        spec = f"{tmp_path / name}:Mine"
        return score.score(spec, score.ScoreConfig(router=spec, init=str(base), **flags))

    monkeypatch.delenv(contain.SECRET, raising=False)
    judged = judge.Judged([judge.Case("a", "passed"), judge.Case("b", "failed")])
    monkeypatch.setattr(judge, "judge", lambda *args: judged)
    monkeypatch.setattr(score, "run_seeds", lambda text, cls, where, derived, *_: [
        RESULT | {"val_loss": 1.0 + n, "load": [layers[:: -1 if n else 1] for layers in LOAD]}
        for n, _ in enumerate(derived.seeds)])  # fmt: skip
    return run


@pytest.mark.slow
def test_the_same_command_gives_the_same_row(base, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--seeds", "2", "--out", str(tmp_path)]
    first = score.main([*argv, "--json", str(tmp_path / "row")])
    second = score.main([*argv, "--verify", str(tmp_path / "row")])
    assert first | {"tokens_per_s": 0} == second | {"tokens_per_s": 0}
    assert len(set(first["val_losses"])) == 2, "the seeds have no effect"


def test_the_hash_covers_all_but_the_file_name_and_the_speed(quick, base, monkeypatch):
    row = quick()
    hashed = {k: v for k, v in row.items() if k not in ("hash", "tokens_per_s")}
    assert score.hash_row(hashed, base) == row["hash"] == quick(name="other_name.py")["hash"]
    for name, value in hashed.items():
        other = value + 1 if isinstance(value, int | float) else "another:thing"
        assert score.hash_row(hashed | {name: other}, base) != row["hash"], name
    rows = [row, quick(GOOD + "#"), quick(student="bert"), quick(seeds=2), quick(assignment=8)]
    monkeypatch.setattr(score, "BUDGET", replace(BUDGET, steps=3))
    rows.append(quick())
    monkeypatch.setenv(contain.SECRET, "of the lecturer")
    rows.append(quick())
    assert len({row["hash"] for row in rows}) == 7 and "lecturer" not in json.dumps(rows)


def test_a_row_holds_means_over_the_seeds_and_shares_of_the_load(quick):
    row = quick(seeds=3, student="anna|b")
    assert (row["val_loss"], row["val_loss_sd"], row["val_losses"]) == (2.0, 1.0, [1.0, 2.0, 3.0])
    assert (row["closed"], row["open"], row["lines"], row["contract"]) == (0.5, None, 6, "1/2")
    shares = [[0.0] * 4, [0.25, 0.25, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.75, 0.25, 0.0, 0.0]]
    assert row["load_by_modality"] == dict(zip(MODALITIES, shares, strict=True))
    in_first = row["first_seed"]["load_by_modality"]
    assert in_first[MODALITIES[1]] == [[0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0]]
    shown = score.show(row, [])
    assert "\n| mine.py:Mine | anna\\|b | 25.0% ± 0.0% | 2.0000 ± 1.0000 | 50.0% | - |" in shown
    assert f"\n{MODALITIES[3]:<12}     75.0%     25.0%      0.0%      0.0%" in shown


def test_a_row_begins_with_its_assignment_and_has_others_beside(quick, tmp_path, monkeypatch):
    rows = [quick(assignment=number) for number in range(1, 9)]
    assert [list(score.cells(r, r["assignment"]).values())[2] for r in rows] == LEADS
    monkeypatch.setattr(score, "REFERENCE", tmp_path)
    for name, row in {"constant": quick(), "a3": rows[2] | {"budget": "old"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(row | {"router": name}))
    compared, (topk, a3) = score.references(3, BUDGET)
    assert "topk is missing" in topk and "a3 is stale" in a3
    assert score.show(rows[2], compared).count("reference: constant | - | 0.25") == 1


def test_the_readmes_rows_are_the_committed_ones():
    lines = (score.REFERENCE.parent / "README.md").read_text().splitlines()
    for name in ("constant", "topk", "modality", "oracle"):
        found = score.cells(read_json(score.REFERENCE / f"{name}.json", dict), None)
        (line,) = [line for line in lines if line.startswith(f"| {name}: ")]
        wanted = "facts", "val loss", "closed", "open", "load CV", "MaxVio", "dead", "activated"
        assert line.strip("| ").split(" | ")[1:] == [found[title] for title in wanted]


def test_a_row_is_written_and_verified_number_by_number(quick, base, tmp_path, capsys):
    row, file = quick(), tmp_path / "row"
    argv = ["--router", f"{tmp_path / 'mine.py'}:Mine", "--init", str(base), "--verify", str(file)]
    file.write_text(json.dumps(row | {"tokens_per_s": 1}))
    assert score.main([*argv, "--json", str(tmp_path / "new")]) == row
    printed = capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "new").read_text()) == json.loads(printed) == row
    (tmp_path / "bad.py").write_text("import os\n" + GOOD)
    for more, word in ((["--init", str(tmp_path)], "config"),
                       (["--router", f"{tmp_path}/bad.py:Mine"], "bad.py, line 1: imports os"),
                       (["--router", f"{tmp_path}/bad.py:No"], "named No; it has Mine"),
                       (["--student", "bert"], ", here bert"), (["--picture", "a"], "FILE.png"),
                       (["--json", f"{tmp_path}/no/file"], "no/file")):  # fmt: skip
        assert word in error_line(capsys, score.main, *argv, *more)
    other = row | {"facts": 0.255, "hash": "0", "val_loss": 2.03}
    names = [[s.split()[0] for s in score.differences(row, other, t)] for t in (0, 0.01, 0.03)]
    assert names == [["facts", "val_loss", "hash"], ["val_loss"], []]


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
    load, total, largest, n_tokens, n_real, dropped = torch.zeros(4, 2, 4), 0.0, 0.0, 0, 0, 0
    for batch in (data.batch([i]) for i in range(len(val))):
        out = model.loss(batch)
        total, n_tokens = total + out.total.item(), n_tokens + out.n_tokens
        n_real += int(batch.mask.sum())
        for layer, routing in enumerate(out.routings):
            largest = max(largest, routing.logits[batch.mask].abs().max().item())
            for gates in routing.gates[0][batch.mask[0]]:
                dropped += int(not gates.any())
                load[batch.modality[0], layer] += gates != 0
    answers = [p.answer for p in Predictor(model, text, CPU, torch.float32).answer(test)]
    signs = [s.kind == "sign" for s in test]
    apart = {which: [(s, a) for s, a, is_sign in zip(test, answers, signs, strict=True)
                     if is_sign == which] for which in (True, False)}  # fmt: skip
    scores = {which: metrics.score(*zip(*pairs, strict=True)) for which, pairs in apart.items()}
    balance = trial.balance(load, n_real, dropped)
    loads = [torch.tensor(step["load"]) for step in losses(tmp_path / "run")]
    assert torch.allclose(torch.tensor(found["load_by_step"]), torch.stack(loads), atol=1e-3)
    assert found["leak"] == 0 and found["largest_logit"] == pytest.approx(largest, rel=1e-5)
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
    assert even.pop("load") == [[[3.0] * 4] * 2] * 4
    assert list(even.values()) == [0, 0, 0, 8, 0, 2]
    one = torch.tensor([0.0, 3.0, 0.0, 0.0]).expand(4, 2, 4)
    single = trial.balance(one, n_real=24, dropped=12)
    assert (single["max_vio"], single["dead"], single["dropped"]) == (3.0, 6, 0.25)
    assert single["load_cv"] == pytest.approx(3**0.5)


def test_what_routers_do_in_training_is_counted_without_padding():
    router, load = TopKRouter(3, 2), trial.TrainingLoad()
    gates = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]])
    mask = torch.tensor([[True, True, True, False]])
    for is_training in (True, False):
        load.hook(router.train(is_training), (gates, mask), Routing(gates, gates))
    found = load.columns(n_steps=1)
    assert found.pop("load_by_step") == [[[0.667, 0.333]]]  # of 3 real tokens
    assert list(found.values()) == pytest.approx([1 / 3] * 4)  # dropped, and MaxVio three times


def test_a_router_that_looks_ahead_leaks_and_a_mistake_is_one_sentence(watch):
    ahead = GOOD.replace("logits.softmax", "logits.flip(1).cumsum(1).flip(1).softmax")
    both = [watch(x) for x in (ahead, ahead.replace("sums_to_one = True", "causal = False"))]
    assert [found["facts"] is None for found in both] == [False, True] and both[0]["leak"] > 0.3
    refused = watch(GOOD.replace("# top-k", "1 / 0"))["refused"]
    assert refused == ", line 12: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("name", ["constant", "oracle"])
def test_a_name_stands_for_a_router_of_ours_to_compare_with(name, base, tmp_path, monkeypatch):
    monkeypatch.setattr(contain, "guard", lambda folder, file: [])
    monkeypatch.setitem(PRESETS, "scored", None)

    def run(text, cls, where, derived, base, *_):
        (tmp_path / contain.FILE).write_text(text)
        return [trial.watch(JOB | {"init": str(base), "class": cls}, tmp_path)]

    monkeypatch.setattr(score, "run_seeds", run)
    row = score.score(name, score.ScoreConfig(init=str(base), seeds=1))
    assert row["experts_per_question"] == (2 if name == "constant" else 1)
    of = {MODALITIES.index(m): shares for m, shares in row["load_by_modality"].items()}
    expected = {m: [0.5, 0.5, 0, 0] if name == "constant" else torch.eye(4)[m].tolist()
                for m, shares in of.items() if any(shares)}  # fmt: skip
    assert (row["router"], row["contract"]) == (name, "-") and len(expected) > 1
    assert {m: of[m] for m in expected} == expected


def test_rows_are_ranked_broken_files_left_out_and_names_are_text(quick, tmp_path, capsys):
    rows = {"low": (0.25, "anna"), "top": (0.75, "<b>|eve`[x](y)"), "none": (None, "carl"),
            "same": (0.25, "dora"), "nan": (float("nan"), "x")}  # fmt: skip
    rows = {name: quick() | {"facts": n, "student": who} for name, (n, who) in rows.items()}
    rows |= {"a8": quick(assignment=8), "list": [1], "other": rows["low"] | {"student": ["anna"]}}
    for name, row in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    board.main([str(tmp_path)])
    printed, warnings = capsys.readouterr()
    assert [f"{name}.json" in warnings for name in ("list", "other", "nan", "low")] == [1, 1, 1, 0]
    assert (tmp_path / "board.md").read_text().strip() == printed.strip()
    ranks = [line.split(" | ")[::2][:2] for line in printed.splitlines() if line[2:3].isdigit()]
    assert ranks[:4] == [["| 1", r"\<b>\|eve\`\[x](y)"], ["| 2", "anna"], ["| 2", "dora"],
                         ["| 4", "carl"]]  # fmt: skip
    assert printed.count("## ") == 2 and "## Assignment 8, budget" in printed
    page = (tmp_path / "board.html").read_text()
    assert "&lt;b&gt;|eve" in page and "<b>" not in page and page.count("<tr>") == 7


def test_a_picture_is_drawn_of_rows_that_have_the_load(quick, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="requirements-lab.txt")
    picture.draw([quick(), {"router": "an older row"}], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs matplotlib"):
        picture.check("a.png")
