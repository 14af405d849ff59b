"""Fields are flags; a user's mistake is one line and exit code 2; nothing is overwritten."""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest

import chat
import eval as evaluation
import train
from config import GROUPS, TrainConfig, UserError, argument, flag
from engine import cli
from tests.mini import checkpoint, error_line


@dataclass(frozen=True)
class Flags:
    where: str = argument("a place")
    more: str | None = argument("another place", optional=True)
    data: tuple[str, ...] = flag((), "repeated")
    level: Literal[1, 2] = flag(1, "a number of two", GROUPS[1])
    top_k: int = flag(2, "a number")
    lr: float | None = flag(None, "maybe a number")
    pair: tuple[str, str] | None = flag(None, "two words")
    go: bool = flag(True, "yes or no")
    sure: bool | None = flag(None, "yes, no, or as it comes")


ARGV = ["here", "there", "--data", "a b", "--data", "c", "--level", "2", "--top-k", "3", "--lr",
        "0.001", "--pair", "x", "y", "--no-go", "--no-sure"]  # fmt: skip


def test_fields_are_flags_flags_fields_and_a_command_line_what_differs_from_the_defaults(capsys):
    assert cli.parse(Flags, ["here"], "x") == Flags(where="here", more=None)
    words = {"where": "here", "more": "there"}
    parsed = Flags(("a b", "c"), 2, 3, 0.001, ("x", "y"), False, False, **words)
    assert cli.parse(Flags, ARGV, "x") == parsed
    with pytest.raises(SystemExit):
        cli.parse(Flags, ["--help"], "x.py")
    assert "usage: x.py WHERE [MORE] [flags]" in capsys.readouterr().out
    flags = TrainConfig(data=("a b", "c"), meta=False, resume=True, lr=0.5)
    line = cli.command_line(TrainConfig, asdict(flags), "train.py")
    assert sorted(line.split(" --")) == [
        "data 'a b'", "data c", "lr 0.5", "no-meta", "python train.py", "resume"]  # fmt: skip


@pytest.mark.parametrize(("cls", "argv", "named"), [
    (Flags, "here --top 3", "--top"), (Flags, "", "where"), (Flags, "a b nowhere", "nowhere"),
    (chat.ChatConfig, "x --data 1", "unrecognized arguments: --data"),
    (evaluation.EvalConfig, "x --seed 1", "unrecognized arguments: --seed")])  # fmt: skip
def test_anything_else_even_an_abbreviation_is_refused_by_name(cls, argv, named):
    with pytest.raises(UserError, match=named):
        cli.parse(cls, argv.split(), "x")


@pytest.mark.parametrize(("argv", "named"), [
    ("--preset huge", ["--preset huge", "tiny-stablelm", "phi2"]),
    ("--preset phi2", ["--preset phi2", "--clip DIR"]),
    ("--data mimic:x", ["--data mimic:x", "slake:DIR"]),
    ("--init nowhere", ["nowhere", "no such directory"]),
    ("--router best", ["--router best", "modality", "FILE.py:Class"]),
    ("--router {tmp}/mine.py:Mine", ["mine.py:Mine"]),  # no such class
    ("--top-k 5", ["--top-k 5", "--experts, 4"]), ("--out {tmp}/mine.py/out", ["mine.py/out"]),
    ("--cache-features --jitter", ["--cache-features", "--no-jitter"]),
    ("--phase 2 --preset tiny-stablelm --init {tmp}/mini", ["mini", "--preset tiny-stablelm"]),
])  # fmt: skip
def test_train_names_the_mistake_before_it_trains(argv, named, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1\n")
    checkpoint(tmp_path / "mini", None)
    monkeypatch.setattr(train, "train", None)
    argv = ["--out", tmp_path / "out", *argv.format(tmp=tmp_path).split()]
    line = error_line(capsys, train.main, *argv)
    assert [part for part in named if part not in line] == []


LEAST = {"accumulate": 1, "experts": 0, "save_every": 1, "keep": 1, "batch_size": 1, "steps": 1,
         "router_images": 1, "expert_parallel": 1, "workers": 0, "max_missing": 0, "top_k": 1,
         "lora_rank": 0, "router_noise": 0, "seed": 0, "lr": 0, "epochs": 0,
         "balance": 0}  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_numbers_out_of_their_range_are_refused_by_every_script_in_one_line(name):
    word = f"--{name.replace('_', '-')}"
    assert getattr(cli.parse(TrainConfig, [word, str(LEAST[name])], "x"), name) == LEAST[name]
    is_float = name in ("router_noise", "lr", "epochs", "balance")
    for value in (LEAST[name] - 1, 10**20, *(("nan", "inf") if is_float else ())):
        with pytest.raises(UserError, match=f"^{word} "):
            cli.parse(TrainConfig, [word, str(value)], "x")


@pytest.mark.parametrize("flags", [
    {"json": "/no such folder/x"}, {"weights": "bf16", "dtype": "float32"}, {"epochs": 0},
    {"lora_rank": 129},  # d_model of tiny is 128
    {"lora_rank": 4, "trains": "released"}, {"experts": 0, "lora_rank": 4},
    {"experts": 0, "trains": "released"}, {"start": "fresh", "meta": False},
    {"trains": "released", "moe_layers": "all"}, {"router_noise": 1.1},
    {"trains": "released", "moe_layers": "0,1,2,3"}, {"phase": 2, "moe_layers": "0,9"},
    {"experts": 3, "expert_parallel": 2},
    {"resume": True, "overwrite": True}])  # fmt: skip
def test_flags_that_exclude_each_other_are_refused(flags):
    with pytest.raises(UserError, match=r"^(--|/no such folder)"):
        cli.check_training(TrainConfig(**{"device": "cpu"} | flags))


@pytest.mark.parametrize("script", [evaluation.main, chat.main])
@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_what_is_no_checkpoint_is_refused(script, content, capsys, tmp_path):
    where = tmp_path / "thing"
    if content is not None:
        where.mkdir()
        (where / "config.json").write_text(content)
    assert str(where) in error_line(capsys, script, where)


def test_results_are_written_where_they_can_be_and_over_nothing(tmp_path):
    (tmp_path / "old").write_text("x")
    old, new, gone = (str(tmp_path / name) for name in ("old", "new", "no/new"))
    cli.check_outputs([old, new, None], [None, str(tmp_path / "other")])
    for written, read in (([new, new], []), ([old], [old]), ([gone], []), ([str(tmp_path)], [])):
        with pytest.raises(UserError, match=r"^/"):
            cli.check_outputs(written, read)
    cli.write_json(tmp_path / "new", {"a": 1})
    assert (tmp_path / "new").read_text() == '{\n "a": 1\n}\n'
    with pytest.raises(UserError, match=f"--json {gone}: No such file"):
        cli.write_json(Path(gone), {})
    assert (tmp_path / "old").read_text() == "x"


@pytest.mark.parametrize(("error", "code", "line"), [
    (UserError("two\nlines"), 2, "error: two lines\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (OSError(28, "No space", "file"), 2, "error: file: No space\n"),
    (BrokenPipeError(), 141, "stopped: nobody reads the output any more\n")])  # fmt: skip
def test_every_error_of_a_user_is_one_line(capsys, monkeypatch, error, code, line):
    @cli.user_errors
    def main(argv):
        print("\udcff")  # a file name that is no text
        patch.setattr(os, "dup2", redirected)
        patch.setattr(sys.stdout, "flush", Mock(side_effect=BrokenPipeError))  # as after `| head`
        raise error

    redirected = Mock()
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        main([])
    assert stop.value.code == code and capsys.readouterr().err == line
    assert redirected.call_args.args[1] == 1  # what is still in the buffer goes nowhere
