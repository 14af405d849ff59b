"""One page on a checkpoint: where its tokens are routed, and whether that makes sense.

    python -m lab.report runs/tiny/phase3 --out report.html

A single HTML file that needs no server, network or script; its words are in lab/report.html. --json
writes its numbers, --png one figure of routes on images. The questions are the checkpoint's own
held-out ones, or those of --data. Not a medical device.

Shapes: T positions, P patches of an image, L sparse layers, E experts, S image side.
"""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import jinja2  # comes with torch
import numpy as np
from PIL import Image

from checkpoint import load_model
from config import MODALITIES, Common, TrainConfig, UserError, argument, flag
from data import Sample
from engine import cli
from engine.overlay import COLOURS, Routes, draw_patches, png
from engine.run import read_log
from eval import Prediction, Predictor, load_questions, unpack
from lab.router import ece, reliability
from metrics import expert_names, score
from model import autocast, choose_device, count_parameters, generate, sparse_layers
from scoring.compare import value
from scoring.router import judge_router
from sources.load import how_read

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:  # only the lab needs it: main() names requirements-lab.txt
    matplotlib = None

HERE = Path(__file__).parent
N_BINS, MOST_LAYERS, MOST_POINTS = 10, 4, 200  # of confidence; shown of an example; of a curve
SETTINGS = {"font.size": 8, "legend.frameon": False, "text.parse_math": False,
            "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip


@dataclass(frozen=True)
class ReportConfig(Common):
    """A page on a checkpoint: load, examples, router, training, ablations."""

    lacks = ("seed", "kernels")
    checkpoint: str = argument("DIR of a finished phase")
    out: str = flag("report.html", "the page, FILE.html")
    images: int = flag(8, "examples to show", least=1)
    split: Literal["test", "val", "train"] = flag("test", "which questions")
    limit: int | None = flag(None, "only the first N questions", least=1)
    max_new: int = flag(48, "longest answer, in tokens", least=1)
    ablations: str = flag(str(HERE.parent / "results" / "ablations"), "DIR of tables of ablations")
    png: str | None = flag(None, "draw routes on images to this FILE.png instead")
    router: str | None = flag(None, "replace the router: a name or FILE.py:Class")


def load_by_modality(samples: Sequence[Sample], found: Sequence[Prediction]) -> dict[str, dict]:
    """Modality -> (L, E) "shares" of the routed tokens, (L,) "routed"."""
    loads: dict = defaultdict(int)
    for s, p in zip(samples, found, strict=True):
        loads[s.modality or "unknown"] += p.load
    loads = {name: loads[name] for name in (*MODALITIES, "unknown") if name in loads}
    return {name: {"shares": (n / n.sum(dim=-1, keepdim=True).clamp(min=1)).tolist(),
                   "routed": n.sum(dim=-1).tolist()} for name, n in loads.items()}  # fmt: skip


def calibration(samples: Sequence[Sample], found: Sequence[Prediction], n_layers: int) -> dict:
    """Confidence of the router per labelled image: expected calibration error, non-empty bins.

    Confidence is the softmax, of the logits' mean over the image's prompts and sparse layers, of
    the likeliest expert: the prediction that scoring.router.judge_router counts.
    """
    votes: dict = defaultdict(list)
    for s, p in zip(samples, found, strict=True):
        if s.modality and s.image is not None:
            votes[s.image, MODALITIES.index(s.modality)].append(p.votes)
    probs = [(sum(rows) / len(rows) / n_layers).softmax(dim=0) for rows in votes.values()]
    right = [int(p.argmax()) == t % len(p) for p, (_, t) in zip(probs, votes, strict=True)]
    pair = np.array([float(p.max()) for p in probs]), np.array(right, bool)
    error = ece(*pair, N_BINS) if right else 0.0
    return {"n": len(right), "ece": error, "bins": reliability(*pair, N_BINS)}


def choose(samples: Sequence[Sample], n: int) -> list[int]:
    """Which questions to show: the first of each modality, in turn."""
    order = [*MODALITIES, None]
    each = [[i for i, s in enumerate(samples) if s.modality == name] for name in order]
    chosen = [i for row in zip_longest(*each) for i in row if i is not None][:n]
    return sorted(chosen, key=lambda i: order.index(samples[i].modality))


def explain(predictor: Predictor, sample: Sample) -> dict:
    """Answer one question again, by itself -> its texts, image and its tokens' experts."""
    ((_, batch),) = predictor.batches([sample], "example")
    with autocast(predictor.device, predictor.dtype):
        steps = list(generate(predictor.model, batch, predictor.text.eos_id, predictor.max_new))
    answer = unpack(steps, batch.mask, predictor.text)[0].answer
    routes = Routes(predictor.model.config, batch, steps)
    return {
        "modality": sample.modality or "unknown", "question": sample.turns[0][0],
        "answer": answer, "truth": sample.turns[0][1],
        "verdict": "right" if value(sample, answer, None) == 1 else "wrong",
        "image": None if sample.image is None else predictor.images.get(sample),  # (3, S, S) uint8
        "patches": routes.patches(), "table": routes.table(predictor.text).strip("\n"),
    }  # fmt: skip


def read_ablations(folder: Path) -> list[dict]:
    """The tables that lab.ablate wrote into the folder, as text, and their plots."""
    plots = {file: file.with_suffix(".png") for file in sorted(folder.glob("*.md"))}
    return [{"name": file.stem, "text": file.read_text(errors="replace"),
             "plot": base64_of(plot.read_bytes()) if plot.exists() else ""}
            for file, plot in plots.items()]  # fmt: skip


def measure(predictor: Predictor, flags: ReportConfig, meta: dict) -> tuple[dict, list[dict]]:
    """Every number of the page, as --json has them, and the examples."""
    checkpoint, model = Path(flags.checkpoint), predictor.model
    flags, samples = load_questions(flags, how_read(meta["flags"], checkpoint))
    found = predictor.answer(samples)
    answers = [p.answer for p in found]
    log = read_log(checkpoint.absolute().parent / "log.jsonl")  # of the run; [] if there is none
    numbers: dict[str, Any] = {
        "checkpoint": flags.checkpoint, "data": list(flags.data), "split": flags.split,
        "n": len(samples), "scores": score(samples, answers),
        "parameters": count_parameters(model), "experts": [], "blocks": [],
        "router": None, "calibration": None, "load": None,
        "steps": [r for r in log if r.get("phase") == meta["phase"] and "loss" in r],
        "ablations": read_ablations(Path(flags.ablations)),
    }  # fmt: skip
    if moe := model.config.moe:
        blocks = list(sparse_layers(model.config, moe))
        numbers |= {
            "experts": expert_names(moe.n_experts, moe.router), "blocks": blocks,
            "load": load_by_modality(samples, found),
            "router": judge_router(samples, found),
            "calibration": calibration(samples, found, len(blocks)),
        }  # fmt: skip
    chosen = choose(samples, flags.images)
    return numbers, [explain(predictor, samples[i]) for i in chosen]


def training_curves(steps: Sequence[dict], names: Sequence[str]) -> dict[str, dict]:
    """The loss and, where the log has the load, each expert's share, over steps."""
    loss, curves = [r["loss"] for r in steps], {}
    if steps:
        smooth = [np.mean(loss[max(0, i - 9) : i + 1]) for i in range(len(loss))]
        named = {"loss": loss, "mean of the last 10 steps": smooth}
        curves["Loss"] = {"y": "Training loss", "steps": [r["step"] for r in steps], "named": named}
    if kept := [r for r in steps if names and r.get("load")]:
        load = np.array([r["load"] for r in kept])  # (steps, L, E)
        shares = (load / load.sum(axis=-1, keepdims=True).clip(1e-9)).mean(axis=1).T  # (E, steps)
        named, steps = dict(zip(names, shares, strict=True)), [r["step"] for r in kept]
        curves["Load"] = {"y": "Share of tokens", "steps": steps, "named": named}
    return curves


def chart(curve: dict) -> "Figure":
    """Values over the steps, as wide as a phone; means of neighbours where there are many."""
    thin = lambda v: [np.mean(part) for part in np.array_split(v, min(len(v), MOST_POINTS))]  # noqa: E731
    figure = Figure((3.6, 2.2), layout="constrained")
    ax = figure.add_subplot(xlabel="step", ylabel=curve["y"])
    steps, marker = thin(curve["steps"]), "" if len(curve["steps"]) > 1 else "o"
    for i, (name, v) in enumerate(curve["named"].items()):
        style = {"color": COLOURS[i % 8], "linestyle": ("-", "--", ":", "-.")[i % 4]}
        ax.plot(steps, thin(v), marker=marker, label=name, **style)
    ax.set_ylim(bottom=min(0, *map(min, curve["named"].values())))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def drawn(figure: "Figure", dpi: int = 200) -> Image.Image:
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, facecolor="white")
    return Image.open(data).convert("RGB")


def views(e: dict, blocks: Sequence[int]) -> list[dict]:
    """The image, then its patches with the experts of at most MOST_LAYERS sparse layers.

    counts: (expert, how many patches it has), -1 for no expert.
    """
    if e["image"] is None:
        return []
    shown = [{"png": base64_of(png(draw_patches(e["image"]))), "block": None}]
    for layer in sorted({*np.linspace(0, len(blocks) - 1, MOST_LAYERS).round()} if blocks else ()):
        gates = e["patches"][int(layer)]  # (P, E)
        largest, first = gates.max(dim=-1)
        shown.append({
            "png": base64_of(png(draw_patches(e["image"], gates))), "block": blocks[int(layer)],
            "counts": Counter(first.masked_fill(largest == 0, -1).tolist()).most_common(),
        })  # fmt: skip
    return shown


def render(numbers: dict, examples: Sequence[dict], model: Any, meta: dict) -> str:
    """The page: lab/report.html, in which everything is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((HERE / "report.html").read_text(encoding="utf-8"))
    curves = training_curves(numbers["steps"], numbers["experts"])
    return template.render(
        numbers=numbers, meta=meta, model=model, moe=model.moe, names=numbers["experts"],
        place="/".join(Path(numbers["checkpoint"]).parts[-2:]),
        command="from" not in meta and cli.command_line(TrainConfig, meta["flags"], "train.py"),
        examples=[e | {"views": views(e, numbers["blocks"])} for e in examples],
        training={t: c | {"png": base64_of(png(drawn(chart(c))))} for t, c in curves.items()},
    )  # fmt: skip


def overlay_figure(numbers: dict, examples: Sequence[dict]) -> "Figure":
    """The first example of each modality: its image, and the patches in two sparse layers."""
    first = {e["modality"]: e for e in reversed(examples) if e["image"] is not None}.values()
    n_rows, n = max(1, -(-len(first) // 2)), 1 + min(2, len(numbers["blocks"]))
    figure = Figure((4 * n, 0.4 + 2.2 * n_rows))
    key = ", ".join(f"{i} {name}" for i, name in enumerate(numbers["experts"]))
    figure.suptitle(f"The number on a patch is its first expert: {key}")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.87, 0.04, 0.14)
    places = figure.subplots(n_rows, 2 * n, squeeze=False)
    for ax in places.flat:
        ax.set_axis_off()
    for row, e in zip(places.reshape(-1, n)[: len(first)], reversed(first), strict=True):
        for ax, gates in zip(row, [None, *e["patches"][:2]], strict=True):
            ax.imshow(draw_patches(e["image"], gates))
        words = f"{e['modality']}: {e['question']} “{e['answer']}” (truth: {e['truth']})"
        row[0].set_title(words, loc="left")
    return figure


@cli.user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = cli.parse(ReportConfig, argv, "python -m lab.report")
    cli.check_outputs((flags.out, flags.json, flags.png), ())
    if matplotlib is None:
        raise UserError("matplotlib is needed: pip install -r requirements-lab.txt")
    device, dtype = choose_device(flags.device, flags.dtype)
    model, text, meta = load_model(Path(flags.checkpoint), device, dtype, flags.router)
    predictor = Predictor(model, text, device, dtype, flags.batch_size or 64, flags.max_new)
    numbers, examples = measure(predictor, flags, meta)
    with matplotlib.rc_context(SETTINGS):
        if flags.png:
            Path(flags.png).write_bytes(png(drawn(overlay_figure(numbers, examples), 120)))
        else:
            page = render(numbers, examples, model.config, meta)
            cli.write_text(Path(flags.out), page, "--out")
    print(f"{flags.png or flags.out}: {numbers['n']:,} questions")
    if flags.json:
        cli.write_json(Path(flags.json), numbers)
    return numbers


if __name__ == "__main__":
    main()
