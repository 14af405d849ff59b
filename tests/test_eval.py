"""Scoring a checkpoint, or anybody's answers, on held-out questions."""

import io
import itertools
import json
import runpy
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation  # the script; the builtin keeps its name
import metrics
from checkpoint import load_model, read_seen
from config import Common, UserError
from data import collate, encode_prompt, encode_sample
from engine.cli import parse
from engine.durable import seal
from engine.processes import Processes
from model import Generated, generate
from routers import Routing
from scoring import leaks
from scoring.compare import under_all
from scoring.router import expert_load, judge_router
from sources.images import Images
from sources.load import load_samples
from tests.mini import checkpoint

CPU, EOS = torch.device("cpu"), 9


def test_flags_and_their_defaults():
    assert evaluation.EvalConfig.__dataclass_params__.frozen
    assert vars(parse(evaluation.EvalConfig, [], "eval.py")) == vars(Common()) | {
        "checkpoint": None, "predictions": None, "compare": None, "answers": None, "split": "test",
        "blind": False, "limit": None, "max_new": 48, "router": None, "router_level": "trained",
        "record_routes": None, "replay_routes": None}  # fmt: skip


def test_unpack_counts_routed_tokens_of_prompt_and_answer_but_not_of_padding_or_the_end():
    """Two samples, two sparse layers, three experts; the second ends after one token."""
    mask = torch.tensor([[True, True, True], [False, True, True]])

    def routing(expert: list[list[int]]) -> Routing:
        gates = torch.nn.functional.one_hot(torch.tensor(expert), 3).float()
        return Routing(gates * 0.5, gates * 7)

    prompt = [routing([[0, 1, 1], [2, 2, 0]])] * 2
    later = [[routing([[e], [e]])] * 2 for e in (2, 1)]
    tokens = [torch.tensor(t) for t in ([4, 5], [6, EOS], [EOS, 8])]
    steps = [Generated(t, r) for t, r in zip(tokens, [prompt, *later], strict=True)]
    text = SimpleNamespace(eos_id=EOS, decode=lambda ids: " " + " ".join(map(str, ids)))
    first, second = evaluation.unpack(steps, mask, text)
    assert (first.answer, second.answer) == ("4 6", "5")
    assert first.load.tolist() == [[1, 3, 1]] * 2  # 0 1 1, then 2 for "4" and 1 for "6"
    assert second.load.tolist() == [[1, 0, 2]] * 2  # padding's 2 is left out, "5" is routed to 2
    assert first.votes.tolist() == pytest.approx([14 / 3, 28 / 3, 0])  # per position, two layers
    assert second.votes.tolist() == [7, 0, 7]  # padding's vote for 2 is left out
    dense = evaluation.unpack([step._replace(routings=[]) for step in steps], mask, text)
    assert [p.answer for p in dense] == ["4 6", "5"]
    assert dense[0].votes.shape == (0,) and dense[0].load.shape == (0, 0)


# A model that answers


@pytest.fixture(scope="module")
def phase3(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("mini") / "phase3")


@pytest.fixture
def predictor(phase3):
    model, text, _ = load_model(phase3, CPU)
    return evaluation.Predictor(model, text, CPU, torch.float32, batch_size=4, max_new=5)


def held_out(n):
    return load_samples(["phantoms:8"], "vqa", "test")[:n]


def test_batches_are_of_similar_lengths_and_shared_among_processes(predictor, monkeypatch):
    samples, ahead = held_out(11), []
    monkeypatch.setattr(predictor.images, "prefetch", lambda samples: ahead.append([*samples]))
    batches = list(predictor.batches(samples, "x"))
    assert [len(rows) for rows, _ in batches] == [4, 4, 3]
    n = [[int(b.mask[i].sum()) for i in range(len(rows))] for rows, b in batches]
    n = [*itertools.chain(*n)]
    assert n == sorted(n) and n[0] < n[-1]
    assert sorted(itertools.chain(*(rows for rows, _ in batches))) == list(range(11))
    rows = [rows for rows, _ in batches]
    assert ahead == [[samples[i] for i in part] for part in [*rows[1:], []]]
    assert all(batch.mask[:, -1].all() for _, batch in batches)  # padded on the left
    assert predictor.images.pad and predictor.images.pool is not None
    predictor.processes = Processes(1, 2)
    assert [part for part, _ in predictor.batches(samples, "x")] == rows[1:2]


def test_answers_are_what_the_model_generates_whatever_the_batch(predictor):
    samples, model, text = held_out(9), predictor.model, predictor.text
    found = predictor.answer(samples)
    assert len({p.answer for p in found}) > 3
    for s, p in zip(samples, found, strict=True):
        encoded = encode_prompt(s.turns[0][0], True, text, model.config)
        batch = collate([s], [encoded], Images(32), text.eos_id, "left")
        (alone,) = evaluation.unpack(list(generate(model, batch, text.eos_id, 5)), batch.mask, text)
        assert alone.answer == p.answer and torch.equal(alone.load, p.load)
        torch.testing.assert_close(alone.votes, p.votes, atol=1e-5, rtol=0)


def test_options_are_chosen_by_the_likelihood_of_the_whole_answer(predictor):
    """Batches of sorted prompts, cached, against one plain text at a time."""
    options = ("yes", "no", "upper left")
    samples = [replace(s, options=options) for s in held_out(7)]
    expected = torch.zeros(7, 3)
    for (i, s), (j, option) in itertools.product(enumerate(samples), enumerate(options)):
        answered = replace(s, turns=((s.turns[0][0], option),))
        encoded = encode_sample(answered, predictor.text, predictor.model.config)
        batch = collate([answered], [encoded], predictor.images, predictor.text.eos_id)
        with torch.no_grad():
            expected[i, j] = -predictor.model.loss(batch).total
    found = predictor.choose(samples)
    torch.testing.assert_close(found, expected.softmax(dim=1), atol=1e-4, rtol=0)


def test_blind_every_question_has_the_mean_of_the_different_images(predictor):
    samples = [s for s in held_out(21) if s.image != held_out(21)[-1].image] + held_out(21)[-1:]
    assert len({s.image for s in samples}) == 3  # not equally many questions an image
    mean = predictor.mean_image([*samples, replace(samples[0], image=None)])
    pixels = [predictor.images.get(s).double() for s in {s.image: s for s in samples}.values()]
    torch.testing.assert_close(mean, evaluation.normalise(sum(pixels).div(3).round()[None])[0])
    seen = []
    predictor.model.vision.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    predictor.answer(samples, mean)
    seen = torch.cat(seen)
    assert torch.equal(seen, mean.expand(len(samples), -1, -1, -1))
    assert predictor.mean_image([]).shape == (3, 32, 32)


def test_the_parameter_line_names_its_three_denominators():
    millions = {"total": 8000, "activated": 3500, "dense_base": 1750}
    line = evaluation.show_parameters({name: n * 10**6 for name, n in millions.items()})
    assert "43.8% of its own total" in line and "200.0% of the dense model" in line
    assert "50.00% of 7 B" in line


# The command


@pytest.fixture(scope="module")
def scored(phase3):
    """One evaluation: what it wrote as JSON and as JSONL, and what it printed."""
    file, answers = phase3.parent / "scores.json", phase3.parent / "answers.jsonl"
    with redirect_stdout(io.StringIO()) as printed:
        evaluation.main([str(phase3), "--limit", "24", "--max-new", "5", "--blind", "--dtype",
                         "float32", "--json", str(file), "--answers", str(answers)])  # fmt: skip
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    return SimpleNamespace(file=file, answers=answers, lines=lines, out=printed.getvalue(),
                           result=json.loads(file.read_text()))  # fmt: skip


def test_evaluation_writes_everything_it_measured(phase3, predictor, scored):
    result, samples = scored.result, held_out(24)
    found = predictor.answer(samples)
    said = [p.answer for p in found]
    assert result["answers"] == dict(zip([s.id for s in samples], said, strict=True))
    assert {row["question_id"]: row["text"] for row in scored.lines} == result["answers"]
    blind = predictor.answer(samples, predictor.mean_image(samples))
    train = load_samples(["phantoms:8"], "vqa", "train")
    for name, by in (("", said), ("blind", [p.answer for p in blind]),
                     ("majority", metrics.majority(samples, train))):  # fmt: skip
        part = result[name] if name else result
        assert part["protocols"] == json.loads(json.dumps(under_all(samples, by)))
    assert said != [p.answer for p in blind]
    for name, key in (("by_modality", lambda s: s.modality),
                      ("by_kind", lambda s: f"{s.kind} ({s.answer_type})")):  # fmt: skip
        wanted = json.loads(json.dumps(metrics.split_by(samples, said, key)))
        assert result[name] == wanted and len(wanted) > 1
    assert result["leaks"] == json.loads(json.dumps(leaks.check(samples, read_seen(phase3))))
    assert result["router"] == json.loads(json.dumps(judge_router(samples, found)))
    assert result["load"] == expert_load(samples, found)
    assert result["params"] == evaluation.count_parameters(predictor.model)
    assert result["command"].startswith(f"python eval.py {phase3} --limit 24")
    assert (
        result["trained_with"] == "python train.py --data phantoms:8 --device cpu --dtype float32"
    )
    assert {k: result[k] for k in ("n", "split", "limit", "preset", "phase", "seed", "dtype")} == {
        "n": 24, "split": "test", "limit": 24, "preset": "tiny", "phase": 3, "seed": 0,
        "dtype": "torch.float32"}  # fmt: skip
    assert result["data"] == ["phantoms:8"] and result["classification"] == {}
    for part in ("blind control", "majority baseline", "block 2", "of 7 B", "finding (open)"):
        assert part in scored.out


def test_a_dense_converted_model_has_no_router_to_judge(tmp_path, capsys):
    folder = checkpoint(tmp_path / "x", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"from": "elsewhere"}))
    seal(folder)
    found = evaluation.main([str(folder), "--limit", "2", "--max-new", "1"])
    assert found["trained_with"] == "converted from elsewhere"
    assert not {"router", "load", "blind"} & found.keys() and "block" not in capsys.readouterr().out


def test_classification_is_scored_by_likelihood_for_each_source_with_options(predictor, capsys):
    options, samples = ("normal", "pneumonia"), held_out(4)
    asked = [
        replace(s, source="pneumoniamnist", options=options, turns=(("Which?", options[i % 2]),))
        for i, s in enumerate(samples)
    ]
    answers = ["normal"] * 8
    found = evaluation.classification(predictor, [*samples, *asked], answers)
    likely = predictor.choose(asked).double().numpy()
    assert found == {"pneumoniamnist": evaluation.judge_classes(asked, answers[4:], likely)}
    assert "pneumoniamnist" in capsys.readouterr().out
    assert evaluation.classification(predictor, samples, answers[:4]) == {}


def test_the_router_and_its_level_can_be_replaced(phase3, scored):
    found = evaluation.main([str(phase3), "--limit", "24", "--max-new", "5", "--router", "random",
                             "--router-level", "sequence"])  # fmt: skip
    assert found["load"] != scored.result["load"]
    with pytest.raises(SystemExit):
        evaluation.main([str(phase3), "--router", "nowhere.py:Router"])


def test_routes_are_recorded_and_replayed(phase3, scored, tmp_path):
    file = str(tmp_path / "routes.safetensors")
    argv = [str(phase3), "--limit", "24", "--max-new", "5", "--dtype", "float32"]
    assert evaluation.main([*argv, "--record-routes", file])["load"] == scored.result["load"]
    replayed = evaluation.main([*argv, "--router", "oracle", "--replay-routes", file])
    assert replayed["answers"] == scored.result["answers"]


def test_it_is_a_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(evaluation.__file__, run_name="__main__")
    assert stopped.value.code == 2


# Which questions


def llava(folder, split, *rows):
    """Rows of (image's seed, question, answer) -> a LLaVA file and its images."""
    items = []
    for i, (seed, question, answer) in enumerate(rows):
        image = folder / "images" / f"{split}{seed}.png"
        image.parent.mkdir(exist_ok=True, parents=True)
        coarse = np.random.default_rng(seed).integers(256, size=(6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC).save(image)
        turns = [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ]
        items.append({"id": i, "image": image.name, "conversations": turns})
    (folder / f"{split}.json").write_text(json.dumps(items))
    return f"llava:{folder / split}.json"


def test_a_planted_test_question_is_found_and_another_split_is_clean(tmp_path, capsys):
    seen = [(i, f"What is number {i}?", "a lung") for i in range(4)]
    trained = load_samples([llava(tmp_path, "train", *seen)], "vqa", "train")
    planted = llava(tmp_path, "planted", (9, "New?", "yes"), (2, "what is Number 2", "A lung."))
    clean = llava(tmp_path, "clean", (7, "New?", "yes"), (8, "What is number 3?", "a lung"))
    folder = checkpoint(tmp_path / "run", seen=trained)
    argv = [str(folder), "--max-new", "1", "--data"]
    found = evaluation.main([*argv, planted])["leaks"]
    assert "LEAK" in capsys.readouterr().out
    assert found["questions_seen"] == 1 and found["first"][0]["id"] == "1"
    found = evaluation.main([*argv, clean])["leaks"]
    assert found["images_seen"] == found["questions_seen"] == 0 and found["pairs_seen"] == 1
    (folder / "seen.safetensors").unlink()  # as of a converted checkpoint
    seal(folder)
    assert evaluation.main([*argv, clean])["leaks"] == {"fingerprint": found["fingerprint"]}
    assert "run has no record of its training data" in capsys.readouterr().out


def test_without_data_the_questions_are_those_of_training_and_given_flags_win(monkeypatch):
    flags = evaluation.EvalConfig(limit=5)
    known = {"data": ("phantoms:8", "llava:x.json"), "lang": "zh", "max_missing": 3, "limit": 2}
    found, samples = evaluation.load_questions(flags, known)
    assert (found.data, found.lang, found.max_missing, found.limit) == (
        ("phantoms:8",), "zh", 3, 5)  # fmt: skip
    assert samples == held_out(5)
    found, samples = evaluation.load_questions(replace(flags, data=("phantoms:9",)), known)
    assert found.lang == "en" and len(samples) == 5
    with pytest.raises(UserError, match="--data SOURCE is needed"):
        evaluation.load_questions(flags, {"data": ("llava:x.json",)})
    for loaded, message in (([], "no questions in its test split"), (samples * 2, "2 times")):
        monkeypatch.setattr(evaluation, "load_samples", lambda *_, x=loaded, **__: x)
        with pytest.raises(UserError, match=message):
            evaluation.load_questions(replace(flags, data=("x",), limit=None), {})


def test_the_majority_baseline_takes_the_train_split_of_the_data_or_the_training_data(
    tmp_path, capsys
):
    spec, flags = llava(tmp_path, "x", (1, "Is it?", "no")), evaluation.EvalConfig()
    train = load_samples(["phantoms:8"], "vqa", "train")
    for data, trained in ((("phantoms:8",), ["phantoms:9"]), ((spec,), ["phantoms:8"])):
        labelled = replace(flags, data=data, router_labels="none.json")
        assert evaluation.training_questions(labelled, trained) == train
    (tmp_path / "test.json").write_text((tmp_path / "x.json").read_text())
    assert evaluation.training_questions(replace(flags, data=(f"llava:{tmp_path}",)), []) == []
    assert "warning: no majority baseline: " in capsys.readouterr().err


def test_text_only_questions_and_too_long_ones(phase3, tmp_path, capsys):
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "no"}]
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"id": 1, "conversations": turns}]))
    argv = [str(phase3), "--data", f"llava:{file}", "--max-new", "1", "--blind"]
    found = evaluation.main(argv)
    assert found["n"] == 1 and [*found["by_modality"]] == ["unknown"] and found["router"]["n"] == 0
    turns[0]["value"] = "word " * 1000
    file.write_text(json.dumps([{"id": 1, "conversations": turns}]))
    with pytest.raises(SystemExit):
        evaluation.main(argv)
    assert "the model reads 512" in capsys.readouterr().err


# Answers without a model


def test_anyones_answers_are_scored_without_a_model(tmp_path, capsys):
    spec = llava(tmp_path, "test", (1, "Is it?", "no"), (2, "What?", "left lung"))
    answers, out = tmp_path / "answers.jsonl", tmp_path / "out.json"
    lines = [{"question_id": 1, "text": "left"}, {"question_id": "0", "text": "abnormal"}]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.main(["--predictions", str(answers), "--data", spec, "--json", str(out)])
    result = json.loads(out.read_text())
    found = result["protocols"]
    assert {name: s["closed_accuracy"] for name, s in found.items()} == {
        "strict": 0.0, "med-moe": 1.0, "llava-med": 1.0}  # fmt: skip
    assert {name: s["open_recall"] for name, s in found.items()} == dict.fromkeys(found, 0.5)
    assert result["leaks"].keys() == {"fingerprint"} and "not checked" in capsys.readouterr().out


def test_two_sets_of_answers_are_compared_from_files_of_either_kind(scored, tmp_path, capsys):
    first, second, samples = str(scored.file), tmp_path / "b.jsonl", held_out(24)
    right = [{"question_id": s.id, "text": s.turns[0][1]} for s in samples]
    second.write_text("".join(json.dumps(line) + "\n" for line in right))
    found = evaluation.main(["--compare", first, str(second)])  # its data and its limit
    given = [scored.result["answers"][s.id] for s in samples]
    gap = 1 - metrics.score(samples, given)["overall"]
    assert gap > 0 and found["overall"]["difference"] == pytest.approx(gap)
    assert found["compared"] == [first, str(second)] and found["data"] == ["phantoms:8"]
    assert found["overall"]["n"] == 24 and "McNemar" in capsys.readouterr().out
    for argv, message in (
        (["--data", "phantoms", "--split", "val"], "another split?"),
        (["--answers", "x"], "only for a checkpoint"),
    ):
        with pytest.raises(SystemExit):
            evaluation.main(["--compare", first, str(second), *argv])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "takes one of: a checkpoint DIR, --predictions FILE, --compare A B"),
        (["runs", "--predictions", "x"], "takes one of"),
        (["--predictions", "x.jsonl"], "--data SOURCE is needed"),
        (["--predictions", "none.jsonl", "--data", "phantoms"], "none.jsonl: No such file"),
        (["--predictions", "x", "--answers", "y"], "only for a checkpoint"),
        (["--predictions", "x", "--record-routes", "y"], "only for a checkpoint"),
        (["--predictions", "x", "--replay-routes", "y"], "only for a checkpoint"),
        (["--predictions", "x.json", "--json", "x.json"], "would be written over another file"),
        (["--compare", "a.json", "b.json"], "a.json: No such file"),
        (["--compare", "a.json", "b.json", "--json", "b.json"], "over another file"),
        (["--compare", "a.json"], "expected 2 arguments"),
        (["runs", "--limit", "0"], "--limit 0: must be at least 1"),
        (["runs", "--max-new", "0"], "--max-new 0: must be at least 1"),
        (["runs", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["runs", "--max-missing", "-1"], "--max-missing -1: must be at least 0"),
        (["runs", "--json", "nowhere/x.json"], "nowhere/x.json: cannot be written there"),
        (["runs", "--answers", "."], ".: cannot be written there"),
        (["nowhere"], "checkpoint nowhere: no such directory"),
    ],
)
def test_a_wrong_call_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
