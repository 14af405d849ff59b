"""The demo page: interventions, what is shown, nothing kept; and all of it in a browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch
from PIL import Image

from config import UserError
from data import Sample, collate, encode_prompt
from engine.inference import option_likelihoods
from lab import demo
from lab.interventions import OWN, Checkpoint, answers, interventions
from sources.images import Images
from tests.mini import checkpoint, error_line

ROOT, EVIL = Path(__file__).parents[2], "<script>document.title = 'evil'</script>{{7}}${7}&lt;"
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def page(phase3, tmp_path_factory):
    """Of a sparse checkpoint and a dense one."""
    dense = checkpoint(tmp_path_factory.mktemp("mini") / "dense", None)
    how = "cpu", "float32", "auto", None
    return demo.Page([Checkpoint(str(folder), *how) for folder in (phase3, dense)], 7)


def test_an_intervention_changes_the_routing_while_it_answers_and_only_then(page):
    c, pixels = page.checkpoints[0], page.phantom(7).pixels[0]
    layers = [block.mlp for block in c.model.decoder.blocks[::2]]
    before, found = [(layer.router, layer.meta) for layer in layers], {}
    for how in interventions(c.config.moe):
        *_, found[how] = answers(c, pixels, "MRI", "Is it?", how, 7)
    assert before == [(layer.router, layer.meta) for layer in layers]
    gates = {how: x.routes.gates[0] for how, x in found.items()}
    for e in range(4):
        assert (gates[str(e)] == torch.eye(4)[e]).all()
    assert (gates["first"].sum(-1) == 1).all() and (gates["true"].argmax(-1) == 1).all()
    assert len({x.likelihood for x in found.values()}) == 8
    sample, encoded = Sample("", "", "", 7, ()), encode_prompt("Is it?", True, c.text, c.config)
    batch = collate([sample], [encoded], Images(32), c.text.eos_id, "left")
    tokens = [*found[OWN].routes.ids[len(encoded[0]) :], *found[OWN].routes.steps[-1].tokens]
    expected = option_likelihoods(c.model, batch, [list(map(int, tokens))])
    assert found[OWN].likelihood == pytest.approx(float(expected.exp()), rel=1e-3)


def test_what_is_shown_is_escaped_and_a_link_restores_it(page):
    shown = page.phantom(2000000004)
    *first, (head, left, right) = page.ask(shown, EVIL, "2", 0)
    assert len(first) > 2 and "<script" not in head + left + right and "&lt;script" in head
    assert left.count("<img") == 2 and "Block 0" in left and "expert 2, X-ray" in right
    link = unescape(re.findall(r'href="([^"]*)', head)[0])
    assert page.restore(dict(parse_qsl(link[1:])))[1:] == (EVIL, "2", 0)
    wrong = {"image": "x", "change": "x", "with": "9"}
    assert page.restore(wrong)[0].seed == 2000000004 and page.restore(wrong)[2:] == (OWN, 0)
    for asked, how, other, words in ((" ", "1", 0, "type a question"), ("a " * 999, "1", 0, "512"),
                                     ("Is it?", "1", 1, "no such routing")):  # fmt: skip
        assert words in list(page.ask(shown, asked, how, other))[-1][2 if other else 1]
    assert "is dense" in list(page.ask(shown, "Is it?", OWN, 1))[-1][2]


def test_a_file_is_read_and_not_kept(page, tmp_path):
    for name, fault in (("a.png", ""), ("b.txt", "image b.txt: not a readable"),
                        ("c.png", "claims 9000 x 9000")):  # fmt: skip
        (file := tmp_path / "upload" / name).parent.mkdir()
        file.write_text(EVIL)
        if name != "b.txt":
            Image.new("1", (9000, 9000) if fault else (40, 20)).save(file)
        if fault:
            with pytest.raises(UserError, match=fault):
                page.file(file)
        else:
            assert page.file(file)[:3] == ("a.png", None, None)
        assert not any(tmp_path.iterdir())


def test_without_gradio_one_line_says_what_to_install(phase3, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install -r requirements-lab.txt" in error_line(capsys, demo.main, phase3)


def cpu_seconds(process):
    """It has used: a clock would count what else the machine does."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / 100


@contextmanager
def running(checkpoint, temp):
    command = [sys.executable, "-m", "lab.demo", str(checkpoint), "--port", "0"]
    environ = {**os.environ, "TMPDIR": str(temp)}
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs an installed Chromium")
def test_in_a_browser(tmp_path):
    pytest.importorskip("gradio", reason="requirements-lab.txt")
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not (trained := ROOT / "runs" / "tiny" / "phase3").is_dir():
        trained = tmp_path / "run" / "phase3"  # four minutes
        train = [sys.executable, "train.py", "--phase", "3", "--no-eval", "--out", trained.parent]
        subprocess.run(train, cwd=ROOT, check=True)
    Image.effect_noise((60, 30), 90).save(tmp_path / "noise.png")
    (tmp_path / "no.png").write_text("no")
    (temp := tmp_path / "temp").mkdir()
    errors, hosts = [], set()
    with running(trained, temp) as server, api.sync_playwright() as playwright:
        url, opening = server.stdout.readline().split()[0], cpu_seconds(server)
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        for width in (360, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.set_default_timeout(300_000)  # ms, on a busy machine
            tab.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
            tab.on("console", lambda m: errors.extend([m.text] * (m.type == "error")))
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.goto(url)
            tab.wait_for_selector(".side .wrong")  # the same fact, of another expert
            assert tab.inner_text(".answer >> nth=0") == "cavmente"
            before = cpu_seconds(server)
            tab.get_by_text("Does everything look normal?").click()
            tab.wait_for_selector("text=truth: no;")
            tab.wait_for_function("document.querySelectorAll('.side details').length == 2")
            answering = cpu_seconds(server) - before
            assert tab.inner_text(".answer >> nth=0") == "no"
            assert tab.evaluate("[...document.querySelectorAll('*')].every("
                                "x => x.getBoundingClientRect().right <= innerWidth)")  # fmt: skip
            for asked, shown in ((EVIL, ".question"), (EVIL * 200, ".error")):
                tab.fill("textarea", asked)
                tab.get_by_role("button", name="Ask").click()
                tab.wait_for_selector(f"{shown}:has-text('<script>document.title')")
                assert "evil" not in tab.title()
            tab.fill("textarea", "Does everything look normal?")
            for name, shown in (("no.png", "no.png: not a readable"), ("noise.png", "unlike")):
                tab.set_input_files("input[type=file]", tmp_path / name)
                tab.wait_for_selector(f"text={shown}")
                assert not any(x.stat().st_size for x in temp.rglob("*") if x.is_file())
            tab.wait_for_selector("text=without your file")
            tab.wait_for_function("document.querySelectorAll('.side details').length == 2")
            tab.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        browser.close()
    assert not errors and hosts <= {"127.0.0.1", None} and not list(temp.glob("medmoe-demo-*"))
    print(f"opened after {opening:.1f} s of CPU time, answered twice in {answering:.1f} s")
    assert opening < 10 and answering < 2  # twice what it takes where nothing else runs
