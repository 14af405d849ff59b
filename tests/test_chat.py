"""Asking a checkpoint: the answer as it is generated, and the experts it was routed to."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import chat
from checkpoint import load_model
from config import MoEConfig
from data import IMAGE_ID, collate, encode_prompt
from model import Generated, generate
from routers import Routing
from sources.images import Images
from tests.mini import checkpoint


@pytest.fixture(scope="module")
def phase3(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("mini") / "phase3")


def generated(folder, image, pad=True, *how):
    """The answer to "Which side?", by generate() itself."""
    model, text, _ = load_model(folder, torch.device("cpu"))
    encoded = encode_prompt("Which side?", image is not None, text, model.config)
    samples = [chat.as_sample(image and str(image), "")]
    batch = collate(samples, [encoded], Images(32, pad=pad), text.eos_id, "left")
    steps = list(generate(model, batch, text.eos_id, 7, *how))
    return text.decode(int(s.tokens[0]) for s in steps).lstrip()


def asked(capsys, folder, image, *argv):
    where = ["--image", str(image)] if image else []
    chat.main([str(folder), *where, "--question", "Which side?", "--max-new", "7",
               "--dtype", "float32", *argv])  # fmt: skip
    return capsys.readouterr().out


def test_it_prints_the_likeliest_answer_and_the_experts_of_tokens(phase3, capsys, tmp_path):
    image = tmp_path / "x.png"
    Image.effect_noise((60, 30), 90).save(image)
    answer, *lines = asked(capsys, phase3, image).split("\n")
    assert answer == generated(phase3, image) != generated(phase3, image, pad=False) and answer
    assert lines[:2] == ["", "experts                  CT      MRI    X-ray  patholo"]
    assert len(lines) == 2 + 4 + 6 + 1  # no routing of the last token: nothing follows it


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
    for router, name in (("oracle", " pathol"), ("topk", "e3")):
        folder = checkpoint(tmp_path / router, MoEConfig(router=router, n_experts=5))
        table = asked(capsys, folder, None).split("\n\n")[1].splitlines()[0]
        assert name in table and table.endswith("e4")


def test_the_table_counts_the_experts_of_tokens_block_by_block(capsys):
    ids = torch.tensor([[1, IMAGE_ID, IMAGE_ID, 2]])
    gates = torch.tensor([[[0.5, 0.5, 0], [0, 1, 0], [0.2, 0.8, 0], [0, 0, 0.7]]])
    first = [Routing(gates, None), Routing(0 * gates, None)]
    later = [Routing(torch.tensor([[[0.1, 0, 0.2]]]), None)] * 2
    steps = [Generated(torch.tensor([i]), r) for i, r in ((0, first), (9, later))]
    text = SimpleNamespace(decode=lambda ids: f"w{ids[0]}")
    chat.show_routes(steps, SimpleNamespace(ids=ids), text, ["a", "b", "c"], [4, 6])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "experts                   a        b        c",
        "  block 4  image      33.3%    66.7%     0.0%",
        "  block 4  question   33.3%    33.3%    33.3%",
        "  block 6  image       0.0%     0.0%     0.0%",
        "  block 6  question    0.0%     0.0%     0.0%",
        "  answer 'w0'           block 4: a+c  block 6: a+c",
    ]


def test_without_a_question_it_asks_until_an_empty_line(phase3, monkeypatch, capsys):
    typed = Mock(side_effect=["Which?", "Is it the hand?", " ", "unread"])
    monkeypatch.setattr("builtins.input", typed)
    chat.main([str(phase3), "--image", "phantom:2000000003", "--max-new", "2"])
    found = capsys.readouterr()
    assert found.out.count("\nexperts ") == 2 and "Not a medical device" in found.err
    assert typed.call_count == 3


def test_the_stream_waits_for_whole_characters(capsys):
    parts, shown = ("", "", "gr", "gr\ufffd", "grün", "grün  e"), []
    stream = chat.Stream(SimpleNamespace(decode=lambda ids: " " + parts[len(ids)]))
    for token in range(5):
        stream.add(token)
        shown.append(capsys.readouterr().out)
    assert shown == ["", "gr", "", "ün", "  e"]


@pytest.mark.parametrize("argv", ["--temperature nan", "--top-p 0", "--image phantom:x"])
def test_a_setting_that_cannot_be_is_one_line(phase3, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(phase3), "--question", "Q?", *argv.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and argv.split()[0] in error and error.count("\n") == 1
