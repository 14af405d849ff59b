"""Asking a checkpoint: the answer as it is generated, a conversation, and its commands."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import chat
from checkpoint import load_model
from config import MoEConfig, warn_once
from data import Sample, collate, encode_prompt, encode_sample
from engine import familiar
from model import generate
from sources import signs
from sources.images import Images
from sources.phantoms import draw
from sources.questions import about_image, about_signs
from tests.mini import checkpoint


def generated(folder, image, pad=True, *how):
    """The answer to "Which side?", by generate() itself."""
    model, text, _ = load_model(folder, torch.device("cpu"))
    encoded = encode_prompt("Which side?", image is not None, text, model.config)
    samples = [Sample("", "", "", image, ())]
    batch = collate(samples, [encoded], Images(32, pad=pad), text.eos_id, "left")
    steps = list(generate(model, batch, text.eos_id, 7, *how))
    return text.decode(int(s.tokens[0]) for s in steps).lstrip()


def asked(capsys, folder, image, *argv):
    chat.main([str(folder), "--image", str(image or "none"), "--question", "Which side?",
               "--max-new", "7", "--dtype", "float32", *argv])  # fmt: skip
    return capsys.readouterr().out


def test_it_prints_the_likeliest_answer_and_the_experts_of_tokens(phase3, capsys, tmp_path):
    image = tmp_path / "x.png"
    Image.effect_noise((60, 30), 90).save(image)
    answer, *lines = asked(capsys, phase3, image).split("\n")
    assert answer == generated(phase3, image) != generated(phase3, image, pad=False) and answer
    assert lines[:2] == ["", "experts                  CT      MRI    X-ray  pathology"]
    assert len(lines) == 2 + 4 + 6 + 1  # no routing of the last token: nothing follows it
    answer, _, _, *rows = asked(capsys, phase3, image, "--expert", "2").split("\n")
    assert answer != generated(phase3, image) and all(" 0.0%   100.0%  " in x for x in rows[:4])
    assert len(rows) > 5 and all(x.endswith("block 0: X-ray  block 2: X-ray") for x in rows[4:-1])


def test_sampled_answers_follow_seed_temperature_and_top_p(phase3, capsys):
    def sampled(seed, *how):
        return generated(phase3, None, True, *how, torch.Generator().manual_seed(seed))

    argv = ("--temperature", "1.5", "--top-p", "0.9")
    for seed in (0, 1):
        answer = sampled(seed, 1.5, 0.9)
        assert asked(capsys, phase3, None, *argv, "--seed", str(seed)).startswith(answer + "\n")
    assert len({answer, sampled(0, 1.5, 0.9), sampled(1, 1.5, 0.5), sampled(1, 0.5, 0.9)}) == 4


def test_only_experts_that_were_trained_for_modalities_have_their_names(tmp_path, capsys):
    dense = checkpoint(tmp_path / "dense", None)
    assert asked(capsys, dense, None) == generated(dense, None) + "\n"
    for router, names in (("oracle", "  pathology  expert 4\n"), ("topk", "expert 3  expert 4\n")):
        folder = checkpoint(tmp_path / router, MoEConfig(router=router, n_experts=5))
        assert names in (out := asked(capsys, folder, None)) and " image " not in out


@pytest.fixture
def talk(phase3, monkeypatch, capsys):
    """Type lines -> the session's output and messages; each question's prompt and answer."""
    text = load_model(phase3, torch.device("cpu"))[1]

    def session(*lines, max_new=2):
        asked, typed = [], Mock(side_effect=[*lines, " " if max_new == 2 else "/quit", "unread"])

        def kept(model, batch, *how):
            steps = list(generate(model, batch, *how))
            answer = text.decode(int(step.tokens[0]) for step in steps).strip()
            asked.append((batch.ids[0].tolist(), answer))
            return steps

        monkeypatch.setattr(chat, "generate", kept)
        monkeypatch.setattr("builtins.input", typed)
        chat.main([str(phase3), "--max-new", str(max_new)])
        assert typed.call_count == len(lines) + 1  # an empty line, or /quit, ends
        return *capsys.readouterr(), asked

    return session


@pytest.mark.parametrize(("lines", "max_new", "kept", "forgotten"), [
    (["Q0", "Q1", "Q2", "Q3"], 2, [0, 1, 2], []), (["Q0", "/reset", "Q1"], 2, [], []),
    (["Q0", "Q1", "Q2", "Q3", "Q4"], 2, [1, 2, 3], ["Q0"]),
    (["Q0", "left " * 380, "Q2"], 60, [], ["Q0", "left"]),
    (["Q0", "/image phantom:7", "Q1"], 2, [], [])])  # fmt: skip
def test_a_question_follows_others_as_in_phase_2(phase3, talk, lines, max_new, kept, forgotten):
    model, text, _ = load_model(phase3, torch.device("cpu"))
    _, messages, asked = talk(*lines, max_new=max_new)
    turns = [(line.strip(), asked[i][1]) for i, line in enumerate(lines) if i in kept]
    dialogue = Sample("", "", "", 1, (*turns, (lines[-1], "x")))
    ids, _ = encode_sample(dialogue, text, model.config)
    assert asked[-1][0] == ids[: -len([*text.encode(" x"), text.eos_id])]
    assert messages.count("forgotten: ") == len(forgotten)
    assert all(f"forgotten: '{question}" in messages for question in forgotten)


def test_commands_change_the_image_show_it_and_help(talk, tmp_path):
    image, file, own = tmp_path / "x.png", tmp_path / "routes.png", draw(2000000004)
    Image.effect_noise((60, 30), 90).save(image)
    examples = about_image(own) + about_signs(own, signs.known(8), 4)
    question = examples[0]
    out, messages, asked = talk(
        "/help", "/save a.png", question.question.lower(), f"/save {file}",
        "/image phantom:2000000003", "Is it?", f"/image {image}", "Is it?", f"/save {image}",
        "/save a.jpg", "/image no.png", "/image phantom:x", "/image none", "Is it?", "/save a.png",
        "/save", "/what")  # fmt: skip
    assert "/image FILE" in out and all(f"\n{q.question}\n" in out for q in examples)
    caption = f"{question.answer}; a CT of the head with three large infarcts in the lower left"
    assert f"\ntruth: {caption}\n" in out and out.count("truth: ") == 2
    assert "\ntruth: an MRI of the brain with no abnormality\n" in out
    first, disclaimer, *messages = messages.splitlines()
    assert "phantom:2000000004" in first and "Not a medical device" in disclaimer
    wanted = ["a.png: nothing", f"saved {file}", "is phantom:2000000003.", f"is {image}.",
              f"{image}: would be", "a.jpg: must", "no.png: no", "--image phantom:x", "is none.",
              "a.png: nothing", "/save: needs", "/what: no such"]  # fmt: skip
    assert all(w in m for w, m in zip(wanted, messages, strict=True))
    sizes = [sum(i < 0 for i in ids) for ids, _ in asked]
    assert sizes == [4, 4, 4, 0] and Image.open(file).width == 1040


def test_other_data_has_no_default_image_and_examples_of_its_own(monkeypatch, talk):
    def of_other_data(*how):
        model, text, info = load_model(*how)
        return model, text, info | {"flags": {"data": ["slake:DIR"]}, "questions": ["Which\x1b?"]}

    monkeypatch.setattr(chat, "load_model", of_other_data)
    out, messages, asked = talk("/help", "Which?")
    assert "\nWhich ?\n" in out and "The image is none" in messages and "truth" not in out
    assert asked[0][0] and min(asked[0][0]) >= 0


def test_an_image_unlike_those_of_training_is_called_that(phase3, monkeypatch, capsys, tmp_path):
    warn_once.cache_clear()
    known, file = familiar.fit(torch.randn(40, 32), torch.randn(40, 32)), tmp_path / "a.png"
    for limit, count in ((0.0, 1), (1e9, 0)):
        read = lambda folder, limit=limit: known | {"limit": torch.tensor(limit)}  # noqa: E731
        monkeypatch.setattr(familiar, "read", read)
        argv = ["--question", "left " * 470, "--max-new", "600", "--save", str(file)]
        chat.main([str(phase3), "--image", "phantom:1", *argv])
        out, error = capsys.readouterr()
        assert out.count("\n  answer ") == 8 and out.endswith(" more tokens\n")
        assert error.count("unlike the images that the model was trained on") == count
        assert file.is_file() and "Not a medical device" in error
        assert ("--max-new 600: the model reads 512" in error) == count  # once


def test_the_stream_waits_for_whole_characters(capsys):
    parts, shown = ("", "", "gr", "gr\ufffd", "grün", "grün  e"), []
    stream = chat.Stream(SimpleNamespace(decode=lambda ids: " " + parts[len(ids)]))
    for token in range(5):
        stream.add(token)
        shown.append(capsys.readouterr().out)
    assert shown == ["", "gr", "", "ün", "  e"]


@pytest.mark.parametrize("argv", ["--temperature 0.001", "--top-p 0", "--image phantom:x",
                                  "--question ", "--question /help", "--save a.jpg",
                                  "--expert 4"])  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(phase3, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(phase3), "--question", "Q?", *argv.split(" ")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and argv.split()[0] in error and error.count("\n") == 1
