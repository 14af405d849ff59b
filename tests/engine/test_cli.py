"""Fields are flags; a user's mistake is one line and exit code 2; nothing is overwritten."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import chat
import eval as evaluation
import train
from config import GROUPS, TrainConfig, UserError, argument, flag
from engine import cli
from tests.mini import checkpoint

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Flags:
    where: str = argument("a place")
    more: str | None = argument("another place", optional=True)
    data: tuple[str, ...] = flag((), "repeated")
    kind: Literal["a", "b"] = flag("a", "a choice", GROUPS[1])
    level: Literal[1, 2] = flag(1, "a number of two")
    top_k: int = flag(2, "a number")
    lr: float | None = flag(None, "maybe a number")
    pair: tuple[str, str] | None = flag(None, "two words")
    go: bool = flag(True, "yes or no")
    sure: bool | None = flag(None, "yes, no, or as it comes")


@dataclass(frozen=True)
class Several:
    files: tuple[str, ...] = argument("one or more")


ARGV = ["here", "there", "--data", "a b", "--data", "c", "--kind", "b", "--level", "2", "--top-k",
        "3", "--lr", "0.001", "--pair", "x", "y", "--no-go", "--no-sure"]  # fmt: skip
PARSED = {"where": "here", "more": "there", "data": ("a b", "c"), "kind": "b", "level": 2,
          "top_k": 3, "lr": 0.001, "pair": ("x", "y"), "go": False, "sure": False}  # fmt: skip


def test_fields_are_flags_and_flags_are_fields(capsys):
    assert cli.parse(Flags, ["here"], "x") == Flags(where="here", more=None)
    assert cli.parse(Flags, ARGV, "x") == Flags(**PARSED)
    assert cli.parse(Several, ["a", "b"], "x") == Several(files=("a", "b"))
    with pytest.raises(SystemExit) as stop:
        cli.parse(Flags, ["--help"], "x.py")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: x.py WHERE [MORE] [flags]" in printed
    assert f"{GROUPS[1]}:" in printed and all(f"--{n} {m}" in printed for n, m in [
        ("top-k", "K"), ("kind", "{a,b}"), ("data", "DATA"), ("pair", "PAIR PAIR")])  # fmt: skip
    assert printed.index("--sure") < printed.index("--kind")  # groups in the order of GROUPS


@pytest.mark.parametrize(("argv", "named"), [
    (["here", "--nonsense", "1"], "--nonsense"),
    (["here", "--top", "3"], "--top"),  # no abbreviations
    (["here", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
    (["here", "--kind", "c"], "'a', 'b'"),
    ([], "where"),
    (["here", "there", "nowhere"], "nowhere"),
])  # fmt: skip
def test_anything_else_is_refused_by_name(argv, named):
    with pytest.raises(UserError, match=named):
        cli.parse(Flags, argv, "x")


def test_a_command_line_says_what_differs_from_the_defaults():
    assert cli.command_line(TrainConfig, {}, "train.py") == "python train.py"
    values = {f.name: f.default for f in fields(TrainConfig)}
    values |= {"data": ["a b", "c"], "meta": False, "resume": True, "lr": 0.5, "seed": 0}
    line = cli.command_line(TrainConfig, values, "train.py")
    assert sorted(line.split(" --")[1:]) == ["data 'a b'", "data c", "lr 0.5", "no-meta", "resume"]


@pytest.mark.parametrize(("argv", "named"), [
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
    (["--router", "best"], ["--router best", "modality", "FILE.py:Class"]),
    (["--router", "gone.py:Mine"], ["--router gone.py:Mine"]),
    (["--router", "{tmp}/mine.py:Mine"], ["mine.py:Mine"]),
    (["--router", "{tmp}/broken.py:Mine"], ["broken.py:Mine"]),
    (["--top-k", "5"], ["--top-k 5", "--experts, 4"]),
    (["--out", "{tmp}/mine.py/out"], ["mine.py/out"]),
    (["--out", "/sys"], ["/sys"]),  # read-only, even to root
    (["--phase", "2", "--preset", "tiny-stablelm", "--init", "{tmp}/mini"],
     ["mini", "--preset tiny-stablelm"]),
])  # fmt: skip
def test_train_names_the_mistake_before_it_trains(argv, named, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def x(:\n")
    checkpoint(tmp_path / "mini", None)
    monkeypatch.setattr(train, "train", None)
    argv = [word.format(tmp=tmp_path) for word in ("--out", "{tmp}/out", *argv)]
    line = fails(capsys, train.main, *argv)
    assert [part for part in named if part not in line] == []


def fails(capsys, main, *argv: str) -> str:
    """Run main; it must end with code 2 and one line of an error, which is returned."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.parametrize(("flags", "is_refused"), [
    *[({name: least - 1}, True) for name, least in {
        "accumulate": 1, "experts": 0, "save_every": 1, "keep": 1, "batch_size": 1, "steps": 1,
        "router_images": 1, "expert_parallel": 1, "workers": 0, "max_missing": 0}.items()],
    ({"accumulate": 1, "experts": 0, "save_every": 1, "keep": 1, "batch_size": 1, "steps": 1,
      "router_images": 1, "expert_parallel": 1, "workers": 0, "max_missing": 0}, False),
    ({"json": "/no such folder/x"}, True), ({"json": "x"}, False),
    ({"weights": "bf16", "dtype": "float32"}, True),
    ({"weights": "bf16", "dtype": "bfloat16"}, False),
    ({"lora_rank": -1}, True), ({"lora_rank": 1}, False),
    ({"lora_rank": 128}, False), ({"lora_rank": 129}, True),  # d_model of tiny
    ({"lora_rank": 4, "trains": "released"}, True),
    ({"experts": 0, "lora_rank": 4}, True), ({"experts": 0, "trains": "released"}, True),
    ({"trains": "released"}, False),
    ({"start": "fresh"}, False), ({"start": "fresh", "meta": False}, True),
    ({"meta": False}, False),
    ({"trains": "released", "moe_layers": "all"}, True), ({"moe_layers": "all"}, False),
    ({"router_noise": -0.1}, True), ({"router_noise": 1.1}, True),
    ({"router_noise": 1.0}, False), ({"router_noise": 0.0}, False),
])  # fmt: skip
def test_numbers_out_of_range_and_flags_that_exclude_each_other_are_refused(flags, is_refused):
    flags = TrainConfig(**{"device": "cpu"} | flags)
    if not is_refused:
        return cli.check_training(flags)
    with pytest.raises(UserError, match=r"^(--|/no such folder)"):
        cli.check_training(flags)


@pytest.mark.parametrize("script", [evaluation.main, chat.main])
@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 3}'])
def test_what_is_no_checkpoint_is_refused(script, content, capsys, tmp_path):
    where = tmp_path / "thing"
    if content is not None:
        where.mkdir()
        (where / "config.json").write_text(content)
    assert str(where) in fails(capsys, script, str(where))


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
    (OSError("strange"), 2, f"error: {__name__}: strange\n"),
])  # fmt: skip
def test_every_error_of_a_user_is_one_line(capsys, error, code, line):
    @cli.user_errors
    def main(argv):
        """What it does."""
        raise error

    assert main.__doc__ == "What it does."
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == code and capsys.readouterr().err == line


def test_a_reader_that_has_gone_is_no_error_and_odd_names_are_printed(monkeypatch):
    copied = []
    monkeypatch.setattr(os, "dup2", lambda *args: copied.append(args))
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)

    @cli.user_errors
    def main(argv):
        print("\udcff")
        raise BrokenPipeError

    with pytest.raises(SystemExit) as stop:
        main()
    ((handle, target),) = copied
    assert (
        stop.value.code == 1
        and target == 1
        and os.readlink(f"/proc/self/fd/{handle}") == os.devnull
    )
    out.seek(0)
    assert out.read() == "\\udcff\n"
    assert cli.user_errors(lambda argv: argv)(["x"]) == ["x"]


def test_the_program_itself_prints_one_line_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "train.py", "--preset", "huge"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --preset huge")


@pytest.mark.parametrize("main", [train.main, evaluation.main, chat.main])
def test_help_lists_the_flags(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--device" in printed and "--max-missing" in printed
