"""A user's mistake is one clear line and exit code 2: python -m pytest tests/engine/test_cli.py"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import chat
import eval as evaluation
import train
from config import UserError, argument, flag
from engine.cli import parse

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Flags:
    where: str = argument("a place")
    data: tuple[str, ...] = flag((), "repeated")
    kind: Literal["a", "b"] = flag("a", "a choice")
    top_k: int = flag(2, "a number")
    lr: float | None = flag(None, "maybe a number")
    go: bool = flag(True, "yes or no")


def test_fields_are_flags_and_flags_are_fields():
    assert parse(Flags, ["here"], "x") == Flags(where="here")
    argv = ["here", "--data", "a", "--data", "b", "--kind", "b", "--top-k", "3", "--lr", "1e-3"]
    assert parse(Flags, [*argv, "--no-go"], "x") == Flags(
        where="here", data=("a", "b"), kind="b", top_k=3, lr=0.001, go=False
    )


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["here", "--nonsense", "1"], "--nonsense"),
        (["here", "--top", "3"], "--top"),  # no abbreviations
        (["here", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
        (["here", "--kind", "c"], "'a', 'b'"),
        ([], "where"),
        (["here", "there"], "there"),
    ],
)
def test_anything_else_is_refused_by_name(argv, named):
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        parse(Flags, argv, "x")


def fails(capsys, main, *argv: str) -> str:
    """Run main; it must end with code 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--flga", "3"], ["--flga"]),
        (["--phase", "4"], ["--phase", "4"]),
        (["--preset", "huge"], ["--preset huge", "tiny-stablelm", "phi2"]),
        (["--preset", "phi2"], ["--preset phi2", "--clip DIR"]),
        (["--data", "mimic:x"], ["--data mimic:x", "slake:DIR"]),
        (["--data", "slake:nowhere"], ["nowhere"]),
        (["--data", "phantoms:0"], ["phantoms:0"]),
        (["--init", "nowhere"], ["nowhere", "no such directory"]),
        (["--clip", "nowhere"], ["nowhere/config.json"]),
        (["--device", "tpu"], ["--device", "tpu", "'cpu'"]),
        (["--accumulate", "0"], ["--accumulate 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--steps", "-1"], ["--steps -1"]),
        (["--router", "best"], ["--router best", "modality", "FILE.py:Class"]),
        (["--router", "gone.py:Mine"], ["--router gone.py:Mine"]),
        (["--top-k", "5"], ["--top-k 5", "--experts, 4"]),
    ],
)
def test_train_names_the_mistake(argv, named, capsys, tmp_path):
    line = fails(capsys, train.main, "--out", str(tmp_path / "out"), *argv)
    assert named
    for part in named:
        assert part in line


def test_a_router_file_without_the_class_or_with_an_error_is_named(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def x(:\n")
    for spec in ("mine.py:Mine", "broken.py:Mine"):
        where = str(tmp_path / spec)
        assert spec in fails(capsys, train.main, "--out", str(tmp_path / "o"), "--router", where)


def test_a_checkpoint_of_another_preset_is_refused(capsys, tmp_path):
    small = ["--data", "phantoms:8", "--steps", "1", "--batch-size", "4", "--no-eval"]
    train.main(["--phase", "1", "--out", str(tmp_path / "a"), *small])
    init = str(tmp_path / "a" / "phase1")
    line = fails(capsys, train.main, "--phase", "2", "--preset", "tiny-stablelm", "--init", init,
                 "--out", str(tmp_path / "b"), *small)  # fmt: skip
    assert init in line and "--preset tiny-stablelm" in line


def test_data_without_modalities_asks_for_another_router(capsys, tmp_path):
    slake = tmp_path / "rad"
    (slake / "images").mkdir(parents=True)
    from PIL import Image

    Image.new("L", (8, 8)).save(slake / "images" / "x.png")
    record = {"qid": 1, "phrase_type": "freeform", "image_name": "x.png", "image_organ": "HEAD",
              "question": "Is it?", "answer": "yes", "answer_type": "CLOSED",
              "question_type": "PRES"}  # fmt: skip
    (slake / "VQA_RAD Dataset Public.json").write_text(json.dumps([record]))
    line = fails(capsys, train.main, "--data", f"vqa-rad:{slake}", "--out", str(tmp_path / "o"),
                 "--steps", "1", "--no-eval")  # fmt: skip
    assert "--router topk" in line


@pytest.mark.parametrize("script", [evaluation.main, chat.main])
@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 3}'])
def test_what_is_no_checkpoint_is_refused(script, content, capsys, tmp_path):
    where = tmp_path / "thing"
    if content is not None:
        where.mkdir()
        (where / "config.json").write_text(content)
    assert str(where) in fails(capsys, script, str(where))


@pytest.mark.parametrize("image", ["nothing.png", "phantom:x", "."])
def test_chat_names_an_image_it_cannot_open(image, capsys, tmp_path):
    out = tmp_path / "a"
    train.main(["--phase", "1", "--out", str(out), "--data", "phantoms:8", "--steps", "1",
                "--batch-size", "4", "--no-eval"])  # fmt: skip
    capsys.readouterr()
    argv = (str(out / "phase1"), "--image", image, "--question", "What?")
    assert image in fails(capsys, chat.main, *argv)


@pytest.mark.parametrize(
    "argv", [("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "2")]
)
def test_chat_names_a_setting_that_cannot_be(argv, capsys):
    assert " ".join(argv[:1]) in fails(capsys, chat.main, "x", *argv)


def test_a_place_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert out in fails(capsys, train.main, "--out", out, "--data", "phantoms:8")


def test_the_program_itself_prints_one_line_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "train.py", "--preset", "huge"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --preset huge")


@pytest.mark.parametrize("script", ["train.py", "eval.py", "chat.py"])
def test_help_lists_the_flags(script):
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--device" in done.stdout and "--seed" in done.stdout
