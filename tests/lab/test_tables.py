"""The paper's numbers, ours beside them, from made-up results whose mean is worked out by hand."""

import json

import pytest

from config import UserError
from lab import tables


def result(seed=1, closed=0.7, opened=0.6, interval=0.03, flags="", data="slake:DIR", **more):
    """What eval.py writes: the scorer med-moe is 5 points above strict, llava-med 2 below."""
    protocols = {}
    for name, plus in (("strict", 0), ("med-moe", 0.05), ("llava-med", -0.02)):
        scores = {"closed_accuracy": closed + plus, "open_recall": opened + plus,
                  "open_exact_match": opened, "open_bleu1": opened - 0.2}  # fmt: skip
        ci95 = {metric: [value - interval, value + interval] for metric, value in scores.items()}
        protocols[name] = {"n_closed": 400, "n_open": 600, **scores, "ci95": ci95}
    return {
        "command": "python eval.py runs/x/phase3 --json out.json", "seed": seed, "data": [data],
        "trained_with": f"python train.py --data {data} --out runs/x --seed {seed} --jitter{flags}",
        "preset": "tiny", "split": "test", "device": "cpu", "n": 1000, "phase": 3,
        "params": {"total": 1_900_000, "activated": 1_240_000, "dense_base": 900_000},
        "protocols": protocols} | more  # fmt: skip


def show(folder, *results):
    """What the tables of these results say: title -> row's name -> column's header -> cell."""
    for number, values in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(values))
    found = {}
    for part in tables.report(tables.load(sorted(folder.glob("*.json")))).split("\n## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
        found[part[:8].strip(" .,")] = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    return found


def test_without_results_the_papers_numbers_stand_alone(tmp_path, capsys):
    tables.main(["--results", str(tmp_path / "none")])
    text = capsys.readouterr().out
    assert "| 81.29 |" in text and "| ours" + 7 * " | not run" + " |\n" in text


def test_seeds_are_one_row_with_mean_range_and_widest_interval(tmp_path):
    row = show(tmp_path, result(3, 0.60, 0.40, 0.02), result(2, 0.71, 0.60, 0.03),
               result(1, 0.70, 0.50, 0.04))["Table 1"]["ours: tiny"]  # fmt: skip
    # 65, 75, 76: mean 72; seed 1's is the widest, 75 - 4 to 75 + 4
    assert row["SLAKE closed"] == "72.0 (65.0-76.0 over 3 seeds) [71.0, 79.0]"
    assert row["RAD open"] == "not run" and row["activated"] == "1.2M"


def test_three_scorers_and_the_blind_control_stand_side_by_side(tmp_path):
    values = result(blind=result(closed=0.5), router={"accuracy": 0.9, "ci95": [0.8, 0.95]})
    values["protocols"]["med-moe"]["n_open"] = 0
    rows = show(tmp_path, values, result(data="vqa-rad:DIR"))["One set"]
    row = rows["slake: tiny"]
    assert [row[f"closed {name}"][:4] for name in tables.SCORERS] == ["70.0", "75.0", "68.0"]
    assert row["open strict"] == "60.0 [57.0, 63.0]" and row["open med-moe"] == "-"
    assert row["router"] == "90.0 [80.0, 95.0]" and rows["vqa-rad: tiny"]["router"] == "not run"
    assert rows["blind control, slake: tiny"]["closed med-moe"] == "55.0 [52.0, 58.0]"


def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own(tmp_path):
    dense = {"total": 900_000, "activated": 900_000, "dense_base": 900_000}
    rows = show(tmp_path, result(), result(2, closed=0.50, flags=" --top-k 1"),
                result(closed=0.60, phase=2, params=dense),
                result(closed=0.40, trained_with="python train.py --data vqa-rad:DIR --seed 1"),
                result(closed=0.80, command="python eval.py x --limit 50"))["Table 1"]  # fmt: skip
    assert {row: rows[row]["SLAKE closed"][:4] for row in rows if row.startswith("ours")} == {
        "ours: tiny": "75.0", "ours: tiny, --limit 50": "85.0", "ours: tiny, --top-k 1": "55.0",
        "ours: tiny, dense, phase 2": "65.0", "ours: tiny, trained on vqa-rad:DIR": "45.0",
    }  # fmt: skip


@pytest.mark.parametrize(("values", "named"), [
    (result(seed=True), "seed"), (result(2), "two of"),
    (result(closed=72.4), "protocols.med-moe.closed_accuracy")])  # fmt: skip
def test_a_bad_field_or_a_second_result_of_a_seed_is_refused(values, named, tmp_path):
    with pytest.raises(UserError, match=f"1.json.*{named}"):
        show(tmp_path, result(2), values)
