"""Scoring a checkpoint, or anybody's answers, on held-out questions."""

import io
import itertools
import json
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

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

    def routings(*experts: list[int]) -> list[Routing]:
        gates = torch.nn.functional.one_hot(torch.tensor(experts), 3).float()
        return [Routing(gates * 0.5, gates * 7)] * 2

    routed = routings([0, 1, 1], [2, 2, 0]), routings([2], [2]), routings([1], [1])
    tokens = [torch.tensor(t) for t in ([4, 5], [6, EOS], [EOS, 8])]
    steps = [Generated(*step) for step in zip(tokens, routed, strict=True)]
    text = SimpleNamespace(eos_id=EOS, decode=lambda ids: " " + " ".join(map(str, ids)))
    found = evaluation.unpack(steps, mask, text)
    assert [p.answer for p in found] == ["4 6", "5"]
    # 0 1 1, then 2 for "4" and 1 for "6"; padding's 2 is left out, "5" is routed to 2.
    assert [p.load.tolist() for p in found] == [[[1, 3, 1]] * 2, [[1, 0, 2]] * 2]
    votes = [*found[0].votes.tolist(), *found[1].votes.tolist()]  # per position, of two layers
    assert votes == pytest.approx([14 / 3, 28 / 3, 0, 7, 0, 7])
    dense = evaluation.unpack([step._replace(routings=[]) for step in steps], mask, text)
    assert [(p.answer, p.votes.shape, p.load.shape) for p in dense] == [
        (answer, (0,), (0, 0)) for answer in ("4 6", "5")
    ]


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
    rows = [rows for rows, _ in batches]
    assert [len(part) for part in rows] == [4, 4, 3]
    n = [int(n) for part, batch in batches for n in batch.mask.sum(dim=1)[: len(part)]]
    assert n == sorted(n) and n[0] < n[-1] and sorted(itertools.chain(*rows)) == list(range(11))
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
    options, model, text = ("yes", "no", "upper left"), predictor.model, predictor.text
    samples = [replace(s, options=options) for s in held_out(7)]
    expected = torch.zeros(7, 3)
    for (i, s), (j, option) in itertools.product(enumerate(samples), enumerate(options)):
        answered = replace(s, turns=((s.turns[0][0], option),))
        encoded = encode_sample(answered, text, model.config)
        with torch.no_grad():
            expected[i, j] = -model.loss(
                collate([answered], [encoded], predictor.images, text.eos_id)
            ).total
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
    line = evaluation.show_parameters(
        {"total": 8 * 10**9, "activated": 35 * 10**8, "dense_base": 175 * 10**7}
    )
    assert all(part in line for part in ("43.8% of its", "200.0% of the dense", "50.00% of 7"))


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
    result, samples = {**scored.result}, held_out(24)
    found, train = predictor.answer(samples), load_samples(["phantoms:8"], "vqa", "train")
    said = [p.answer for p in found]
    blind = [p.answer for p in predictor.answer(samples, predictor.mean_image(samples))]
    assert said != blind
    wanted = {
        **{name: getattr(evaluation.EvalConfig, name, ()) for name in evaluation.READING},
        "data": ["phantoms:8"], "n": 24, "split": "test", "limit": 24,
        "preset": "tiny", "phase": 3, "seed": 0, "dtype": "torch.float32", "classification": {},
        "checkpoint": str(phase3), "device": "cpu",
        "answers": dict(zip([s.id for s in samples], said, strict=True)),
        "protocols": under_all(samples, said),
        "blind": {"protocols": under_all(samples, blind)},
        "majority": {"protocols": under_all(samples, metrics.majority(samples, train))},
        "by_modality": metrics.split_by(samples, said, lambda s: s.modality),
        "by_kind": metrics.split_by(samples, said, lambda s: f"{s.kind} ({s.answer_type})"),
        "leaks": leaks.check(samples, read_seen(phase3)), "load": expert_load(samples, found),
        "router": judge_router(samples, found),
        "params": evaluation.count_parameters(predictor.model),
        "trained_with": "python train.py --data phantoms:8 --device cpu --dtype float32",
    }  # fmt: skip
    assert result.pop("command").startswith(f"python eval.py {phase3} --limit 24")
    assert result == json.loads(json.dumps(wanted))
    assert len(wanted["by_modality"]) > 1 and len(wanted["by_kind"]) > 1
    assert {row["question_id"]: row["text"] for row in scored.lines} == result["answers"]
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
    options, samples, answers = ("normal", "pneumonia"), held_out(4), ["normal"] * 8
    asked = [replace(s, source="pneumoniamnist", options=options, turns=(("?", options[i % 2]),))
             for i, s in enumerate(samples)]  # fmt: skip
    found = evaluation.classification(predictor, [*samples, *asked], answers)
    likely = predictor.choose(asked).double().numpy()
    assert found == {"pneumoniamnist": evaluation.judge_classes(asked, answers[4:], likely)}
    assert "pneumonia" in capsys.readouterr().out
    assert evaluation.classification(predictor, samples, answers[:4]) == {}


def test_routers_are_replaced_and_routes_are_recorded_and_replayed(phase3, scored, tmp_path):
    file = str(tmp_path / "routes.safetensors")
    argv = [str(phase3), "--limit", "24", "--max-new", "5", "--dtype", "float32"]
    assert evaluation.main([*argv, "--record-routes", file])["load"] == scored.result["load"]
    other = evaluation.main([*argv, "--router", "random", "--router-level", "sequence"])
    assert other["load"] != scored.result["load"]
    replayed = evaluation.main([*argv, "--router", "oracle", "--replay-routes", file])
    assert replayed["answers"] == scored.result["answers"]
    with pytest.raises(SystemExit):
        evaluation.main([str(phase3), "--router", "nowhere.py:Router"])


# Which questions


def llava(folder, *rows):
    """Rows of (question, answer) -> a LLaVA file of text alone."""
    items = [{"id": i, "conversations": [{"from": "human", "value": question},
                                         {"from": "gpt", "value": answer}]}
             for i, (question, answer) in enumerate(rows)]  # fmt: skip
    (folder / "test.json").write_text(json.dumps(items))
    return f"llava:{folder / 'test.json'}"


def test_questions_that_were_seen_in_training_are_reported(tmp_path, capsys):
    folder, samples = checkpoint(tmp_path / "run", seen=held_out(2)), held_out(24)
    argv = [str(folder), "--max-new", "1", "--limit", "24"]
    found = evaluation.main(argv)["leaks"]
    assert found == leaks.check(samples, read_seen(folder)) and found["questions_seen"] == 2
    assert "LEAK" in capsys.readouterr().out
    (folder / "seen.safetensors").unlink()  # as of a converted checkpoint
    seal(folder)
    assert evaluation.main(argv)["leaks"] == {"fingerprint": found["fingerprint"]}
    assert "run has no record of its training data" in capsys.readouterr().out


def test_without_data_the_questions_are_those_of_training_and_given_flags_win(monkeypatch):
    flags = evaluation.EvalConfig(limit=5)
    known = {"data": ("phantoms:8", "llava:x.json"), "lang": "zh", "max_missing": 3, "limit": 2}
    found, samples = evaluation.load_questions(flags, known)
    assert found == replace(flags, data=("phantoms:8",), lang="zh", max_missing=3)
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
    spec, flags = llava(tmp_path, ("Is it?", "no")), evaluation.EvalConfig(router_labels="none")
    train = load_samples(["phantoms:8"], "vqa", "train")
    for data, trained in (("phantoms:8", ["phantoms:9"]), (spec, ["phantoms:8"])):
        assert evaluation.training_questions(replace(flags, data=(data,)), trained) == train
    folder = replace(flags, data=(f"llava:{tmp_path}",))  # a test split alone
    assert evaluation.training_questions(folder, []) == []
    assert "warning: no majority baseline: " in capsys.readouterr().err


def test_text_only_questions_and_too_long_ones(phase3, tmp_path, capsys):
    argv = [str(phase3), "--data", llava(tmp_path, ("Is it?", "no")), "--max-new", "1", "--blind"]
    found = evaluation.main(argv)
    assert found["n"] == 1 and [*found["by_modality"]] == ["unknown"] and found["router"]["n"] == 0
    llava(tmp_path, ("word " * 1000, "no"))
    with pytest.raises(SystemExit):
        evaluation.main(argv)
    assert "the model reads 512" in capsys.readouterr().err


# Answers without a model


def test_anyones_answers_are_scored_without_a_model(tmp_path, capsys):
    spec = llava(tmp_path, ("Is it?", "no"), ("What?", "left lung"))
    answers, out = tmp_path / "answers.jsonl", tmp_path / "out.json"
    lines = [{"question_id": 1, "text": "left"}, {"question_id": "0", "text": "abnormal"}]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.main(["--predictions", str(answers), "--data", spec, "--json", str(out)])
    result = json.loads(out.read_text())
    found = {name: (s["closed_accuracy"], s["open_recall"])
             for name, s in result["protocols"].items()}  # fmt: skip
    assert found == {"strict": (0.0, 0.5), "med-moe": (1.0, 0.5), "llava-med": (1.0, 0.5)}
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
    with pytest.raises(SystemExit):
        evaluation.main(["--compare", first, str(second), "--data", "phantoms", "--split", "val"])
    assert "another split?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [("", "takes one of: a checkpoint DIR, --predictions FILE, --compare A B"),
     ("runs --predictions x", "takes one of"), ("--predictions x.jsonl", "--data SOURCE is needed"),
     ("--predictions none.jsonl --data phantoms", "none.jsonl: No such file"),
     ("--predictions x --answers y", "only for a checkpoint"),
     ("--predictions x --record-routes y", "only for a checkpoint"),
     ("--predictions x --replay-routes y", "only for a checkpoint"),
     ("--compare a b --answers x", "only for a checkpoint"),
     ("--predictions x.json --json x.json", "would be written over another file"),
     ("--compare a.json b.json", "a.json: No such file"),
     ("--compare a.json b.json --json b.json", "over another file"),
     ("runs --limit 0", "--limit 0"), ("runs --max-new 0", "--max-new 0"),
     ("runs --batch-size 0", "--batch-size 0"), ("runs --max-missing -1", "--max-missing -1"),
     ("runs --json nowhere/x.json", "nowhere/x.json"), ("runs --answers .", ".: cannot be written"),
     ("nowhere", "checkpoint nowhere: no such directory")],
)  # fmt: skip
def test_a_wrong_call_is_one_line(argv, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(argv.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error and error.count("\n") == 1
