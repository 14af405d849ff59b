"""The paper's numbers, ours beside them, and what is committed of ours.

The result files are made up, with numbers whose mean can be worked out by hand.
"""

import copy
import json

import pytest

from config import TrainConfig
from lab import tables

SCORERS = ("strict", "med-moe", "llava-med")


def protocol(closed, opened, interval=0.03, n_closed=400, n_open=600):
    """One scorer's part of a result; exact match is 0.1 and BLEU-1 0.2 below the recall."""
    scores = {"closed_accuracy": closed, "open_recall": opened, "open_precision": 0.5,
              "open_f1": 0.5, "open_exact_match": opened - 0.1, "open_bleu1": opened - 0.2,
              "overall": 0.5, "accuracy": 0.5}  # fmt: skip
    ci95 = {name: [value - interval, value + interval] for name, value in scores.items()}
    return {"n_closed": n_closed, "n_open": n_open, **scores, "ci95": ci95}


def result(seed=1, closed=0.7, opened=0.6, interval=0.03, flags="", data="slake:DIR", **more):
    """med-moe is 5 points above strict, llava-med 2 below; blind 20 below that, majority 30."""

    def protocols(less):
        return {
            name: protocol(closed + above - less, opened + above - less, interval)
            for name, above in zip(SCORERS, (0, 0.05, -0.02), strict=True)
        }

    return {
        "command": "python eval.py runs/x/phase3 --blind --json out.json",
        "trained_with": f"python train.py --data {data} --out runs/x --seed {seed} --jitter{flags}",
        "seed": seed, "preset": "tiny", "data": [data], "split": "test", "device": "cpu",
        "dtype": "torch.bfloat16", "n": 1000, "phase": 3, "checkpoint": "runs/x/phase3",
        "protocols": protocols(0),
        "blind": {"protocols": protocols(0.2)},
        "majority": {"protocols": protocols(0.3)},
        "router": {"accuracy": 0.9, "n": 96, "ci95": [0.8, 0.95]},
        "params": {"total": 1_900_000, "activated": 1_240_000, "dense_base": 900_000},
    } | more  # fmt: skip


def put(folder, *results):
    folder.mkdir(exist_ok=True)
    for values in results:
        number = len(list(folder.iterdir()))
        (folder / f"{number}.json").write_text(json.dumps(values))


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


@pytest.mark.parametrize(
    ("title", "row", "column", "expected"),
    [
        ("Table 1.", "M2I2", "SLAKE closed", "91.10"),
        ("Table 1.", "BiomedGPT-M", "PathVQA open", "12.5"),
        ("Table 1.", "LLaVA", "PathVQA open", "7.74"),
        ("Table 1.", "LLaVA-Med (Vicuna 7B)", "RAD open", "64.39"),
        ("Table 1.", "LLaVA-Med (Phi 2.7B)", "SLAKE open", "81.29"),
        ("Table 1.", "Med-MoE (Phi2)", "SLAKE open", "85.06"),
        ("Table 1.", "Med-MoE (StableLM)", "activated", "2.0B"),
        ("Table 1.", "zero-shot Med-MoE (StableLM)", "RAD closed", "66.91"),
        ("Table 2.", "LLaVA-Med 7B", "PathVQA EMS", "37.95"),
        ("Table 2.", "Med-Flamingo 9B", "PathVQA EMS", "31.00"),
        ("Table 2.", "PaLM-E 84B", "SLAKE BLEU", "52.65"),
        ("Table 2.", "Med-MoE (StableLM)", "SLAKE recall", "83.16"),
        ("Table 3.", "Med-Mamba", "OrganCMNIST", "92.4"),
        ("Table 3.", "Med-MoE (Phi2)", "PneumoniaMNIST", "91.4"),
        ("Tables 4", "4: dense", "PathVQA closed", "90.17"),
        ("Tables 4", "5: without meta expert", "SLAKE closed", "82.45"),
        ("Tables 4", "6: router learnt with the rest", "RAD open", "56.33"),
        ("Tables 4", "4, 5, 6: Med-MoE", "PathVQA open", "34.74"),
        ("Table 8.", "Med-MoE (StableLM)", "GPU memory in training", "12.5GB"),
        ("Table 8.", "LLaVA-Med", "GPU memory", "20GB"),
        ("Tables 9", "9: 4 experts, top 1", "time", "7h"),
        ("Tables 9", "9: 4 experts, top 2", "SLAKE closed", "84.9"),
        ("Tables 9", "10: 6 experts, top 2", "RAD open", "48.03"),
    ],
)
def test_the_papers_numbers(title, row, column, expected, tmp_path, capsys):
    assert find(show(tmp_path / "none", capsys), title)[row][column] == expected


def test_all_rows_of_the_paper_are_there(tmp_path, capsys):
    text = show(tmp_path / "none", capsys)
    assert len(find(text, "Table 1.")) == 18 + 1
    assert len(find(text, "Table 2.")) == 5 + 1
    assert len(find(text, "Table 3.")) == 5 + 3
    assert len(find(text, "Tables 4")) == 4 + 4
    assert len(find(text, "Table 8.")) == 5 + 1
    assert len(find(text, "Tables 9")) == 5 + 4


@pytest.mark.parametrize("exists", [False, True])
def test_without_results_all_of_ours_is_not_run(exists, tmp_path, capsys):
    if exists:
        (tmp_path / "results").mkdir()
    text = show(tmp_path / "results", capsys)
    seen = 0
    for part in text.split("\n## ")[1:]:
        for row, cells in find(text, part.splitlines()[0]).items():
            if "ours" in row:
                assert set(list(cells.values())[1:]) == {"not run"}, row
                seen += 1
    assert seen == 1 + 1 + 3 + 4 + 1 + 4 + 3
    assert "python train.py" not in text


def test_one_seed_has_its_own_interval(tmp_path, capsys):
    put(tmp_path / "r", result(closed=0.674, opened=0.5))
    row = find(show(tmp_path / "r", capsys), "Table 1.")["ours: tiny"]
    assert row["SLAKE closed"] == "72.4 [69.4, 75.4]"  # 67.4 + 5, give and take 3
    assert row["SLAKE open"] == "55.0 [52.0, 58.0]"
    assert row["RAD open"] == row["PathVQA closed"] == "not run"
    assert row["activated"] == "1.2M"


def test_seeds_are_one_row_with_mean_range_and_widest_interval(tmp_path, capsys):
    put(
        tmp_path / "r",
        result(seed=3, closed=0.60, opened=0.40, interval=0.02),
        result(seed=1, closed=0.70, opened=0.50, interval=0.04),
        result(seed=2, closed=0.71, opened=0.60, interval=0.03),
    )
    text = show(tmp_path / "r", capsys)
    row = find(text, "Table 1.")["ours: tiny"]
    # 65, 75, 76: mean 72; seed 1's is the widest, 75 - 4 to 75 + 4
    assert row["SLAKE closed"] == "72.0 (65.0-76.0 over 3 seeds) [71.0, 79.0]"
    # 45, 55, 65: mean 55
    assert row["SLAKE open"] == "55.0 (45.0-65.0 over 3 seeds) [51.0, 59.0]"
    words = find(text, "Table 2.")["ours: tiny"]
    assert words["SLAKE EMS"] == "45.0 (35.0-55.0 over 3 seeds) [41.0, 49.0]"
    assert words["SLAKE BLEU"] == "35.0 (25.0-45.0 over 3 seeds) [31.0, 39.0]"
    assert len(find(text, "Table 1.")) == 18 + 1


def test_below_a_table_stand_the_commands_the_seeds_and_the_device(tmp_path, capsys):
    put(tmp_path / "r", result(seed=3, device="cuda"), result(seed=1, device="cpu"))
    text = show(tmp_path / "r", capsys)
    assert text.count(
        "- slake, n 1000, tiny; --seed 1, 3; cpu, cuda: "
        "`python train.py --data slake:DIR --out runs/x --jitter`, "
        "`python eval.py runs/x/phase3 --blind --json out.json`\n"
    ) == 6  # fmt: skip
    one = put(tmp_path / "one", result(seed=3)) or show(tmp_path / "one", capsys)
    assert "--out runs/x --seed 3 --jitter`" in one


def test_three_scorers_and_both_controls_stand_side_by_side(tmp_path, capsys):
    put(tmp_path / "r", result(closed=0.7, opened=0.6))
    rows = find(show(tmp_path / "r", capsys), "One set")
    row = rows["slake: tiny"]
    closed = [row[f"closed {scorer}"] for scorer in SCORERS]
    opened = [row[f"open {scorer}"] for scorer in SCORERS]
    assert closed == ["70.0 [67.0, 73.0]", "75.0 [72.0, 78.0]", "68.0 [65.0, 71.0]"]
    assert opened == ["60.0 [57.0, 63.0]", "65.0 [62.0, 68.0]", "58.0 [55.0, 61.0]"]
    assert row["router"] == "90.0 [80.0, 95.0]"
    assert rows["blind control, slake: tiny"]["open strict"] == "40.0 [37.0, 43.0]"
    assert rows["majority baseline, slake: tiny"]["closed med-moe"] == "45.0 [42.0, 48.0]"


def test_what_a_file_leaves_out_is_not_run(tmp_path, capsys):
    values = result()
    for name in ("blind", "majority", "router"):
        del values[name]
    put(tmp_path / "r", values)
    rows = find(show(tmp_path / "r", capsys), "One set")
    assert rows["slake: tiny"]["router"] == "not run"
    assert rows["blind control, slake: tiny"]["open strict"] == "not run"
    assert rows["majority baseline, slake: tiny"]["closed strict"] == "not run"
    assert rows["slake: tiny"]["closed strict"] == "70.0 [67.0, 73.0]"


def test_no_open_questions_is_a_dash(tmp_path, capsys):
    values = result(data="vqa-rad:DIR")
    values["protocols"]["med-moe"] = protocol(0.7, 0.3, n_open=0)
    put(tmp_path / "r", values)
    row = find(show(tmp_path / "r", capsys), "Table 1.")["ours: tiny"]
    assert (row["RAD open"], row["RAD closed"]) == ("-", "70.0 [67.0, 73.0]")


@pytest.mark.parametrize("nested", [False, True])
def test_classification_goes_to_its_sets_column(nested, tmp_path, capsys):
    found = {"likelihood_accuracy": 0.91, "generation_accuracy": 0.88, "auc": 0.953,
             "ci95": {"likelihood_accuracy": [0.9, 0.92], "generation_accuracy": [0.86, 0.9]},
             }  # fmt: skip
    values = result(data="medmnist:DIR/pneumoniamnist_64.npz")
    values["classification"] = {"pneumoniamnist": found} if nested else found
    put(tmp_path / "r", values)
    rows = find(show(tmp_path / "r", capsys), "Table 3.")
    cells = {row: rows[f"ours, {row}: tiny"]["PneumoniaMNIST"] for row in
             ("likelihood_accuracy", "generation_accuracy", "auc")}  # fmt: skip
    assert cells == {
        "likelihood_accuracy": "91.0 [90.0, 92.0]",
        "generation_accuracy": "88.0 [86.0, 90.0]",
        "auc": "95.3",
    }
    assert rows["ours, auc: tiny"]["OrganCMNIST"] == "not run"


def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own(tmp_path, capsys):
    put(
        tmp_path / "r",
        result(seed=1, closed=0.70),
        result(seed=2, closed=0.50, flags=" --top-k 1"),
        result(seed=1, closed=0.60, phase=2,
               params={"total": 900_000, "activated": 900_000, "dense_base": 900_000}),
        result(seed=1, closed=0.45, flags=" --router topk"),
        result(seed=1, closed=0.40, trained_with="python train.py --data vqa-rad:DIR --seed 1"),
        result(seed=1, closed=0.38, split="val"),
        result(seed=1, closed=0.80, command="python eval.py x --limit 50 --json y"),
    )  # fmt: skip
    text = show(tmp_path / "r", capsys)
    found = {row: cells["SLAKE closed"][:4] for row, cells in find(text, "Table 1.").items()}
    assert {row: cell for row, cell in found.items() if row.startswith("ours")} == {
        "ours: tiny": "75.0",
        "ours: tiny, --limit 50": "85.0",
        "ours: tiny, --router topk": "50.0",
        "ours: tiny, --top-k 1": "55.0",
        "ours: tiny, dense, phase 2": "65.0",
        "ours: tiny, trained on vqa-rad:DIR": "45.0",
    }
    added, experts = find(text, "Tables 4"), find(text, "Tables 9")
    assert added["4: ours, dense: tiny, dense, phase 2"]["SLAKE closed"][:4] == "65.0"
    assert added["5: ours, without meta expert"]["SLAKE closed"] == "not run"
    row = "6: ours, router learnt with the rest: tiny, --router topk"
    assert added[row]["SLAKE closed"][:4] == "50.0"
    assert experts["ours, top 1: tiny, --top-k 1"]["SLAKE closed"][:4] == "55.0"
    assert experts["ours, 4 experts, top 2: tiny"]["SLAKE closed"][:4] == "75.0"
    assert "ours, 4 experts, top 2: tiny, --top-k 1" not in experts
    assert "slake (val): tiny" in find(text, "One set")


def test_a_row_without_flags_is_what_it_is_called():
    assert (TrainConfig.experts, TrainConfig.top_k, TrainConfig.router) == (4, 2, "modality")


def test_two_files_of_one_seed_are_refused(tmp_path, capsys):
    put(tmp_path / "r", result(seed=1), result(seed=1, closed=0.6))
    error = refused(["--results", tmp_path / "r"], capsys)
    assert "0.json" in error and "1.json" in error


def test_record_strips_what_is_bulky_and_names_by_content(tmp_path):
    values = result(
        seed=7, answers={"1": "yes"}, load={"CT": [[1.0]]}, by_kind={"a": 1}, by_modality={"b": 2}
    )
    values["blind"]["answers"] = {"1": "no"}
    put(tmp_path / "new", values)
    argv = ["--results", str(tmp_path / "r"), "--record", str(tmp_path / "new" / "0.json")]
    tables.main(argv)
    (file,) = (tmp_path / "r").iterdir()
    assert file.name == "slake-tiny-seed7.json"
    expected = copy.deepcopy(values)
    for name in ("answers", "load", "by_kind", "by_modality"):
        del expected[name]
    del expected["blind"]["answers"]
    assert json.loads(file.read_text()) == expected
    tables.main(argv)  # the same once more changes nothing, and needs no --force


def test_record_hides_where_things_lie_on_this_machine(tmp_path, capsys):
    values = result(
        data="slake:/secret/data/slake",
        command="/secret/bin/python eval.py /secret/runs/a/phase3 --json=/secret/out.json",
        trained_with="python train.py --data slake:/secret/data/slake@2 --clip '/secret/a b/clip' "
        "--router '/secret/my router.py:Top1' --out ~/secret/runs --seed 1",
        checkpoint="/secret/runs/a/phase3",
        leaks={"named": ["xmlab1/source.jpg"], "/secret/key": 1},
    )
    values["data"].append("medmnist:/secret/data/pneumoniamnist_64.npz")
    put(tmp_path / "new", values)
    tables.main(["--results", str(tmp_path / "r"), "--record", str(tmp_path / "new" / "0.json")])
    (file,) = (tmp_path / "r").iterdir()
    assert "secret" not in file.read_text() and "secret" not in file.name
    kept = json.loads(file.read_text())
    assert kept["data"] == ["slake:DIR", "medmnist:pneumoniamnist_64.npz"]
    assert kept["command"] == "python eval.py phase3 --json=out.json"
    assert "--data slake:DIR@2 --clip clip --router 'my router.py:Top1'" in kept["trained_with"]
    assert kept["checkpoint"] == "phase3"
    assert kept["leaks"]["named"] == ["xmlab1/source.jpg"]
    assert "slake+pneumoniamnist" in show(tmp_path / "r", capsys)


def test_a_relative_path_is_kept():
    for word in ("runs/slake/phase3", "slake:DIR", "phantoms:500", "cuda:0", "torch.bfloat16"):
        assert tables.hide(word) == word


def test_record_overwrites_another_content_only_by_force(tmp_path, capsys):
    put(tmp_path / "new", result(closed=0.7), result(closed=0.6))
    into = ["--results", str(tmp_path / "r")]
    tables.main([*into, "--record", str(tmp_path / "new" / "0.json")])
    (file,) = (tmp_path / "r").iterdir()
    before = file.read_text()
    second = [*into, "--record", tmp_path / "new" / "1.json"]
    assert "--force" in refused(second, capsys)
    assert file.read_text() == before
    tables.main([*map(str, second), "--force"])
    assert json.loads(file.read_text())["protocols"]["strict"]["closed_accuracy"] == 0.6


def test_several_files_are_recorded_and_printed_as_seeds(tmp_path, capsys):
    put(tmp_path / "new", result(seed=1), result(seed=2), result(seed=2, flags=" --top-k 1"))
    files = [word for i in range(3) for word in ("--record", str(tmp_path / "new" / f"{i}.json"))]
    tables.main(["--results", str(tmp_path / "r"), *files])
    names = {file.name for file in (tmp_path / "r").iterdir()}
    assert names == {
        "slake-tiny-seed1.json", "slake-tiny-seed2.json", "slake-tiny-top-k-1-seed2.json",
    }  # fmt: skip
    assert "over 2 seeds" in show(tmp_path / "r", capsys)


def change(values, path, value=None):
    """A copy with one field set, or, where value is None, without it."""
    values = copy.deepcopy(values)
    inner, names = values, path.split("/")
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    if value is None:
        del inner[names[-1]]
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((name, None) for name in ("seed", "preset", "data", "split", "device", "phase", "n",
                                    "command", "trained_with", "protocols", "params/total")),
        ("protocols/strict", None),
        ("protocols/med-moe/open_recall", None),
        ("protocols/llava-med/closed_accuracy", None),
        ("blind/protocols/strict", None),
        ("majority/protocols/strict/open_recall", None),
        ("protocols/med-moe/open_recall", float("nan")),
        ("protocols/strict/open_f1", float("nan")),  # not printed, but recorded
        ("protocols/strict/closed_accuracy", 72.4),  # percent
        ("protocols/strict/closed_accuracy", "0.7"),
        ("router/accuracy", float("inf")),
        ("seed", "1"),
        ("seed", True),
        ("command", "python 'eval.py"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("recording", [False, True])
def test_a_bad_field_is_named_with_its_file(path, value, recording, tmp_path, capsys):
    put(tmp_path / "r", change(result(), path, value))
    argv = ["--record", tmp_path / "r" / "0.json"] if recording else []
    error = refused(["--results", tmp_path / ("to" if recording else "r"), *argv], capsys)
    assert "0.json" in error and f'"{path.replace("/", ".")}' in error
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("ends", [[0.5], [0.5, 72.4], ["0.5", 0.6]])
def test_a_bad_interval_is_named_with_its_file(ends, tmp_path, capsys):
    put(tmp_path / "r", change(result(), "protocols/strict/ci95/open_recall", ends))
    error = refused(["--results", tmp_path / "r"], capsys)
    assert "0.json" in error and '"protocols.strict.open_recall" or its ci95' in error


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"text"'])
def test_what_is_no_result_is_one_line(text, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(text)
    assert "bad.json" in refused(["--results", tmp_path], capsys)
    assert "bad.json" in refused(["--record", tmp_path / "bad.json"], capsys)


def test_a_missing_file_and_a_file_as_folder_are_one_line(tmp_path, capsys):
    assert "none.json" in refused(["--record", tmp_path / "none.json"], capsys)
    (tmp_path / "file").write_text("")
    assert "--results" in refused(["--results", tmp_path / "file"], capsys)
