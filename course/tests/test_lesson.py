"""The first lesson, course/lesson.ipynb: readable as saved, runs without Jupyter, and is right."""

import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "lesson.ipynb"
CELLS = json.loads(FILE.read_text())["cells"]
TEXTS = ["".join(cell["source"]) for cell in CELLS]
SECTIONS = [i for i, text in enumerate(TEXTS) if text.startswith("## ")]


@pytest.mark.parametrize("n", range(1, 7))
def test_every_section_has_a_saved_figure_and_ends_in_a_question(n):
    first, end = SECTIONS[n - 1 : n + 1]
    assert TEXTS[first].startswith(f"## {n}. ") and f"> **Question {n}.**" in TEXTS[end - 1]
    saved = json.dumps([cell.get("outputs") for cell in CELLS[first:end]])
    assert '"image/png": "iVBORw0KGgo' in saved and '"error"' not in saved
    assert FILE.stat().st_size < 400_000


@pytest.mark.parametrize("end", [SECTIONS[3], pytest.param(None, marks=pytest.mark.slow)])
def test_the_cells_run_and_show_what_the_text_claims(end, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="the lesson's figures need matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(FILE.parent)  # as Jupyter starts it
    found = {}
    with matplotlib.rc_context():
        for cell, text in zip(CELLS[:end], TEXTS[:end], strict=True):
            if cell["cell_type"] == "code":
                exec(compile(text, cell["id"], "exec"), found)
        found["plt"].close("all")
    assert sum(found["sparse"]) > 2 * sum(found["dense"]) and found["same"] and found["unchanged"]
    assert (found["routing"].gates != 0).sum(dim=-1).tolist() == [[2] * 9 + [0] * 3]
    if end is None:  # sections 4 to 6
        runs, dead = found["runs"], found["dead"]
        assert [dead[seed, 0] > 1 > dead[seed, 1] for seed in range(3)] == [True] * 3
        assert sum(runs[seed, 0][1] - runs[seed, 1][1] for seed in range(3)) > 0
        assert found["accuracy"] > 0.9 and max(found["wrong_experts"]) < 0.2
        ends = [[curve[-1] for curve, _ in each] for each in found["learned"].values()]
        assert min(ends[0]) > max(*ends[1], *ends[2]) + 0.2  # random router, small FFN
