"""Scoring a checkpoint, and asking it: python -m pytest tests/test_eval.py"""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import chat
import eval
import eval as evaluation  # the script; the builtin keeps its name
import metrics
import train
from checkpoint import load_model, read_seen
from config import MODALITIES, UserError
from data import Sample, collate, encode_sample
from engine.durable import seal
from model import Generated
from routers import Routing
from scoring import compare
from sources.load import load_samples

EOS = 9


def sample(answer: str, answer_type: str, image: int, kind: str = "side", modality: str = "CT"):
    turns = (("What?", answer),)
    return Sample(str(image), "test", "test", image, turns, modality, answer_type, kind)


def test_unpack_counts_routed_tokens_of_prompt_and_answer_but_not_of_padding_or_the_end():
    """Two samples, two sparse layers, three experts; the second ends after one token."""
    n_layers, n_experts = 2, 3
    mask = torch.tensor([[True, True, True], [False, True, True]])

    def routing(expert: list[list[int]]) -> Routing:
        gates = torch.nn.functional.one_hot(torch.tensor(expert), n_experts).float()
        return Routing(gates * 0.5, gates * 7)

    prompt = [routing([[0, 1, 1], [2, 2, 0]])] * n_layers
    later = [[routing([[e], [e]])] * n_layers for e in (2, 1)]
    tokens = [torch.tensor(t) for t in ([4, 5], [6, EOS], [EOS, 8])]
    steps = [Generated(t, r) for t, r in zip(tokens, [prompt, *later], strict=True)]
    text = SimpleNamespace(eos_id=EOS, decode=lambda ids: " ".join(map(str, ids)))
    first, second = eval.unpack(steps, mask, text)
    assert (first.answer, second.answer) == ("4 6", "5")
    assert first.load.tolist() == [[1, 3, 1]] * 2  # 0 1 1, then 2 for "4" and 1 for "6"
    assert second.load.tolist() == [[1, 0, 2]] * 2  # padding's 2 is left out, "5" is routed to 2
    assert first.votes.tolist() == pytest.approx([14 / 3, 28 / 3, 0])  # per position, two layers
    assert second.votes.tolist() == [7, 0, 7]  # padding's vote for 2 is left out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main(["--data", "phantoms:32", "--out", str(out), "--steps", "2", "--batch-size", "8",
                "--no-eval", "--router-images", "32"])  # fmt: skip
    return out / "phase3"


def test_evaluation_writes_everything_it_measured(checkpoint, tmp_path, capsys):
    file = tmp_path / "scores.json"
    evaluation.main([str(checkpoint), "--limit", "60", "--max-new", "4", "--blind", "--json",
                     str(file)])  # fmt: skip
    result = json.loads(file.read_text())
    assert set(result["protocols"]) == {"strict", "med-moe", "llava-med"}
    for found in (result, result["blind"], result["majority"]):
        for part in found["protocols"].values():
            assert part["n"] == 60 == part["n_closed"] + part["n_open"]
            assert part.keys() - {"n", "n_closed", "n_open", "ci95"} == part["ci95"].keys()
    assert len(result["answers"]) == 60 and result["leaks"]["questions"] == 60
    assert result["leaks"]["images_seen"] == result["leaks"]["questions_seen"] == 0
    assert result["command"].startswith(f"python eval.py {checkpoint} --limit 60")
    assert result["trained_with"].startswith("python train.py --data phantoms:32 --batch-size 8")
    assert {"n", "accuracy", "confusion", "f1"} <= result["router"].keys()
    assert {"total", "activated", "dense_base"} <= result["params"].keys()
    n_images = len({s.image for s in load_samples(["phantoms:32"], "vqa", "test")[:60]})
    assert result["router"]["n"] == n_images == sum(map(sum, result["router"]["confusion"]))
    assert sum(part["n"] for part in result["by_modality"].values()) == 60
    assert sum(part["n"] for part in result["by_kind"].values()) == 60
    samples, learnt = (load_samples(["phantoms:32"], "vqa", split) for split in ("test", "train"))
    fair, cheat = (
        metrics.score(samples[:60], metrics.majority(samples[:60], seen))["overall"]
        for seen in (learnt, samples[:60])
    )
    assert result["majority"]["protocols"]["strict"]["overall"] == fair != cheat
    for layers in result["load"].values():
        assert [pytest.approx(1.0)] * 2 == [sum(layer) for layer in layers]
    output = capsys.readouterr().out
    assert "blind control" in output and "block 2" in output and "of 7 B" in output


def test_answers_do_not_depend_on_the_batch(checkpoint):
    model, text, _ = load_model(checkpoint, torch.device("cpu"))
    samples = load_samples(["phantoms:32"], "vqa", "test")[:10]
    found = []
    for size in (1, 4, 10):
        predictor = eval.Predictor(model, text, torch.device("cpu"), torch.float32, size, max_new=5)
        found.append(predictor.answer(samples))
    for other in found[1:]:
        assert [p.answer for p in other] == [p.answer for p in found[0]]
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.load, b.load)


def test_options_are_chosen_by_the_likelihood_of_the_whole_answer(checkpoint):
    """Batches of sorted prompts, cached, against one plain text at a time."""
    model, text, _ = load_model(checkpoint, torch.device("cpu"))
    predictor = eval.Predictor(model, text, torch.device("cpu"), torch.float32, batch_size=2)
    options = ("yes", "no", "upper left")
    samples = load_samples(["phantoms:32"], "vqa", "test")[:7]
    samples = [replace(s, options=options) for s in samples]
    assert len({len(s.turns[0][0]) for s in samples}) > 2
    expected = torch.zeros(7, 3)
    for (i, s), (j, option) in itertools.product(enumerate(samples), enumerate(options)):
        answered = replace(s, turns=((s.turns[0][0], option),))
        encoded = encode_sample(answered, text, model.config)
        batch = collate([answered], [encoded], predictor.images, text.eos_id)
        with torch.no_grad():
            expected[i, j] = -model.loss(batch).total
    found = predictor.choose(samples)
    torch.testing.assert_close(found, expected.softmax(dim=1), atol=1e-4, rtol=0)


def test_the_blind_control_gives_every_question_the_same_image(checkpoint):
    model, text, _ = load_model(checkpoint, torch.device("cpu"))
    predictor = eval.Predictor(model, text, torch.device("cpu"), torch.float32, max_new=2)
    samples = load_samples(["phantoms:32"], "vqa", "test")[:21]
    assert len({s.image for s in samples}) == 3 and len(samples) % 3 == 0
    samples = samples[:20]  # not equally many questions an image
    mean = predictor.mean_image(samples)
    pixels = torch.stack(
        [predictor.images.get(s).float() for s in {s.image: s for s in samples}.values()]
    )
    wanted = eval.normalise(pixels.mean(0).round()[None])[0]
    torch.testing.assert_close(mean, wanted)
    seen = []
    model.vision.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    predictor.answer(samples, mean)
    assert sum(map(len, seen)) == len(samples)
    assert all(torch.equal(image, mean) for batch in seen for image in batch)


def test_the_parameter_line_names_its_three_denominators():
    millions = {"total": 8000, "activated": 3500, "dense_base": 1750}
    line = evaluation.show_parameters({name: n * 10**6 for name, n in millions.items()})
    assert "43.8% of its own total" in line and "200.0% of the dense model" in line
    assert "50.00% of 7 B" in line


def test_chat_streams_an_answer_and_shows_the_routes(checkpoint, tmp_path, capsys):
    Image.new("RGB", (60, 40), (90, 20, 30)).save(tmp_path / "x.png")
    chat.main([str(checkpoint), "--image", str(tmp_path / "x.png"), "--question", "Which modality?",
               "--max-new", "3"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("experts") and MODALITIES[0] in line for line in lines)
    assert sum("  image " in line for line in lines) == 2
    assert sum("question" in line for line in lines) == 2


def test_chat_without_a_question_asks_until_an_empty_line(checkpoint, monkeypatch, capsys):
    typed = iter(["Which modality is this?", "Is it the hand?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    chat.main([str(checkpoint), "--image", "phantom:2000000003", "--max-new", "2"])
    assert capsys.readouterr().out.count("\nexperts ") == 2
    assert next(typed, None) is None


def test_the_stream_waits_for_whole_characters(capsys):
    parts = {1: "", 2: "gr", 3: "gr\ufffd", 4: "grün"}
    stream = chat.Stream(SimpleNamespace(decode=lambda ids: " " + parts[len(ids)]))
    for token in range(4):
        stream.add(token)
    assert capsys.readouterr().out == "grün"


# ---- without a model, and what was seen in training


def save_image(path, seed):
    path.parent.mkdir(exist_ok=True, parents=True)
    coarse = np.random.default_rng(seed).integers(256, size=(6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC).save(path)


def llava(folder, split, *rows):
    """Rows of (image's seed, question, answer) -> a LLaVA file and its images."""
    items = []
    for i, (seed, question, answer) in enumerate(rows):
        save_image(folder / "images" / f"{split}{seed}.png", seed)
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        items.append({"id": i, "image": f"{split}{seed}.png", "conversations": turns})
    (folder / f"{split}.json").write_text(json.dumps(items))
    return f"llava:{folder / split}.json"


def test_a_planted_test_question_is_found_and_another_split_is_clean(tmp_path, capsys):
    seen = [(i, f"What is number {i}?", "a lung") for i in range(4)]
    train_spec = llava(tmp_path, "train", *seen)
    planted = llava(tmp_path, "planted", (9, "New?", "yes"), (2, "what is Number 2", "A lung."))
    clean = llava(tmp_path, "clean", (7, "New?", "yes"), (8, "What is number 3?", "a lung"))
    run = ["--phase", "1", "--steps", "1", "--batch-size", "4", "--no-eval"]
    train.main([*run, "--data", train_spec, "--out", str(tmp_path / "run")])
    checkpoint = str(tmp_path / "run" / "phase1")
    capsys.readouterr()
    found = evaluation.main([checkpoint, "--data", planted, "--max-new", "1"])["leaks"]
    output = capsys.readouterr().out
    assert (found["images"], found["images_seen"]) == (2, 1) and "LEAK: 1 of 2 images" in output
    # Phase 1 saw captions, so the question itself is not on record yet; phase 2 sees it.
    assert found["questions_seen"] == 0
    again = ["--phase", "2", *run[2:], "--init", checkpoint, "--data", train_spec]
    train.main([*again, "--out", str(tmp_path / "run2")])
    checkpoint = str(tmp_path / "run2" / "phase2")
    found = evaluation.main([checkpoint, "--data", planted, "--max-new", "1"])["leaks"]
    assert found["questions_seen"] == 1 and found["first"][0]["id"] == "1"
    found = evaluation.main([checkpoint, "--data", clean, "--max-new", "1"])["leaks"]
    assert found["images_seen"] == found["questions_seen"] == 0 and found["pairs_seen"] == 1
    more = ["--phase", "2", *run[2:], "--init", checkpoint, "--data", clean]
    train.main([*more, "--out", str(tmp_path / "run3")])  # what earlier phases saw is kept
    later = evaluation.main(
        [str(tmp_path / "run3" / "phase2"), "--data", planted, "--max-new", "1"]
    )
    assert later["leaks"]["questions_seen"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda seen: {},
        lambda seen: {"other": seen},
        lambda seen: {"rows": seen.float()},
        lambda seen: {"rows": seen[:, :5].contiguous()},
        lambda seen: {"rows": seen.flatten()},
        lambda seen: b"damaged",
    ],
)
def test_a_damaged_record_of_what_was_seen_is_no_clean_bill(checkpoint, tmp_path, damage):
    shutil.copytree(checkpoint, tmp_path / "x")
    file = tmp_path / "x" / "seen.safetensors"
    found = damage(read_seen(tmp_path / "x"))
    if isinstance(found, bytes):
        file.write_bytes(found)
    else:
        save_file(found, file)
    seal(tmp_path / "x")
    with pytest.raises(UserError, match=r"seen\.safetensors: "):
        read_seen(tmp_path / "x")


def test_flags_on_the_command_line_win_over_those_of_training(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluation.main([str(checkpoint), "--router-labels", str(tmp_path / "none.json")])
    assert "none.json: No such file" in capsys.readouterr().err


def test_no_majority_baseline_where_the_training_split_is_not_there(checkpoint, tmp_path, capsys):
    (tmp_path / "only").mkdir()
    llava(tmp_path / "only", "test", (1, "Is it?", "no"), (2, "What?", "left lung"))
    found = evaluation.main(
        [str(checkpoint), "--data", f"llava:{tmp_path / 'only'}", "--max-new", "1"]
    )
    assert "majority" not in found and found["n"] == 2
    assert "warning: no majority baseline: " in capsys.readouterr().err


def test_text_only_questions_and_too_long_ones(checkpoint, tmp_path, capsys):
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "no"}]
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"id": 1, "conversations": turns}]))
    argv = [str(checkpoint), "--data", f"llava:{file}", "--max-new", "1", "--blind"]
    assert evaluation.main(argv)["n"] == 1
    turns[0]["value"] = "word " * 1000
    file.write_text(json.dumps([{"id": 1, "conversations": turns}]))
    with pytest.raises(SystemExit):
        evaluation.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the question that begins 'word word" in error and "the model reads 512" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": None}, "not a checkpoint of this project"),
        ({"flags": {}}, "not a checkpoint of this project: 'seed'"),
        ({"phase": "x"}, "phase and seed must be numbers"),
        ({"data": 5}, '"data" 5 is of the wrong kind'),
        ({"data": [1]}, '"data" [1] is of the wrong kind'),
        ({"data": "slake:x"}, "is of the wrong kind"),
        ({"max_missing": "x"}, "\"max_missing\" 'x' is of the wrong kind"),
        ({"lang": "fr"}, '"lang" must be one of en, zh, all'),
    ],
)
def test_a_damaged_config_is_reported_before_anything_is_answered(
    checkpoint, tmp_path, capsys, change, message
):
    shutil.copytree(checkpoint, tmp_path / "x")
    meta = json.loads((tmp_path / "x" / "config.json").read_text())
    if change.keys() <= {"flags", "phase"}:
        meta |= change
    else:
        meta["flags"] |= change
    (tmp_path / "x" / "config.json").write_text(json.dumps(meta))
    seal(tmp_path / "x")
    with pytest.raises(SystemExit):
        evaluation.main([str(tmp_path / "x")])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "config.json" in error


def test_a_checkpoint_without_a_record_of_its_training_data_is_not_checked(
    checkpoint, tmp_path, capsys
):
    other = tmp_path / "phase3"
    shutil.copytree(checkpoint, other)
    (other / "seen.safetensors").unlink()
    seal(other)
    argv = ["--split", "train", "--limit", "9", "--max-new", "1"]
    found = [evaluation.main([str(path), *argv])["leaks"] for path in (checkpoint, other)]
    assert found[0]["questions_seen"] == 9
    assert found[1] == {"fingerprint": found[0]["fingerprint"]}
    assert "phase3 has no record of its training data" in capsys.readouterr().out


def test_anyones_answers_are_scored_without_a_model(tmp_path, capsys):
    spec = llava(tmp_path, "test", (1, "Is it?", "no"), (2, "What?", "left lung"))
    answers = tmp_path / "answers.jsonl"
    lines = [{"question_id": 1, "text": "left"}, {"question_id": "0", "text": "abnormal"}]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.json"
    evaluation.main(["--predictions", str(answers), "--data", spec, "--json", str(out)])
    found = json.loads(out.read_text())["protocols"]
    assert {name: s["closed_accuracy"] for name, s in found.items()} == {
        "strict": 0.0, "med-moe": 1.0, "llava-med": 1.0}  # fmt: skip
    assert {name: s["open_recall"] for name, s in found.items()} == dict.fromkeys(found, 0.5)
    assert "not checked" in capsys.readouterr().out


def test_two_sets_of_answers_are_compared_from_files_of_either_kind(checkpoint, tmp_path, capsys):
    argv = [str(checkpoint), "--limit", "12", "--max-new", "2"]
    first, second = tmp_path / "a.json", tmp_path / "b.jsonl"
    evaluation.main([*argv, "--json", str(first), "--answers", str(second)])
    lines = [json.loads(line) for line in second.read_text().splitlines()]
    assert {line["question_id"]: line["text"] for line in lines} == json.loads(first.read_text())[
        "answers"
    ]
    found = evaluation.main(["--compare", str(first), str(second), "--limit", "12"])
    assert found["overall"]["difference"] == 0 and found["overall"]["n"] == 12
    samples = load_samples(["phantoms:32"], "vqa", "test")[:12]
    right = [{"question_id": s.id, "text": s.turns[0][1]} for s in samples]
    second.write_text("".join(json.dumps(line) + "\n" for line in right))
    found = evaluation.main(["--compare", str(first), str(second), "--limit", "12"])
    before = compare.read_predictions(first, samples)
    gap = 1 - metrics.score(samples, before)["overall"]
    assert gap > 0 and found["overall"]["difference"] == pytest.approx(gap)
    assert "McNemar" in capsys.readouterr().out
    other = json.loads(first.read_text())
    other["leaks"]["fingerprint"] = "0" * 16  # other questions behind the same identifiers
    (tmp_path / "c.json").write_text(json.dumps(other))
    for compared, message in (
        (
            [first, tmp_path / "c.json"],
            "answers to the split 0000000000000000, these questions are",
        ),
        ([first, first, "--answers", tmp_path / "x"], "only for a checkpoint"),
        ([first, second, "--json", second], "would be written over another file"),
    ):
        with pytest.raises(SystemExit):
            evaluation.main(["--compare", *map(str, compared), "--limit", "12"])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the other split's identifiers
        evaluation.main(
            ["--compare", str(first), str(second), "--split", "val", "--data", "phantoms"]
        )
    assert "another split?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "takes one of: a checkpoint DIR, --predictions FILE, --compare A B"),
        (["runs", "--predictions", "x"], "takes one of"),
        (["--predictions", "x.jsonl"], "--data SOURCE is needed"),
        (["--predictions", "none.jsonl", "--data", "phantoms"], "none.jsonl: No such file"),
        (["--compare", "a.json", "b.json"], "a.json: No such file"),
        (["--compare", "a.json"], "expected 2 arguments"),
        (["runs", "--limit", "0"], "--limit 0: must be at least 1"),
        (["runs", "--json", "nowhere/x.json"], "nowhere/x.json: cannot be written there"),
        (["runs", "--answers", "."], ".: cannot be written there"),
    ],
)
def test_a_wrong_call_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
