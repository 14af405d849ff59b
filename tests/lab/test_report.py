"""The page on a checkpoint: well made, readable by everyone, and true; the figures of the README.

The model is a random one of 30 000 parameters; its numbers are counted again the slow way.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from PIL import Image

import train
from checkpoint import load_model
from config import PRESETS
from eval import Prediction, Predictor
from lab import figures, report
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
        train.main(["--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--steps",
                    "2", "--batch-size", "4", "--no-eval", "--router-images", "16",
                    "--out", str(out)])  # fmt: skip
    return out


def show(checkpoint, folder, *argv):
    """-> the numbers and the page."""
    file = folder / "page.html"
    numbers = report.main([
        str(checkpoint), "--out", str(file), "--limit", "24", "--max-new", "4", "--images", "2",
        "--dtype", "float32", "--ablations", str(folder / "tables"), *argv
    ])  # fmt: skip
    return numbers, file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    return show(run / "phase3", tmp_path_factory.mktemp("shown"))


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
            for name in {"href", "src", "xlink:href"} & set(attrs):
                assert attrs[name].startswith(("#", "data:")), f"{tag} fetches {attrs[name]}"
                assert attrs[name][0] != "#" or attrs[name][1:] in ids, attrs[name]
        assert not re.search(r"url\((?!#)|@import|https?:", text)
        assert all(a["alt"] for a in self.all("img")) and len(self.all("main")) == 1
        assert len(self.all("table")) == len(self.all("caption"))
        assert all(attrs["scope"] for attrs in self.all("th"))
        levels = [int(tag[1]) for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[:2] == [1, 2] and 1 not in levels[1:]
        assert all(b <= a + 1 for a, b in pairwise(levels))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another"

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def test_the_page_is_whole_and_everyone_can_read_it(shown):
    page = Page(shown[1])
    assert "not a medical device" in shown[1] and len(shown[1]) < 3_000_000
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("img")) == 2 * 3 + 2  # an image, two sparse layers; loss and load
    for name in ("Loss", "Load", "Calibration"):
        assert f"<h3>{name}</h3>" in shown[1]
    assert "Patches by their first expert: " in shown[1] and "Ablations" in shown[1]


def test_the_load_is_what_counting_routed_tokens_one_by_one_gives(run, shown):
    numbers, text = shown
    samples, counts = load_samples(["phantoms:16"], "vqa", "test")[:24], {}
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
                for _, e in (routing.gates[0] != 0).nonzero().tolist():
                    counts.setdefault(s.modality, [[0] * 4 for _ in range(2)])[layer][e] += 1
    assert numbers["load"].keys() == counts.keys()
    for name, rows in counts.items():
        assert numbers["load"][name]["routed"] == [sum(row) for row in rows]
        for row, shares in zip(rows, numbers["load"][name]["shares"], strict=True):
            assert shares == pytest.approx([n / sum(row) for n in row])
            cells = "".join(rf"<td[^>]*>{100 * n / sum(row):.1f}</td>" for n in row)
            assert re.search(rf">{name}</th>{cells}<td>{sum(row):,}</td>", text)
    judged = judge_router(samples, predictor.answer(samples))
    assert numbers["router"] == judged and numbers["calibration"]["n"] == judged["n"]


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
    assert report.calibration([], [], 2) == {"n": 0, "ece": 0, "bins": []}


def test_training_curves_by_hand():
    load = [[[2, 0], [1, 1]], [[1, 1], [1, 1]]]
    steps = [{"step": i, "loss": 2.0 - i, "load": row} for i, row in enumerate(load)]
    found = report.training_curves(steps, ["a", "b"])
    lines = {title: [list(v) for v in c["named"].values()] for title, c in found.items()}
    assert lines == {"Loss": [[2, 1], [2, 1.5]], "Load": [[0.75, 0.5], [0.25, 0.5]]}
    assert report.training_curves([], []) == {} and [*report.training_curves(steps, [])] == ["Loss"]


def test_patches_are_shown_with_their_first_expert():
    gates = torch.tensor([[0.9, 0.1], [0, 0.5], [0, 0], [0, 0.7]])
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    _, view = report.views({"image": image, "patches": [gates]}, [3])
    found = [number for count in view["counts"] for number in count]
    assert view["block"] == 3 and found == pytest.approx([1, 2, 0.6, 0, 1, 0.9, -1, 1, 0])
    ax = report.Figure().add_subplot()
    report.draw_patches(ax, image, gates, 2)
    assert [(t.get_text(), t.get_position()) for t in ax.texts] == [
        ("0", (0.25, 0.25)), ("1", (0.75, 0.25)), ("-", (0.25, 0.75)), ("1", (0.75, 0.75))
    ]  # fmt: skip


def test_whatever_comes_from_data_or_files_is_escaped(run, tmp_path, monkeypatch):
    checkpoint = shutil.copytree(run / "phase3", tmp_path / EVIL.replace("/", "-"))
    plain = report.load_questions

    def evil_questions(*args):
        flags, samples = plain(*args)
        return flags, [replace(s, turns=((EVIL, EVIL),)) for s in samples]

    monkeypatch.setattr(report, "load_questions", evil_questions)
    (tmp_path / "tables").mkdir()
    table = f"{EVIL}\n\n| {EVIL} | b |\n|---|---|\n| {EVIL} | 92 |\n"
    (tmp_path / "tables" / "a.md").write_text(table)
    _, text = show(checkpoint, tmp_path, "--png", str(tmp_path / "routes.png"))
    Page(text)
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)") > 8
    assert Image.open(tmp_path / "routes.png").width > 1000


def test_a_dense_checkpoint_has_notes_in_place_of_its_routing(run, tmp_path):
    numbers, text = show(run / "phase2", tmp_path)
    assert Page(text) and numbers["router"] is None and text.count("it has no router") == 3


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        report.main(["phase3", "--out", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "requirements-lab.txt" in error and error.count("\n") == 1


def test_the_sheet_shows_eight_phantoms_with_the_findings_that_it_names(tmp_path):
    figures.main(["--out", str(tmp_path)])
    assert Image.open(tmp_path / "phantoms.png").size == (1000, 700)
    found = [(p.organ, p.count, q.kind) for p, q in (figures.pick(*w) for w in figures.SHOWN)]
    assert found == figures.SHOWN


@pytest.mark.slow
def test_a_browser_shows_it_at_360_pixels_without_sideways_scrolling(shown, tmp_path):
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs an installed Chromium")
    width = "document.documentElement.scrollWidth + ' of ' + innerWidth"
    probe = f"parent.document.body.append({width})"
    text = shown[1].replace("</body>", f"<script>onload = () => {probe}</script></body>")
    (tmp_path / "page.html").write_text(text)
    (tmp_path / "phone.html").write_text('<iframe src="page.html" width="360"></iframe>')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             "--virtual-time-budget=5000", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'own'}"]  # fmt: skip
    command = [chromium, *flags, (tmp_path / "phone.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    width, inner = map(int, re.search(r"(\d+) of (\d+)", done.stdout).groups())
    assert inner == 360 and width <= 360
