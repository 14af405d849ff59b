"""The page on a checkpoint: well made, readable by everyone, and true.

The model is a random one of 30 000 parameters; its numbers are counted again the slow way.
"""

import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import train
from checkpoint import load_model
from config import PRESETS
from eval import Prediction, Predictor
from lab import report
from model import generate
from scoring.router import judge_router
from sources.load import load_samples
from tests.mini import mini

pytest.importorskip("matplotlib", reason="requirements-lab.txt")
EVIL = "<script>alert(1)</script>\"'&$x^{<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run: phases 1 to 3, two steps each."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        argv = "--preset mini --data phantoms:16 --dtype float32 --steps 2 --batch-size 4 --no-eval"
        train.main([*argv.split(), "--router-images", "16", "--out", str(out)])
    return out


def show(checkpoint, folder, *argv):
    """-> the numbers and the page."""
    file = folder / "page.html"
    numbers = report.main([
        str(checkpoint), "--out", str(file), "--limit", "24", "--max-new", "4", "--images", "2",
        "--dtype", "float32", "--ablations", str(folder / "tables"), *argv
    ])  # fmt: skip
    return numbers, "" if "--png" in argv else file.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Refuses a page that is not well formed, fetches something, or lacks a text alternative."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids)) > 5
        for tag, attrs in self.tags:
            assert tag not in ("script", "iframe", "object")
            assert not any(name.startswith("on") for name in attrs)
            for name in {"href", "src"} & set(attrs):
                assert attrs[name].startswith("data:") or attrs[name][1:] in ids, attrs[name]
        assert not re.search(r"url\((?!#)|@import|https?:", text)
        assert all(a["alt"] for a in self.all("img")) and len(self.all("main")) == 1
        assert len(self.all("table")) == len(self.all("caption"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another"

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def test_the_page_is_whole_and_its_load_is_what_counting_tokens_one_by_one_gives(run, tmp_path):
    numbers, text = show(run / "phase3", tmp_path)
    assert len(Page(text).all("img")) == 2 * 3 + 2  # an image, two sparse layers; loss and load
    assert "not a medical device" in text and "<h3>Calibration</h3>" in text
    samples = load_samples(["phantoms:16"], "vqa", "test")[:24]
    counts = defaultdict(lambda: torch.zeros(2, 4, dtype=torch.int64))
    model, tokenizer, _ = load_model(run / "phase3", torch.device("cpu"), torch.float32)
    predictor = Predictor(model, tokenizer, torch.device("cpu"), torch.float32, max_new=4)
    for s in samples:
        ((_, batch),) = predictor.batches([s], "slow")
        with torch.inference_mode():
            steps = list(generate(model, batch, tokenizer.eos_id, 4))
        for i, step in enumerate(steps):
            if i and int(steps[i - 1].tokens[0]) == tokenizer.eos_id:
                break
            for layer, routing in enumerate(step.routings):
                counts[s.modality][layer] += (routing.gates[0] != 0).sum(dim=0)
    assert numbers["load"].keys() == counts.keys()
    for name, rows in ((name, table.tolist()) for name, table in counts.items()):
        assert numbers["load"][name]["routed"] == [sum(row) for row in rows]
        for row, shares in zip(rows, numbers["load"][name]["shares"], strict=True):
            assert shares == pytest.approx([n / sum(row) for n in row])
            cells = "".join(rf"<td[^>]*>{100 * n / sum(row):.1f}</td>" for n in row)
            assert re.search(rf">{name}</th>{cells}<td>{sum(row):,}</td>", text)
    assert numbers["router"] == judge_router(samples, predictor.answer(samples))


def test_calibration_by_hand():
    """Two prompts of one image are averaged, over two layers; a blank label is left out."""
    (s,) = load_samples(["phantoms:16"], "vqa", "test")[:1]
    votes = lambda p: 2 * torch.tensor([p, 1 - p]).log()  # noqa: E731
    other = replace(s, image="other", modality="MRI")
    samples = [*2 * [replace(s, modality="CT")], other, replace(s, modality=None)]
    found = [Prediction("", votes(p), torch.zeros(1, 2)) for p in (0.55, 0.55, 0.97, 0.7)]
    result = report.calibration(samples, found, 2)
    assert [(b["low"], b["n"], b["accuracy"]) for b in result["bins"]] == [(0.5, 1, 1), (0.9, 1, 0)]
    assert result["n"] == 2 and result["ece"] == pytest.approx((0.45 + 0.97) / 2)


def test_whatever_comes_from_data_or_files_is_escaped(run, tmp_path, monkeypatch):
    def evil_questions(*args, load=report.load_questions):
        flags, samples = load(*args)
        return flags, [replace(s, turns=((EVIL, EVIL),)) for s in samples]

    monkeypatch.setattr(report, "load_questions", evil_questions)
    checkpoint = shutil.copytree(run / "phase3", tmp_path / EVIL.replace("/", "-"))
    (tmp_path / "tables").mkdir()
    table = f"{EVIL}\n\n| {EVIL} | b |\n|---|---|\n| {EVIL} | 92 |\n"
    (tmp_path / "tables" / "a.md").write_text(table)
    _, text = show(checkpoint, tmp_path)
    Page(text)
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)") > 8
    (tmp_path / "page.html").unlink()
    show(checkpoint, tmp_path, "--png", str(tmp_path / "routes.png"))  # the figure alone
    assert (
        Image.open(tmp_path / "routes.png").width > 1000 and not (tmp_path / "page.html").exists()
    )


def test_a_dense_checkpoint_has_notes_in_place_of_its_routing(run, tmp_path):
    numbers, text = show(run / "phase2", tmp_path)
    assert numbers["router"] is numbers["load"] is None and text.count("it has no router") == 3
    assert len(Page(text).all("img")) == 2 + 1  # two examples and the loss


def test_patches_and_curves_by_hand():
    gates = torch.tensor([[0.9, 0.1], [0, 0.5], [0, 0], [0, 0.7]])
    _, view = report.views({"image": torch.zeros(3, 8, 8).byte(), "patches": [gates]}, [3])
    assert view["block"] == 3 and view["counts"] == [(1, 2), (0, 1), (-1, 1)]  # -1: to no expert
    load = [[[2, 0], [1, 1]], *11 * [[[1, 1], [0, 4]]]]  # step, layer, expert
    steps = [{"step": i, "loss": float(i), "load": row} for i, row in enumerate(load)]
    loss, share = (c["named"] for c in report.training_curves(steps, ["a", "b"]).values())
    assert loss["mean of the last 10 steps"] == [*np.arange(10) / 2, 5.5, 6.5]
    assert [*share["a"]] == [0.75, *11 * [0.25]] and [*share["b"]] == [0.25, *11 * [0.75]]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs an installed Chromium")
def test_a_browser_shows_it_without_errors_and_without_sideways_scrolling(run, tmp_path):
    width = "document.documentElement.scrollWidth + ' of ' + innerWidth + ', '"
    script = f"<script>onload = () => parent.document.body.append({width})</script>"
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "wide.md").write_text(100 * "| cell ")
    (tmp_path / "page.html").write_text(show(run / "phase3", tmp_path)[1] + script)
    frames = [f'<iframe src="page.html" width="{n}"></iframe>' for n in (360, 1280)]
    (tmp_path / "both.html").write_text("".join(frames))
    flags = ["--headless", "--no-sandbox", "--dump-dom", "--enable-logging=stderr",
             "--virtual-time-budget=5000", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'own'}", (tmp_path / "both.html").as_uri()]  # fmt: skip
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=120)
    found = re.findall(r"(\d+) of (360|1280), ", done.stdout)
    assert len(found) == 2 and all(int(width) <= int(inner) for width, inner in found)
    assert "CONSOLE" not in done.stderr
