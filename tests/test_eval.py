"""Scoring a checkpoint, and asking it: python -m pytest tests/test_eval.py"""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import chat
import eval as evaluation  # the script; the builtin keeps its name
import train
from checkpoint import load_model
from config import MODALITIES
from model import Step
from moe import Routing
from sources import Sample, load_samples

EOS = 9


def sample(answer: str, answer_type: str, image: int, kind: str = "side", modality: str = "CT"):
    turns = (("What?", answer),)
    return Sample(str(image), "test", "test", image, turns, modality, answer_type, kind)


def test_a_score_counts_closed_and_open_answers_apart():
    samples = [
        sample("yes", "closed", 1),
        sample("no", "closed", 1),
        sample("upper left", "open", 2),
        sample("CT", "open", 3),
    ]
    result = evaluation.score(samples, ["yes", "normal", "left", "ct"])
    assert result["n"] == 4
    assert result["closed"]["n"] == 2 and result["closed"]["accuracy"] == 0.5
    assert result["open"] | {"ci95": None} == {"n": 2, "recall": 0.75, "exact": 0.5, "ci95": None}
    assert result["overall"] == (1 + 0 + 0.5 + 1) / 4
    assert result["accuracy"] == (1 + 0 + 0 + 1) / 4
    low, high = result["overall_ci95"]
    assert 0 <= low <= result["overall"] <= high <= 1


def test_an_answer_of_no_type_counts_as_open_and_intervals_are_by_image():
    samples = [sample("left", "open", 2), sample("right", "open", 2), sample("axial", "", 2)]
    samples.append(sample("yes", "closed", 2))
    result = evaluation.score(samples, ["left", "left", "axial", "yes"])
    assert result["closed"]["n"] == 1 and result["open"]["n"] == 3
    assert result["open"]["ci95"] == (2 / 3, 2 / 3)  # one image: drawing it again changes nothing
    assert result["closed"]["ci95"] == evaluation.wilson(1, 1)


def test_the_majority_control_sees_the_training_answers_only():
    learnt = [sample(a, "open", i) for i, a in enumerate(["left", "left", "right"])]
    learnt += [sample("yes", "closed", 9, kind="presence")]
    asked = [sample("right", "open", 1), sample("no", "closed", 1, kind="unseen")]
    assert evaluation.majority(asked, learnt) == ["left", "yes"]


def test_unpack_counts_the_visits_of_prompt_and_answer_but_not_of_padding_or_the_end():
    """Two samples, two sparse layers, three experts; the second ends after one token."""
    n_layers, n_experts = 2, 3
    mask = torch.tensor([[True, True, True], [False, True, True]])

    def routing(expert: list[list[int]]) -> Routing:
        gates = torch.nn.functional.one_hot(torch.tensor(expert), n_experts).float()
        return Routing(gates * 0.5, gates * 7)

    prompt = [routing([[0, 1, 1], [2, 2, 0]])] * n_layers
    later = [[routing([[e], [e]])] * n_layers for e in (2, 1)]
    tokens = [torch.tensor(t) for t in ([4, 5], [6, EOS], [EOS, 8])]
    steps = [Step(t, r) for t, r in zip(tokens, [prompt, *later], strict=True)]
    text = SimpleNamespace(eos_id=EOS, decode=lambda ids: " ".join(map(str, ids)))
    first, second = evaluation.unpack(steps, mask, text)
    assert (first.answer, second.answer) == ("4 6", "5")
    assert first.load.tolist() == [[1, 3, 1]] * 2  # 0 1 1, then 2 for "4" and 1 for "6"
    assert second.load.tolist() == [[1, 0, 2]] * 2  # padding's 2 is left out, "5" visits 2
    assert first.votes.tolist() == pytest.approx([14 / 3, 28 / 3, 0])  # per position, two layers
    assert second.votes.tolist() == [7, 0, 7]  # padding's vote for 2 is left out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train.main(["--data", "phantoms:32", "--out", str(out), "--steps", "2", "--batch-size", "8",
                "--no-eval", "--router-labels", "32"])  # fmt: skip
    return out / "phase3"


def test_evaluation_writes_everything_it_measured(checkpoint, tmp_path, capsys):
    file = tmp_path / "scores.json"
    evaluation.main([str(checkpoint), "--limit", "60", "--max-new", "4", "--blind", "--json",
                     str(file)])  # fmt: skip
    result = json.loads(file.read_text())
    assert result["n"] == 60 == result["closed"]["n"] + result["open"]["n"]
    assert {"n", "accuracy", "ci95"} <= result["closed"].keys()
    assert {"n", "recall", "ci95"} <= result["open"].keys()
    assert {"n", "accuracy", "confusion", "f1"} <= result["router"].keys()
    assert {"total", "activated", "dense_base"} <= result["params"].keys()
    n_images = len({s.image for s in load_samples(["phantoms:32"], "vqa", "test")[:60]})
    assert result["router"]["n"] == n_images == sum(map(sum, result["router"]["confusion"]))
    assert sum(part["n"] for part in result["by_modality"].values()) == 60
    assert sum(part["n"] for part in result["by_kind"].values()) == 60
    assert result["blind"]["n"] == result["majority"]["n"] == 60
    asked, learnt = (load_samples(["phantoms:32"], "vqa", split) for split in ("test", "train"))
    fair, cheat = (
        evaluation.score(asked[:60], evaluation.majority(asked[:60], seen))["overall"]
        for seen in (learnt, asked[:60])
    )
    assert result["majority"]["overall"] == fair != cheat
    for layers in result["load"].values():
        assert [pytest.approx(1.0)] * 2 == [sum(layer) for layer in layers]
    said = capsys.readouterr().out
    assert "blind control" in said and "block 2" in said and "of 7 B" in said


def test_answers_do_not_depend_on_the_batch(checkpoint):
    model, text, _ = load_model(checkpoint, torch.device("cpu"))
    samples = load_samples(["phantoms:32"], "vqa", "test")[:10]
    found = []
    for size in (1, 4, 10):
        flags = evaluation.EvalConfig(
            checkpoint=str(checkpoint), batch_size=size, max_new=5, dtype="float32"
        )
        found.append(evaluation.Asker(model, text, flags).answer(samples))
    for other in found[1:]:
        assert [p.answer for p in other] == [p.answer for p in found[0]]
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.load, b.load)


def test_the_blind_control_shows_every_question_the_same_picture(checkpoint):
    model, text, _ = load_model(checkpoint, torch.device("cpu"))
    flags = evaluation.EvalConfig(checkpoint=str(checkpoint), max_new=2, dtype="float32")
    asker = evaluation.Asker(model, text, flags)
    samples = load_samples(["phantoms:32"], "vqa", "test")[:21]
    assert len({s.image for s in samples}) == 3 and len(samples) % 3 == 0
    samples = samples[:20]  # not equally many questions an image
    mean = asker.mean_picture(samples)
    pixels = torch.stack(
        [asker.images.get(s).float() for s in {s.image: s for s in samples}.values()]
    )
    wanted = evaluation.normalise(pixels.mean(0).round()[None])[0]
    torch.testing.assert_close(mean, wanted)
    seen = []
    model.vision.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    asker.answer(samples, mean)
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
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("visits") and MODALITIES[0] in line for line in said)
    assert sum("picture" in line for line in said) == sum("question" in line for line in said) == 2


def test_chat_without_a_question_asks_until_an_empty_line(checkpoint, monkeypatch, capsys):
    typed = iter(["Which modality is this?", "Is it the hand?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    chat.main([str(checkpoint), "--image", "phantom:2000000003", "--max-new", "2"])
    assert capsys.readouterr().out.count("visits") == 2
    assert next(typed, None) is None


def test_the_stream_waits_for_whole_characters(capsys):
    parts = {1: "", 2: "gr", 3: "gr\ufffd", 4: "grün"}
    stream = chat.Stream(SimpleNamespace(decode=lambda ids: " " + parts[len(ids)]))
    for token in range(4):
        stream.add(token)
    assert capsys.readouterr().out == "grün"
