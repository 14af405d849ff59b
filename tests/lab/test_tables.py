"""The paper's numbers, ours beside them, and what is committed of ours.

The result files are made up, with numbers whose mean can be worked out by hand.
"""

import json
from functools import reduce

import pytest

from lab import tables

SCORERS = ("strict", "med-moe", "llava-med")


def protocol(closed, opened, interval, n_open=600):
    scores = {"closed_accuracy": closed, "open_recall": opened, "open_exact_match": opened - 0.1,
              "open_bleu1": opened - 0.2}  # fmt: skip
    ci95 = {name: [value - interval, value + interval] for name, value in scores.items()}
    return {"n_closed": 400, "n_open": n_open, **scores, "ci95": ci95}


def result(seed=1, closed=0.7, opened=0.6, interval=0.03, flags="", data="slake:DIR", **more):
    """med-moe is 5 points above strict, llava-med 2 below; blind 20 below that, majority 30."""
    above = dict(zip(SCORERS, (0, 0.05, -0.02), strict=True))
    parts = [{"protocols": {name: protocol(closed + d - less, opened + d - less, interval)
                            for name, d in above.items()}} for less in (0, 0.2, 0.3)]  # fmt: skip
    return {
        "command": "python eval.py runs/x/phase3 --blind --json out.json",
        "trained_with": f"python train.py --data {data} --out runs/x --seed {seed} --jitter{flags}",
        "seed": seed, "preset": "tiny", "data": [data], "split": "test", "device": "cpu",
        "n": 1000, "phase": 3, "checkpoint": "runs/x/phase3", **parts[0], "blind": parts[1],
        "majority": parts[2], "router": {"accuracy": 0.9, "n": 96, "ci95": [0.8, 0.95]},
        "params": {"total": 1_900_000, "activated": 1_240_000, "dense_base": 900_000},
    } | more  # fmt: skip


def put(folder, *results):
    folder.mkdir()
    for number, values in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(values))
    return folder


def show(folder, capsys):
    tables.main(["--results", str(folder)])
    return capsys.readouterr().out


def find(text, title):
    """A printed table -> {its row's first cell: {column's header: cell}}."""
    (part,) = [part for part in text.split("\n## ") if part.startswith(title)]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    header, line, *rest = rows
    assert all(len(row) == len(header) for row in rows) and set("".join(line)) <= set("- |")
    return {row[0]: dict(zip(header, row, strict=True)) for row in rest}


def refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


PAPER = (  # a table, how many rows it has of the paper, one of its cells
    ("Table 1.", 18, "LLaVA-Med (Phi 2.7B)", "SLAKE open", "81.29"),
    ("Table 2.", 5, "LLaVA-Med 7B", "PathVQA EMS", "37.95"),
    ("Table 3.", 5, "Med-Mamba", "OrganCMNIST", "92.4"),
    ("Tables 4", 4, "6: router learnt with the rest", "RAD open", "56.33"),
    ("Table 8.", 5, "Med-MoE (StableLM)", "GPU memory in training", "12.5GB"),
    ("Tables 9", 5, "9: 4 experts, top 1", "time", "7h"),
)


@pytest.mark.parametrize(("title", "n", "name", "column", "cell"), PAPER)
def test_without_results_the_papers_numbers_stand_alone(
    title, n, name, column, cell, tmp_path, capsys
):
    rows = find(show(tmp_path / "none", capsys), title)
    ours = [list(row.values())[1:] for name, row in rows.items() if "ours" in name]
    assert rows[name][column] == cell and len(rows) == n + len(ours) > n
    assert all(set(row) == {"not run"} for row in ours)


def test_seeds_are_one_row_with_mean_range_and_widest_interval(tmp_path, capsys):
    more = [result(3, 0.60, 0.40, 0.02), result(1, 0.70, 0.50, 0.04, device="cuda")]
    text = show(put(tmp_path / "r", *more, result(2, 0.71, 0.60, 0.03)), capsys)
    row, words = find(text, "Table 1.")["ours: tiny"], find(text, "Table 2.")["ours: tiny"]
    # 65, 75, 76: mean 72; seed 1's is the widest, 75 - 4 to 75 + 4
    assert row["SLAKE closed"] == "72.0 (65.0-76.0 over 3 seeds) [71.0, 79.0]"
    assert words["SLAKE EMS"] == "45.0 (35.0-55.0 over 3 seeds) [41.0, 49.0]"
    assert words["SLAKE BLEU"] == "35.0 (25.0-45.0 over 3 seeds) [31.0, 39.0]"
    assert row["RAD open"] == "not run" and row["activated"] == "1.2M"
    origin = "- slake, n 1000, tiny; --seed 1, 2, 3; cpu, cuda: `python train.py --data slake:DIR "
    assert text.count(origin + "--out runs/x --jitter`, `python eval.py runs/x/phase3 --blind") == 6


def test_three_scorers_and_both_controls_stand_side_by_side(tmp_path, capsys):
    values = result()
    values["protocols"]["med-moe"]["n_open"] = 0
    text = show(put(tmp_path / "r", values, result(data="vqa-rad:DIR", router=None)), capsys)
    rows = find(text, "One set")
    row = rows["slake: tiny"]
    closed = [row[f"closed {scorer}"] for scorer in SCORERS]
    assert closed == ["70.0 [67.0, 73.0]", "75.0 [72.0, 78.0]", "68.0 [65.0, 71.0]"]
    assert row["open strict"] == "60.0 [57.0, 63.0]" and row["open med-moe"] == "-"
    assert row["router"] == "90.0 [80.0, 95.0]" and rows["vqa-rad: tiny"]["router"] == "not run"
    assert rows["blind control, slake: tiny"]["open strict"] == "40.0 [37.0, 43.0]"
    assert rows["majority baseline, slake: tiny"]["closed med-moe"] == "45.0 [42.0, 48.0]"
    assert find(text, "Table 1.")["ours: tiny"]["RAD closed"] == "75.0 [72.0, 78.0]"


def test_classification_goes_to_its_sets_column(tmp_path, capsys):
    found = {"likelihood_accuracy": 0.91, "generation_accuracy": 0.88, "auc": 0.953,
             "ci95": {"likelihood_accuracy": [0.9, 0.92]}}  # fmt: skip
    data = "medmnist:DIR/pneumoniamnist_64.npz"
    values = result(data=data, classification={"pneumoniamnist": found})
    rows = find(show(put(tmp_path / "r", values), capsys), "Table 3.")
    cells = [rows[f"ours, {name}: tiny"]["PneumoniaMNIST"] for name in found if name != "ci95"]
    assert cells == ["91.0 [90.0, 92.0]", "88.0", "95.3"]


def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own(tmp_path, capsys):
    dense = {"total": 900_000, "activated": 900_000, "dense_base": 900_000}
    more = [result(2, closed=0.50, flags=" --top-k 1"), result(closed=0.60, phase=2, params=dense),
            result(closed=0.40, trained_with="python train.py --data vqa-rad:DIR --seed 1"),
            result(closed=0.80, command="python eval.py x --limit 50")]  # fmt: skip
    text = show(put(tmp_path / "r", result(), *more, result(split="val")), capsys)
    rows = find(text, "Table 1.")
    ours = {row: cells["SLAKE closed"][:4] for row, cells in rows.items() if "ours" in row}
    assert ours == {
        "ours: tiny": "75.0", "ours: tiny, --limit 50": "85.0", "ours: tiny, --top-k 1": "55.0",
        "ours: tiny, dense, phase 2": "65.0", "ours: tiny, trained on vqa-rad:DIR": "45.0",
    }  # fmt: skip
    assert "4: ours, dense: tiny, dense, phase 2" in find(text, "Tables 4")
    experts = find(text, "Tables 9")
    assert experts["ours, top 1: tiny, --top-k 1"]["SLAKE closed"][:4] == "55.0"
    assert "ours, 4 experts, top 2: tiny, --top-k 1" not in experts
    assert "slake (val): tiny" in find(text, "One set")


def test_clean_strips_what_is_bulky_and_hides_where_things_lie(tmp_path, capsys):
    values = result(
        data="slake:/secret/data/slake", answers={"1": "yes"}, by_kind={"a": 1},
        command="/secret/bin/python eval.py /secret/runs/a/phase3 --json=/secret/out.json",
        trained_with="python train.py --data slake:/secret/data/slake@2 --clip '/secret/a b/clip' "
        "--router '/secret/my router.py:Top1' --out ~/secret/runs --seed 1",
        checkpoint="/secret/runs/a/phase3", leaks={"named": ["xmlab1/source.jpg"], "/secret/k": 1},
    )  # fmt: skip
    values["data"].append("medmnist:/secret/data/pneumoniamnist_64.npz")
    file = put(tmp_path / "r", values) / "0.json"
    kept = tables.clean(file, json.loads(file.read_text()))
    assert "secret" not in json.dumps(kept) and not {"answers", "by_kind"} & set(kept)
    assert kept["data"] == ["slake:DIR", "medmnist:pneumoniamnist_64.npz"]
    assert kept["command"] == "python eval.py phase3 --json=out.json"
    assert "--data slake:DIR@2 --clip clip --router 'my router.py:Top1'" in kept["trained_with"]
    assert kept["leaks"]["named"] == ["xmlab1/source.jpg"] and kept["checkpoint"] == "phase3"
    assert "slake+pneumoniamnist" in show(tmp_path / "r", capsys)
    assert tables.hide("runs/slake/phase3") == "runs/slake/phase3" and tables.hide("a:0") == "a:0"


def test_two_of_one_model_data_set_and_seed_are_refused(tmp_path, capsys):
    new = put(tmp_path / "n", result(7), result(7, closed=0.6))
    assert "two of" in refused(["--results", new], capsys)


BAD = {"seed": True, "protocols": None, "command": "python 'eval.py", "params/total": None,
       "protocols/med-moe/open_recall": None, "blind/protocols/strict": None,
       "protocols/strict/closed_accuracy": 72.4, "router/accuracy": float("nan")}  # fmt: skip


@pytest.mark.parametrize("path", BAD)
def test_a_bad_field_is_named_with_its_file(path, tmp_path, capsys):
    values = result()
    *outer, name = path.split("/")
    reduce(dict.__getitem__, outer, values)[name] = BAD[path]
    error = refused(["--results", put(tmp_path / "r", values)], capsys)
    assert "0.json" in error and path.replace("/", ".") in error


@pytest.mark.parametrize("text", ["", "[]"])
def test_what_is_no_result_or_no_folder_is_one_line(text, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(text)
    assert "bad.json" in refused(["--results", tmp_path], capsys)
    assert "--results" in refused(["--results", tmp_path / "bad.json"], capsys)
