"""Scoring a checkpoint, or anybody's answers, on held-out questions."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation  # the script; the builtin keeps its name
import metrics
from checkpoint import load_model, read_seen
from config import UserError
from data import Packed, Sample, collate, encode_prompt, encode_sample
from engine.durable import seal
from engine.experts import facts_by_expert
from engine.processes import Processes
from model import Generated, count_parameters, generate
from routers import Routing
from scoring import leaks
from scoring.compare import under_all
from scoring.router import expert_load, judge_router
from sources.images import Images
from sources.load import load_samples
from tests.mini import checkpoint, error_line
from tests.sources import written

CPU, EOS = torch.device("cpu"), 9


def test_unpack_counts_routed_tokens_of_prompt_and_answer_but_not_of_padding_or_the_end():
    mask = torch.tensor([[False, True, True], [True, True, True]])

    def routings(*experts):
        gates = torch.nn.functional.one_hot(torch.tensor(experts), 3).float()
        return [Routing(gates * 0.5, gates * 7)] * 2

    routed = routings([2, 2, 0], [0, 1, 1]), routings([2], [2]), routings([1], [1])
    tokens = [torch.tensor(t) for t in ([5, 4], [EOS, 6], [8, EOS])]
    steps = [Generated(*step) for step in zip(tokens, routed, strict=True)]
    text = SimpleNamespace(eos_id=EOS, decode=lambda ids: " " + " ".join(map(str, ids)))
    found = evaluation.unpack(steps, mask, text)
    assert [p.answer for p in found] == ["5", "4 6"]
    # 0 1 1, then 2 for "4" and 1 for "6"; padding's 2 is left out, "5" is routed to 2.
    assert [p.load.tolist() for p in found] == [[[1, 0, 2]] * 2, [[1, 3, 1]] * 2]
    votes = [*found[0].votes.tolist(), *found[1].votes.tolist()]  # per position, of two layers
    assert votes == pytest.approx([7, 0, 7, 14 / 3, 28 / 3, 0])


@pytest.fixture
def predictor(phase3):
    model, text, _ = load_model(phase3, CPU)
    return evaluation.Predictor(model, text, CPU, torch.float32, batch_size=4, max_new=5)


def held_out(n):
    return load_samples(["phantoms:8"], "vqa", "test")[:n]


def test_batches_are_of_similar_lengths_and_shared_among_processes(predictor):
    samples = held_out(11)
    rows, batches = zip(*predictor.batches(samples, "x"), strict=True)
    assert [len(part) for part in rows] == [4, 4, 3]
    n = [int(n) for batch in batches for n in batch.mask.sum(dim=1)]
    assert n == sorted(n) and n[0] < n[-1] and sorted(itertools.chain(*rows)) == list(range(11))
    predictor.processes = Processes(1, 2)
    assert [part for part, _ in predictor.batches(samples, "x")] == [rows[1]]
    predictor.processes = Processes(3, 4)  # of 3 batches it gets none
    assert [*predictor.batches(samples, "x")] == []


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
    name, options = "pneumoniamnist", ("normal", "pneumonia")
    samples = [replace(s, source=name, options=options, turns=((s.turns[0][0], options[i % 2]),))
               for i, s in enumerate(held_out(7))]  # fmt: skip
    text, model, expected = predictor.text, predictor.model, torch.zeros(7, 2)
    for (i, s), (j, option) in itertools.product(enumerate(samples), enumerate(options)):
        answered = replace(s, turns=((s.turns[0][0], option),))
        encoded = encode_sample(answered, text, model.config)
        batch = collate([answered], [encoded], predictor.images, text.eos_id)
        with torch.no_grad():
            expected[i, j] = -model.loss(batch).total
    likely = predictor.choose(samples)
    torch.testing.assert_close(likely, expected.softmax(dim=1), atol=1e-4, rtol=0)
    judged = evaluation.judge_classes(samples, ["normal"] * 7, likely.double().numpy())
    found = evaluation.classification(predictor, [*held_out(2), *samples], ["normal"] * 9)
    assert found == {name: judged}


def test_blind_every_question_has_the_mean_of_the_different_images(predictor):
    samples, seen = [*held_out(21)[:3], held_out(21)[-1], replace(held_out(1)[0], image=None)], []
    images = {s.image: s for s in samples[:4]}.values()
    assert len(images) == 2  # three questions on one of them
    mean = predictor.mean_image(samples)
    pixels = [predictor.images.get(s).double() for s in images]
    torch.testing.assert_close(mean, evaluation.normalise(sum(pixels).div(2).round()[None])[0])
    predictor.model.vision.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    predictor.answer(samples, mean)
    assert torch.equal(torch.cat(seen), mean.expand(4, -1, -1, -1))


@pytest.fixture(scope="module")
def scored(phase3):
    """One evaluation: what it wrote as JSON and as JSONL."""
    file, answers = phase3.parent / "scores.json", phase3.parent / "answers.jsonl"
    evaluation.main([str(phase3), "--limit", "24", "--max-new", "5", "--dtype", "float32",
                     "--blind", "--json", str(file), "--answers", str(answers)])  # fmt: skip
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    return SimpleNamespace(file=file, lines=lines, result=json.loads(file.read_text()))


def test_evaluation_writes_everything_it_measured(phase3, predictor, scored):
    result, samples = {**scored.result}, held_out(24)
    found, train = predictor.answer(samples), load_samples(["phantoms:8"], "vqa", "train")
    said = [p.answer for p in found]
    blind = [p.answer for p in predictor.answer(samples, predictor.mean_image(samples))]
    assert said != blind
    wanted = {
        "data": ["phantoms:8"], "n": 24, "split": "test", "limit": 24, "device": "cpu",
        "preset": "tiny", "phase": 3, "seed": 0, "dtype": "torch.float32", "classification": {},
        "checkpoint": str(phase3), "answers": dict(zip([s.id for s in samples], said, strict=True)),
        "protocols": under_all(samples, said), "blind": {"protocols": under_all(samples, blind)},
        "majority": {"protocols": under_all(samples, metrics.majority(samples, train))},
        "by_modality": metrics.split_by(samples, said, lambda s: s.modality),
        "by_kind": metrics.split_by(samples, said, lambda s: f"{s.kind} ({s.answer_type})"),
        "by_wording": metrics.split_by(samples, said, lambda s: f"{s.wording} wordings"),
        "facts": facts_by_expert(predictor, samples, said, blind),
        "leaks": leaks.check(samples, read_seen(phase3)), "load": expert_load(samples, found),
        "router": judge_router(samples, found), "params": count_parameters(predictor.model),
        "trained_with": "python train.py --data phantoms:8 --device cpu --dtype float32",
    }  # fmt: skip
    assert result.keys() == wanted.keys() | {*evaluation.READING, "command"}
    assert {name: result[name] for name in wanted} == json.loads(json.dumps(wanted))
    assert {row["question_id"]: row["text"] for row in scored.lines} == result["answers"]


def llava(folder, *rows):
    """Rows of (question, answer) -> a LLaVA file of text alone."""
    items = [written.llava_item(i, *row, image=None) for i, row in enumerate(rows)]
    return written.llava(folder, *items)


def test_without_data_the_questions_are_those_of_training_and_given_flags_win(tmp_path):
    flags = evaluation.EvalConfig(limit=5)
    known = {"data": ("phantoms:8", "llava:x.json"), "lang": "zh", "max_missing": 3, "limit": 2}
    found, samples = evaluation.load_questions(flags, known)
    assert found == replace(flags, data=("phantoms:8",), lang="zh", max_missing=3)
    assert samples == held_out(5)
    other, known = replace(flags, data=("phantoms:9",)), known | {"window": "lung"}
    found, samples = evaluation.load_questions(other, known)
    assert (found.lang, found.window) == ("en", "lung") and len(samples) == 5
    other = replace(other, window="brain")
    assert evaluation.load_questions(other, known)[0].window == "brain"
    with pytest.raises(UserError, match="--data SOURCE is needed"):
        evaluation.load_questions(flags, {"data": ("llava:x.json",)})
    flags = replace(flags, data=(llava(tmp_path, ("Is it?", "no")),), router_labels="none")
    train = load_samples(["phantoms:8"], "vqa", "train")  # for the majority baseline
    assert evaluation.training_questions(flags, ["phantoms:8"]) == train


def test_a_dense_model_without_a_record_of_its_data_answers_text_alone(tmp_path, capsys):
    folder = checkpoint(tmp_path / "x", None)
    (folder / "seen.safetensors").unlink()  # as of a converted checkpoint
    seal(folder)
    argv = [str(folder), "--max-new", "1", "--blind", "--data"]
    found = evaluation.main([*argv, llava(tmp_path, ("Is it?", "no"))])
    assert found["n"] == 1 and [*found["by_modality"]] == ["unknown"] and "router" not in found
    assert found["leaks"].keys() == {"fingerprint"}
    line = error_line(capsys, evaluation.main, *argv, llava(tmp_path, ("word " * 1000, "no")))
    assert "the model reads 512); --max-bad 1 counts them as wrong" in line
    both = llava(tmp_path, ("word " * 1000, "no"), ("Is it?", "no"))
    answers = evaluation.main([*argv, both, "--max-bad", "1"])["answers"]
    assert answers["0"] == "" != answers["1"]


def test_anyones_answers_are_scored_without_a_model(tmp_path):
    spec = llava(tmp_path, ("Is it?", "no"), ("What?", "left lung"))
    answers, out = tmp_path / "answers.jsonl", tmp_path / "out.json"
    lines = [{"question_id": 1, "text": "left"}, {"question_id": "0", "text": "abnormal"}]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.main(["--predictions", str(answers), "--data", spec, "--json", str(out)])
    result = json.loads(out.read_text())
    found = {name: (s["closed_accuracy"], s["open_recall"])
             for name, s in result["protocols"].items()}  # fmt: skip
    assert found == {"strict": (0.0, 0.5), "med-moe": (1.0, 0.5), "llava-med": (1.0, 0.5)}
    assert result["leaks"].keys() == {"fingerprint"}


def test_two_sets_of_answers_are_compared_from_files_of_either_kind(scored, tmp_path):
    first, second, samples = str(scored.file), tmp_path / "b.jsonl", held_out(24)
    right = [{"question_id": s.id, "text": s.turns[0][1]} for s in samples]
    second.write_text("".join(json.dumps(line) + "\n" for line in right))
    found = evaluation.main(["--compare", first, str(second)])  # its data and its limit
    given = [scored.result["answers"][s.id] for s in samples]
    gap = 1 - metrics.score(samples, given)["overall"]
    assert gap > 0 and found["overall"]["difference"] == pytest.approx(gap)
    assert found["overall"]["n"] == 24 and found["data"] == ["phantoms:8"]


def test_three_examples_are_shown_and_a_command_that_asks_the_last_again(capsys, tmp_path):
    packed = Packed(tmp_path / "p.npz", "test", 3)
    for image, name, asked in (
        (7, "phantom:7", "--image phantom:7"), (None, "none", "--image none"),
        (packed, "p.npz test 3", ""), (Path("a b"), "a b", "--image 'a b'")):  # fmt: skip
        samples = [Sample("1", "x", "test", image, (("Is it?", "no"),))]
        flags = evaluation.EvalConfig(checkpoint="my runs/phase3", router="r.py:A")
        evaluation.show_examples(samples, ["yes"], flags)
        shown = f"{name}: Is it?\n  answer: yes\n  truth:  no\n"
        again = (
            f"try it: python chat.py 'my runs/phase3' {asked} --router r.py:A --question 'Is it?'\n"
        )
        assert capsys.readouterr().out == shown + (again if asked else "")
    samples = [Sample(str(i), "x", "test", i // 2, (("Q", "a" * (i + 1)),)) for i in range(12)]
    evaluation.show_examples(samples, ["yes"] * 12, evaluation.EvalConfig())
    truths = [s.split()[1] for s in capsys.readouterr().out.split("\n") if "truth" in s]
    assert [len(truth) for truth in truths] == [10, 6, 2]  # of three images, the longest of each


@pytest.mark.parametrize(("argv", "named"), [
    ("runs --predictions x", "takes one of"), ("runs --limit 0", "--limit 0"),
    ("--predictions none.jsonl --data phantoms", "none.jsonl: No such file"),
    ("--predictions x --replay-routes y", "--replay-routes: only for a checkpoint"),
    ("--compare a b --blind", "--blind: only for"), ("--predictions x --max-new 9", "--max-new: o"),
    ("--compare a.json b.json --json b.json", "over another file"),
    ("nowhere", "checkpoint nowhere: no such directory")])  # fmt: skip
def test_a_wrong_call_is_one_line(argv, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(argv.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error and error.count("\n") == 1
