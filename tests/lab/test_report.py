"""The page on a checkpoint: well made, readable by everyone, and true..

The model is a random one of 30 000 parameters; its numbers are counted again the slow way.
"""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_model
from config import IMAGE_ID, MODALITIES, PRESETS, UserError
from eval import Predictor
from lab import report, report_history, report_numbers, report_page, report_png, svg
from model import generate
from scoring.router import judge_router
from sources.load import load_samples
from tests.mini import mini

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
DROPS = """
from routers import Router, top_k_gates
class Drops(Router):
    may_drop = True
    def gate(self, logits, mask, x):
        gates = top_k_gates(logits.softmax(-1), self.top_k)
        return gates * (logits[..., :1] > 0)
"""


class Page(HTMLParser):
    """The tags, identifiers and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs, list(self.open)))
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another"

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    def all(self, *names):
        return [attrs for tag, attrs, _ in self.tags if tag in names]


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
        str(checkpoint), "--out", str(file), "--limit", "24", "--max-new", "4",
        "--dtype", "float32", "--ablations", str(folder / "none"), *argv
    ])  # fmt: skip
    return numbers, file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    return show(run / "phase3", tmp_path_factory.mktemp("shown"))


def check(text):
    """What must be true of every page."""
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "identifiers occur twice"
    assert len(text.encode()) < 3_000_000
    assert page.all("html")[0]["lang"] == "en"
    assert not page.all("script") and not page.all("img", "iframe", "object")
    for tag, attrs, _ in page.tags:
        for name in ("href", "src", "xlink:href"):
            if value := attrs.get(name):
                assert value.startswith(("#", "data:")), f"{tag} fetches {value}"
                assert value[0] != "#" or value[1:] in page.ids, f"{value} leads nowhere"
        assert not [name for name in attrs if name.startswith("on")], attrs
        for name in attrs.get("aria-labelledby", "").split():
            assert name in page.ids
    assert "url(" not in text and "@import" not in text and "http" not in report_page.CSS
    levels = [int(tag[1]) for tag, _, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    landmarks = [tag for tag, _, _ in page.tags if tag in ("header", "nav", "main", "footer")]
    assert landmarks == ["header", "nav", "main", "footer"]
    for attrs in page.all("svg"):
        assert attrs.get("aria-hidden") == "true" or (
            attrs["role"] == "img" and len(attrs["aria-labelledby"].split()) == 2
        )
    charts = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(charts) == len(page.all("desc")), "a chart without its text"
    assert not re.search(r"<desc[^>]*></desc>|<title[^>]*></title>", text)
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    boxes = [attrs for attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table"))
    assert all(b["tabindex"] == "0" and b["aria-label"] and b["role"] == "region" for b in boxes)
    return page


def test_the_page_is_whole_and_everyone_can_read_it(shown):
    page = check(shown[1])
    words = " ".join(page.words)
    assert "not a medical device" in words
    for name in ("load", "examples", "router", "training", "saturation", "ablations"):
        assert name in page.ids
    # Two sparse layers of three blocks, and the image itself, for each of eight examples.
    views = [a for a in page.all("svg") if a.get("class") == "overlay"]
    assert len(views) == 8 * 3
    assert len(page.all("image")) == 8, "each image is embedded once"


def slow_load(predictor, samples):
    """(modality, kind) -> counts [layer][expert], one sample, position and expert at a time."""
    counts = {}
    for s in samples:
        ((_, batch),) = predictor.batches([s], "slow")
        with torch.inference_mode():
            steps = list(generate(predictor.model, batch, predictor.text.eos_id, predictor.max_new))
        for i, step in enumerate(steps):
            if i and int(steps[i - 1].tokens[0]) == predictor.text.eos_id:
                break
            for layer, routing in enumerate(step.routings):
                for t in range(routing.gates.shape[1]):
                    kind = "answer"
                    if i == 0:
                        is_patch = int(batch.ids[0, t]) == IMAGE_ID
                        kind = "image patches" if is_patch else "prompt text"
                    for e in range(4):
                        if float(routing.gates[0, t, e]) != 0:
                            for key in (("modality", s.modality), ("kind", kind)):
                                table = counts.setdefault(key, [[0] * 4 for _ in range(2)])
                                table[layer][e] += 1
    return counts


def open_predictor(checkpoint):
    model, text, _ = load_model(checkpoint, torch.device("cpu"), torch.float32)
    return Predictor(model, text, torch.device("cpu"), torch.float32, max_new=4)


def test_the_load_is_what_counting_routed_tokens_one_by_one_gives(run, shown):
    numbers, text = shown
    samples = load_samples(["phantoms:16"], "vqa", "test")[:24]
    counts = slow_load(open_predictor(run / "phase3"), samples)
    assert {(group, name) for group in numbers["load"] for name in numbers["load"][group]} == (
        counts.keys()
    )
    for (group, name), table in counts.items():
        found = numbers["load"][group][name]
        assert found["routed"] == [sum(row) for row in table]
        for row, shares in zip(table, found["shares"], strict=True):
            assert shares == pytest.approx([n / sum(row) for n in row])
            cells = "".join(rf"<td[^>]*>{100 * n / sum(row):.1f} %</td>" for n in row)
            assert re.search(rf">{name}</th>{cells}<td>{sum(row):,}</td>", text)


def test_the_router_is_judged_as_eval_judges_it(run, shown):
    numbers, text = shown
    samples = load_samples(["phantoms:16"], "vqa", "test")[:24]
    found = open_predictor(run / "phase3").answer(samples)
    judged = judge_router(samples, found)
    assert numbers["router"]["confusion"] == judged["confusion"]
    confidences, right = report_numbers.router_confidence(samples, found, 2)
    assert sum(right) == sum(judged["confusion"][i][i] for i in range(4))
    assert len(right) == judged["n"] == numbers["calibration"]["n"]
    low, high = (100 * end for end in judged["ci95"])
    assert f"{100 * judged['accuracy']:.1f} % [{low:.1f}, {high:.1f}]" in text
    first = [p for s, p in zip(samples, found, strict=True) if s.image == samples[0].image]
    logits = sum(p.votes for p in first) / len(first) / 2
    assert confidences[0] == pytest.approx(float(logits.exp().max() / logits.exp().sum()))


def test_calibration_by_hand():
    found = report_numbers.calibration(
        [0.55, 0.60, 0.95, 0.97, 1.0], [True, False, True, True, False]
    )
    assert [(b["low"], b["n"]) for b in found["bins"]] == [(0.5, 2), (0.9, 3)]
    expected = 2 / 5 * abs(0.5 - 0.575) + 3 / 5 * abs(2 / 3 - 2.92 / 3)
    assert found["ece"] == pytest.approx(expected)
    assert report_numbers.calibration([], [])["ece"] == 0


def test_balance_by_hand():
    assert report_history.balance([[1, 1, 1, 1]]) == {"cv": 0, "max_vio": 0}
    found = report_history.balance([[2, 0], [1, 1]])  # CV 1 and 0, MaxVio 1 and 0
    assert found == {"cv": 0.5, "max_vio": 0.5}
    assert report_history.balance([[0.0, 0.0]]) == {"cv": 0, "max_vio": -1}


def test_examples_show_what_was_generated(run, shown):
    predictor = open_predictor(run / "phase3")
    samples = load_samples(["phantoms:16"], "vqa", "test")[:24]
    e = report_numbers.explain(predictor, samples[0])
    assert e.patches.shape == (2, 4, 4)
    assert e.patches.sum(-1).flatten().tolist() == pytest.approx([1.0] * 8)
    assert "".join(e.tokens).strip() == e.answer
    assert len(e.gates) == len(e.tokens)
    assert all((g > 0).sum(-1).tolist() == [2, 2] for g in e.gates if g is not None)
    page = Page(shown[1])
    assert "question" in page.words and samples[0].turns[0][0] in shown[1].replace("&#x27;", "'")


def test_examples_are_right_and_wrong_ones_of_each_modality():
    samples = load_samples(["phantoms:16"], "vqa", "test")[:200]
    truths = [s.turns[0][1] for s in samples]
    answers = [t if i % 3 else "nothing of it" for i, t in enumerate(truths)]
    chosen = report_numbers.choose(samples, answers, 8)
    assert len(set(chosen)) == 8 and len({samples[i].image for i in chosen}) == 8
    assert [samples[i].modality for i in chosen] == [m for m in MODALITIES for _ in range(2)]
    right = [answers[i] == truths[i] for i in chosen]
    assert [sum(right[i : i + 2]) for i in range(0, 8, 2)] == [1, 1, 1, 1]
    assert len(report_numbers.choose(samples[:3], answers[:3], 8)) == 3


def test_whatever_comes_from_data_or_files_is_escaped(run, tmp_path, monkeypatch):
    name = EVIL.replace("/", "-")
    shutil.copytree(run / "phase3", tmp_path / name)
    plain = report.load_questions

    def evil_questions(*args):
        flags, samples = plain(*args)
        return flags, [replace(s, turns=((EVIL, EVIL),)) for s in samples]

    monkeypatch.setattr(report, "load_questions", evil_questions)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "evil.json").write_text(json.dumps(ablation(EVIL)))
    _, text = show(tmp_path / name, tmp_path)
    check(text)
    assert "<script" not in text and "<img" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20


def ablation(title="Med-MoE"):
    score = {"mean": 0.92, "sd": 0.003}
    row = {"row": "medmoe", "title": title, "group": "phases", "n_seeds": 3, "together": score,
           "closed": score, "open": {"mean": 0.5, "sd": None}, "against": None,
           "parameters": {"total": 3_000_000, "activated": 2_000_000}}  # fmt: skip
    against = {"row": "medmoe", "difference": -0.012, "ci95": [-0.02, 0.001]}
    return {"name": "core", "command": f"python {title}", "hash": "1", "seeds": [0, 1, 2],
            "rows": [row, row | {"row": "dense", "against": against}]}  # fmt: skip


def test_ablations_are_shown_as_they_are(run, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "core.json").write_text(json.dumps(ablation()))
    _, text = show(run / "phase3", tmp_path, "--images", "1")
    check(text)
    assert "92.0 ± 0.3" in text and "-1.2 [-2.0, +0.1] against medmoe" in text
    assert ">50.0<" in text and "3,000,000" in text
    broken = ablation()
    del broken["rows"][1]["closed"]
    (tmp_path / "none" / "core.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"core\.json: is no table"):
        report_history.read_ablations(tmp_path / "none")


def test_a_dense_checkpoint_has_notes_in_place_of_its_routing(run, tmp_path):
    numbers, text = show(run / "phase2", tmp_path)
    check(text)
    assert numbers["router"] is None and text.count("it has no router") == 4
    assert "Training loss" in text
    with pytest.raises(SystemExit):
        show(run / "phase2", tmp_path, "--png", str(tmp_path))


def test_a_sequence_router_has_the_same_experts_for_all_tokens(run, tmp_path):
    _, text = show(run / "phase3", tmp_path, "--router-level", "sequence")
    check(text)
    assert "decides once per sample" in text
    texts = re.findall(r"Of 4 patches, by their first expert: ([^<]*)", text)
    assert len(texts) == 16 and all(t.startswith("4 to expert") for t in texts)


def test_a_router_that_drops_tokens(run, tmp_path):
    (tmp_path / "drops.py").write_text(DROPS)
    numbers, text = show(run / "phase3", tmp_path, "--router", f"{tmp_path}/drops.py:Drops")
    check(text)
    assert "to no expert" in text and "nan" not in " ".join(Page(text).words).lower()
    assert numbers["experts"] == [f"expert {e}" for e in range(4)]


def test_data_without_modality_or_image(run, tmp_path, monkeypatch):
    plain = report.load_questions

    def unknown(*args):
        flags, samples = plain(*args)
        return flags, [replace(s, modality=None, image=s.image if i else None)
                       for i, s in enumerate(samples)]  # fmt: skip

    monkeypatch.setattr(report, "load_questions", unknown)
    numbers, text = show(run / "phase3", tmp_path, "--images", "24")
    check(text)
    assert list(numbers["load"]["modality"]) == ["unknown"]
    assert "has no modality labels" in text and "This question has no image" in text


def test_every_sparse_step_logs_the_load_of_its_experts(run, shown):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert ["load" in r for r in steps] == [False] * 4 + [True] * 2
    for r in steps[-2:]:
        assert len(r["load"]) == 2
        for row in r["load"]:
            assert sum(row) == pytest.approx(2, abs=3e-4) and row == [round(v, 4) for v in row]
    assert [r["load"] for r in shown[0]["steps"]] == [r["load"] for r in steps[-2:]]
    assert "Load in training" in shown[1] and "Balance in training" in shown[1]


def test_saturation_compares_with_the_points_that_are_there(run, shown, tmp_path):
    assert [p["step"] for p in shown[0]["saturation"]] == [0]
    assert "No step checkpoints" in shown[1]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(run / "phase3", copy / "phase3-step0000001")
    numbers, text = show(copy / "phase3", tmp_path, "--images", "1")
    check(text)
    start, same = numbers["saturation"]
    assert same["step"] == 1 and same["same"] == [1.0, 1.0]
    assert start["same"][0] == 1.0, "before the first sparse block nothing was trained"
    shutil.rmtree(copy / "phase2")
    shutil.rmtree(copy / "phase3-step0000001")
    numbers, text = show(copy / "phase3", tmp_path, "--images", "1")
    assert numbers["saturation"] == [] and "No earlier point" in text


def test_first_experts_differ_where_routers_do(run):
    predictor = open_predictor(run / "phase3")
    samples = load_samples(["phantoms:16"], "vqa", "test")[:8]
    before = report_history.first_experts(predictor, samples)
    with torch.no_grad():
        predictor.model.decoder.blocks[2].mlp.router.proj.bias += torch.tensor([0, 0, 0, 1e4])
    after = report_history.first_experts(predictor, samples)
    assert (after[0] == before[0]).all() and (after[1] == 3).all() and (before[1] != 3).any()


def test_a_torn_last_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "phase3").mkdir()
    log = tmp_path / "log.jsonl"
    log.write_text('{"phase": 3, "step": 0, "loss": 1.5}\n{"phase": 3, "ste')
    assert [r["loss"] for r in report_history.read_steps(tmp_path / "phase3", 3)] == [1.5]
    log.write_text('{"phase": 3, "ste\n{"phase": 3, "step": 0, "loss": 1.5}\n')
    with pytest.raises(UserError, match="line 1"):
        report_history.read_steps(tmp_path / "phase3", 3)
    assert report_history.read_steps(tmp_path / "nowhere" / "phase3", 3) == []


def test_charts_stay_inside_and_take_odd_values():
    assert svg.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and svg.ticks(3, 3) == [3]
    one = svg.lines([svg.Series("<a>", [(0, 2.0)])], "t", "d", "x", "y")
    assert "<a>" not in one and "nan" not in one
    drawn = svg.bars([svg.Bar("a & b", -2.0, -3.0, 1.0), svg.Bar("c", 4.0)], "t", "d", (-3, 4))
    places = [float(x) for x in re.findall(r'\b(?:x|x1|x2)="(-?[\d.]+)"', drawn)]
    assert "a &amp; b" in drawn and min(places) >= 0 and max(places) <= svg.WIDTH
    assert len(re.findall('class="whisker"', drawn)) == 3


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    """WCAG 2.2: 4.5 for text, 3 for lines of charts."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [report_page.LIGHT, report_page.DARK], ids=["light", "dark"])
def test_contrast_is_enough(scheme):
    value = dict(re.findall(r"--(\w+):([^;]+)", scheme + ";"))
    value = {k: "#" + "".join(2 * c for c in v[1:]) if re.fullmatch("#...", v) else v
             for k, v in value.items()}  # fmt: skip
    for ground in ("bg", "card"):
        for name in ("ink", "muted", "accent", "good", "bad"):
            assert contrast(value[name], value[ground]) >= 4.5, (name, ground)
    for i in range(8):
        assert contrast(value[f"s{i}"], value["card"]) >= 3
    part = float(value["heat"]) / 100
    both = [[int(value[n][i : i + 2], 16) for i in (1, 3, 5)] for n in ("accent", "card")]
    hottest = [round(part * a + (1 - part) * c) for a, c in zip(*both, strict=True)]
    assert contrast(value["ink"], "#" + "".join(f"{c:02x}" for c in hottest)) >= 4.5


@pytest.fixture(scope="module")
def chromium():
    try:
        return report_png.find_chromium()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_browser_shows_it_at_360_pixels_without_an_error(chromium, shown, tmp_path):
    probe = (
        "<script>addEventListener('load', () => parent.postMessage("
        "[document.documentElement.scrollWidth, innerWidth].join(' '), '*'))</script>"
    )
    (tmp_path / "page.html").write_text(shown[1].replace("</body>", probe + "</body>"))
    (tmp_path / "phone.html").write_text(
        "<!DOCTYPE html><body><script>addEventListener('message', e => {"
        "document.body.insertAdjacentHTML('beforeend', `<p>${e.data}</p>`)})</script>"
        '<iframe src="page.html" style="width:360px;height:700px;border:0"></iframe>'
    )
    done = report_png.browse(chromium, tmp_path / "phone.html", "--dump-dom",
                             "--virtual-time-budget=5000", "--enable-logging=stderr")  # fmt: skip
    found = re.search(r"<p>(\d+) (\d+)</p>", done.stdout)
    assert found and int(found[2]) == 360 and int(found[1]) <= 360
    assert "CONSOLE" not in done.stderr


@pytest.mark.slow
def test_figures_are_drawn_by_the_browser(chromium, run, tmp_path):
    show(run / "phase3", tmp_path, "--png", str(tmp_path / "figures"))
    for name in ("load", "overlays", "calibration"):
        with report_png.Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.width > 700 and len(image.getcolors(1000)) > 20
    assert Path(tmp_path / "page.html").is_file()
