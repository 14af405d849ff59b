"""One page on a checkpoint: where its tokens are routed, and whether that makes sense.

    python -m lab.report runs/tiny/phase3 --out report.html
    python -m lab.report runs/tiny/phase3 --png figures

A single HTML file that needs no server, network or script; lab/report.html is its template. --json
writes its numbers, --png its main figures. The questions are the checkpoint's own held-out ones,
or those of --data. Charts are made by matplotlib (requirements-lab.txt). Not a medical device.

Shapes: B batch, T positions, P patches of an image, L sparse layers, E experts, S image side.
"""

import base64
import io
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoint import load_model
from config import IMAGE_ID, MODALITIES, Common, TrainConfig, UserError, argument, flag
from data import Sample
from engine import cli
from engine.run import read_log
from eval import Prediction, Predictor, load_questions, unpack
from lab.router import ece, reliability
from metrics import expert_names, score
from model import MedMoE, autocast, choose_device, count_parameters, generate, sparse_layers
from scoring.compare import value
from scoring.router import judge_router
from sources.load import how_read

HERE = Path(__file__).parent
KINDS = ("image patches", "prompt text", "answer")  # of tokens
N_BINS, MOST_LAYERS, MOST_POINTS = 10, 4, 200  # of confidence; shown of an example; of a curve
INK = "#1c2128"  # of charts; in the page it becomes the text's colour, light or dark
COLOURS = ("#3178d6", "#c2560c", "#1f8a43", "#a04ad9", "#d0388f", "#0c8599", "#8a7400", "#75808b")
SETTINGS = {"font.size": 8, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#8b949e",
            "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "svg.fonttype": "none",
            "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
            "svg.hashsalt": "report"}  # fmt: skip


@dataclass(frozen=True)
class ReportConfig(Common):
    """A page on a checkpoint: load, examples, router, training, ablations."""

    checkpoint: str = argument("DIR of a finished phase")
    out: str = flag("report.html", "the page, FILE.html")
    images: int = flag(8, "examples to show")
    split: Literal["test", "val", "train"] = flag("test", "which questions")
    limit: int | None = flag(None, "only the first N questions")
    max_new: int = flag(48, "longest answer, in tokens")
    router: str | None = flag(None, "replace the router: a name or FILE.py:Class")
    router_level: Literal["trained", "token", "sequence"] = flag("trained", "replace its level")
    ablations: str = flag(str(HERE.parent / "results" / "ablations"), "DIR of tables of ablations")
    png: str | None = flag(None, "also draw the main figures into this DIR")


class PromptLoad:
    """Counts where prompts are routed while `Predictor.answer` runs: row -> (2, L, E).

    It has the methods of engine.routes.RouteRecorder that are called there.
    """

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def replay(self, *_: Any) -> nullcontext:
        return nullcontext()

    def record(self, steps: list, rows: list[int], batch: Any, eos_id: int) -> None:
        if steps[0].routings:
            routed = torch.stack([r.gates != 0 for r in steps[0].routings], dim=1)  # (B, L, T, E)
            is_patch = batch.ids == IMAGE_ID  # (B, T)
            kinds = torch.stack([is_patch, batch.mask & ~is_patch], dim=1)  # (B, 2, T)
            found = (routed[:, None] & kinds[:, :, None, :, None]).sum(dim=3)  # (B, 2, L, E)
            self.found |= dict(zip(rows, found.cpu(), strict=True))


def load_tables(samples: Sequence[Sample], found: Sequence[Prediction], prompts: dict) -> dict:
    """By "modality" and by "kind" of token: name -> (L, E) "shares", (L,) "routed"."""
    groups: dict[str, dict] = {"modality": defaultdict(int), "kind": defaultdict(int)}
    for i, (s, p) in enumerate(zip(samples, found, strict=True)):
        groups["modality"][s.modality or "unknown"] += p.load
        loads = *prompts[i], p.load - prompts[i].sum(dim=0)
        for kind, load in zip(KINDS, loads, strict=True):
            groups["kind"][kind] += load
    shares = lambda t: (t.double() / t.sum(dim=-1, keepdim=True).clamp(min=1)).tolist()  # noqa: E731
    order = [*MODALITIES, "unknown", *KINDS]
    return {
        group: {n: {"shares": shares(tables[n]), "routed": tables[n].sum(dim=-1).tolist()}
                for n in order if n in tables and tables[n].any()}
        for group, tables in groups.items()
    }  # fmt: skip


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
    return {"n": len(right), "ece": ece(*pair, N_BINS) if right else 0.0,
            "bins": [b for b in reliability(*pair, N_BINS) if b["n"]]}  # fmt: skip


def choose(samples: Sequence[Sample], answers: Sequence[str], n: int) -> list[int]:
    """Which questions to show: of each modality one right, one wrong, alternating.

    All of different images, and of different kinds of question as far as there are enough.
    """
    of, chosen = [s.modality or "unknown" for s in samples], []
    names = [name for name in (*MODALITIES, "unknown") if name in of]
    right = [value(s, a, None) == 1 for s, a in zip(samples, answers, strict=True)]
    for i_round, name in product(range(n), names):
        free = [i for i, its in enumerate(of) if its == name and i not in chosen]
        wanted = [i for i in free if right[i] == (i_round % 2 == 0)]
        if (pool := wanted or free) and len(chosen) < n:
            images, kinds = {samples[i].image for i in chosen}, {samples[i].kind for i in chosen}
            used = [(samples[i].image in images, samples[i].kind in kinds) for i in pool]
            chosen.append(pool[used.index(min(used))])
    return sorted(chosen, key=lambda i: names.index(of[i]))


def explain(predictor: Predictor, sample: Sample) -> dict:
    """Answer one question again, by itself -> its texts, image and, per layer, patches' gates."""
    ((_, batch),) = predictor.batches([sample], "example")
    with autocast(predictor.device, predictor.dtype):
        steps = list(generate(predictor.model, batch, predictor.text.eos_id, predictor.max_new))
    answer = unpack(steps, batch.mask, predictor.text)[0].answer
    is_patch = (batch.ids[0] == IMAGE_ID).cpu()  # (T,)
    return {
        "modality": sample.modality or "unknown", "question": sample.turns[0][0],
        "answer": answer, "truth": sample.turns[0][1],
        "verdict": "right" if value(sample, answer, None) == 1 else "wrong",
        "image": None if sample.image is None else predictor.images.get(sample),  # (3, S, S) uint8
        "patches": [r.gates[0].cpu()[is_patch] for r in steps[0].routings],  # (P, E) each
    }  # fmt: skip


def read_steps(checkpoint: Path, phase: int) -> list[dict]:
    """The steps of this phase in the log.jsonl of the checkpoint's run; [] if there is none."""
    records = read_log(checkpoint.absolute().parent / "log.jsonl")
    steps = [r for r in records if isinstance(r, dict) and r.get("phase") == phase]
    return [r for r in steps if isinstance(r.get("loss"), float) and math.isfinite(r["loss"])]


def read_ablations(folder: Path) -> list[dict]:
    """The tables that lab.ablate wrote into the folder, as text, and their plots."""
    found = []
    for file in sorted(folder.glob("*.md")):
        text, plot = file.read_text(errors="replace"), file.with_suffix(".png")
        lines = [line[2:-2] for line in text.splitlines() if line.startswith("| ")]
        if lines:
            head, *rows = (line.split(" | ") for line in lines)
            found.append({"name": file.stem, "words": text.partition("\n")[0].replace("`", ""),
                          "head": head, "rows": rows,
                          "plot": text_of(plot.read_bytes()) if plot.exists() else ""})  # fmt: skip
    return found


def measure(predictor: Predictor, flags: ReportConfig, meta: dict) -> tuple[dict, list[dict]]:
    """Every number of the page, as --json has them, and the examples."""
    checkpoint, model, prompts = Path(flags.checkpoint), predictor.model, PromptLoad()
    flags, samples = load_questions(flags, how_read(meta["flags"], checkpoint))
    found = predictor.answer(samples, recorder=prompts)
    answers = [p.answer for p in found]
    numbers: dict[str, Any] = {
        "checkpoint": flags.checkpoint, "data": list(flags.data), "split": flags.split,
        "n": len(samples), "scores": score(samples, answers),
        "parameters": count_parameters(model), "experts": [], "blocks": [],
        "router": None, "calibration": None, "load": None,
        "steps": read_steps(checkpoint, meta["phase"]),
        "ablations": read_ablations(Path(flags.ablations)),
    }  # fmt: skip
    if moe := model.config.moe:
        is_named = moe.router in ("modality", "oracle") and moe.n_experts <= len(MODALITIES)
        numbered = [f"expert {e}" for e in range(moe.n_experts)]
        blocks = list(sparse_layers(model.config, moe))
        numbers |= {
            "experts": expert_names(moe.n_experts) if is_named else numbered, "blocks": blocks,
            "load": load_tables(samples, found, prompts.found),
            "router": judge_router(samples, found),
            "calibration": calibration(samples, found, len(blocks)),
        }  # fmt: skip
    chosen = choose(samples, answers, flags.images)
    return numbers, [explain(predictor, samples[i]) for i in chosen]


def new_figure(width: float, height: float, layout: str | None = None) -> Any:
    from matplotlib.figure import Figure  # only the lab needs it

    return Figure((width, height), layout=layout)


def axes(x: str, y: str, height: float = 2.2) -> tuple[Any, Any]:
    """A chart as wide as a phone: matplotlib's figure and its axes."""
    figure = new_figure(3.6, height, "constrained")
    ax = figure.add_subplot(xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    return figure, ax


def curves(named: dict[str, Any], steps: Sequence[int], y: str) -> tuple[Any, str]:
    """Values over the steps, means of neighbours where there are many -> the chart and its text."""
    figure, ax = axes("step", y)
    thin = lambda v: [np.mean(part) for part in np.array_split(v, min(len(v), MOST_POINTS))]  # noqa: E731
    for i, (name, v) in enumerate(named.items()):
        style = {"color": COLOURS[i % 8], "linestyle": ("-", "--", ":", "-.")[i % 4]}
        ax.plot(thin(steps), thin(v), marker="" if len(v) > 1 else "o", label=name, **style)
    ax.set_ylim(bottom=min(0, *map(min, named.values())))
    figure.legend(loc="outside lower center", ncols=2)
    words = (f"{name} from {v[0]:.3f} to {v[-1]:.3f}, between {min(v):.3f} and {max(v):.3f}"
             for name, v in named.items())  # fmt: skip
    return figure, f"{y} over steps {steps[0]} to {steps[-1]}: {'; '.join(words)}."


def training(steps: Sequence[dict], names: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Charts of the loss and, where the log has the load, of each expert's share and balance.

    CV: standard deviation over mean; MaxVio: largest over mean, minus 1 (arXiv 2408.15664).
    """
    if not steps:
        return {}
    at, loss = [r["step"] for r in steps], [r["loss"] for r in steps]
    smooth = [np.mean(loss[max(0, i - 9) : i + 1]) for i in range(len(loss))]
    named = {"loss": loss, "mean of the last 10 steps": smooth}
    found = {"Loss": curves(named, at, "Training loss")}
    if kept := [r for r in steps if names and r.get("load")]:
        at, load = [r["step"] for r in kept], np.array([r["load"] for r in kept])  # (steps, L, E)
        mean = load.mean(axis=-1).clip(1e-9)
        shares = (load / mean[..., None]).mean(axis=1).T / len(names)  # (E, steps)
        found["Load"] = curves(dict(zip(names, shares, strict=True)), at, "Share of routed tokens")
        balance = {"CV": (load.std(axis=-1) / mean).mean(axis=1),
                   "MaxVio": (load.max(axis=-1) / mean - 1).mean(axis=1)}  # fmt: skip
        found["Balance"] = curves(balance, at, "CV, MaxVio")
    return found


def reliability_chart(found: dict) -> tuple[Any, str]:
    """Accuracy over confidence: a bar is a bin, its dot the mean, the diagonal is calibrated."""
    figure, ax = axes("confidence: softmax of the likeliest expert", "accuracy", 2.8)
    low, confidence, accuracy = ([b[k] for b in found["bins"]]
                                 for k in ("low", "confidence", "accuracy"))  # fmt: skip
    ax.bar(low, accuracy, 1 / N_BINS, align="edge", color=COLOURS[0], alpha=0.4, edgecolor=INK)
    ax.plot([0, 1], [0, 1], color="#8b949e", linestyle="--", linewidth=1)
    ax.plot(confidence, accuracy, "o", color=COLOURS[1])
    ax.set(xlim=(0, 1), ylim=(0, 1.04))
    return figure, (f"Reliability diagram of {found['n']} images, expected calibration error "
                    f"{found['ece']:.3f}; the table below has its numbers.")  # fmt: skip


def first_experts(patches: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gates (P, E) -> each patch's expert, -1 where it is routed to none, and that one's gate."""
    gates, first = patches.max(dim=-1)
    return first.masked_fill(gates == 0, -1).numpy(), gates.numpy()


def describe(patches: Tensor, names: Sequence[str]) -> str:
    """The text alternative of an overlay."""
    first, gates = first_experts(patches)
    parts = [f"{n} to {f'expert {e}, {names[e]}' if e >= 0 else 'no expert'} "
             f"(mean gate {gates[first == e].mean():.2f})"
             for e, n in Counter(first.tolist()).most_common()]  # fmt: skip
    return f"Of {len(first)} patches, by their first expert: {'; '.join(parts)}."


def overlay(ax: Any, image: Tensor, patches: Tensor | None, inches: float) -> None:
    """The image; with its patches' gates (P, E), the number of each one's first expert on it."""
    from matplotlib.colors import to_rgba_array
    from matplotlib.patheffects import withStroke

    ax.set_axis_off()
    ax.imshow(image.permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0))
    if patches is None:
        return
    first, gates = first_experts(patches)
    n = math.isqrt(len(first))
    tint = to_rgba_array([*COLOURS, "black"])[np.where(first < 0, 8, first % 8)]  # (P, 4)
    tint[:, 3] = 0.1 + 0.4 * gates
    ax.imshow(tint.reshape(n, n, 4), extent=(0, 1, 1, 0), interpolation="nearest")
    edge = [withStroke(linewidth=8 * inches / n, foreground="black")]
    for i, e in enumerate(first):
        ax.text((i % n + 0.5) / n, (i // n + 0.5) / n, "-" if e < 0 else str(e), color="white",
                ha="center", va="center_baseline", weight="bold", fontsize=36 * inches / n,
                path_effects=edge)  # fmt: skip


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(figure: Any, dpi: int) -> bytes:
    """The figure on white, in at most 200 colours."""
    data, small = io.BytesIO(), io.BytesIO()
    figure.savefig(data, dpi=dpi, facecolor="white")
    image = Image.open(data).convert("RGB").quantize(200, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def svg(figure: Any, words: str) -> dict[str, str]:
    """A chart as inline SVG in the page's colours; words: its text alternative."""
    data = io.StringIO()
    figure.savefig(data, format="svg", transparent=True)
    text = data.getvalue()[data.getvalue().index("<svg") :]
    text = re.sub(r'<(metadata|style).*?</\1>| xmlns[:\w]*="[^"]*"| (width|height)="[\d.]+pt"', "",
                  text, flags=re.DOTALL)  # fmt: skip
    own = f"c{zlib.crc32(words.encode())}-"  # identifiers that no other chart of a page has
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{own}", text)
    return {"svg": text.replace(INK, "currentColor"), "alt": words}


def views(e: dict, numbers: dict) -> list[dict]:
    """The image, then its patches with the experts of at most MOST_LAYERS sparse layers."""
    if e["image"] is None:
        return []
    blocks, shown, size = numbers["blocks"], [], 2.4
    found = [(None, "the image", f"{e['modality']} image of the question")]
    layers = np.linspace(0, len(blocks) - 1, MOST_LAYERS).round().astype(int)
    for layer in np.unique(layers) if blocks else []:
        gates = e["patches"][layer]
        found.append((gates, f"block {blocks[layer]}", describe(gates, numbers["experts"])))
    for gates, title, words in found:
        figure = new_figure(size, size)
        overlay(figure.add_axes((0, 0, 1, 1)), e["image"], gates, size)
        shown.append({"png": text_of(png(figure, 120)), "title": title, "alt": words})
    return shown


def render(numbers: dict, examples: Sequence[dict], model: MedMoE, meta: dict) -> str:
    """The page: lab/report.html, in which everything is escaped."""
    import jinja2  # comes with torch

    moe, found = model.config.moe, numbers["calibration"]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((HERE / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=f"Routing report: {'/'.join(Path(numbers['checkpoint']).parts[-2:])}",
        numbers=numbers, meta=meta, model=model.config, moe=moe, names=numbers["experts"],
        trained=f"converted from {meta['from']}" if "from" in meta
                else cli.command_line(TrainConfig, meta["flags"], "train.py"),
        unit="sample" if moe and moe.level == "sequence" else "token",
        examples=[e | {"views": views(e, numbers)} for e in examples],
        reliability=svg(*reliability_chart(found)) if found else None,
        training={title: svg(*chart) for title, chart in
                  training(numbers["steps"], numbers["experts"]).items()},
    )  # fmt: skip


def load_figure(numbers: dict) -> Any:
    """Each expert's share of the routed tokens, by modality and by kind of token."""
    blocks, names = numbers["blocks"], numbers["experts"]
    figure = new_figure(8, 6, "constrained")
    for ax, (group, tables) in zip(figure.subplots(2), numbers["load"].items(), strict=True):
        shares = [found["shares"][i] for i in range(len(blocks)) for found in tables.values()]
        rows = [f"block {block}, {name}" for block in blocks for name in tables]
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            ax.text(column, row, f"{100 * share:.1f} %", ha="center", va="center")
        ax.set(xticks=range(len(names)), xticklabels=[f"{name} expert" for name in names],
               yticks=range(len(rows)), yticklabels=rows)  # fmt: skip
        ax.set_title(f"Share of routed tokens by {group}", loc="left", weight="bold")
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
    return figure


def overlay_figure(numbers: dict, examples: Sequence[dict]) -> Any:
    """The first example of each modality: its image, and the patches in two sparse layers."""
    first = {e["modality"]: e for e in reversed(examples) if e["image"] is not None}.values()
    n_rows, n = max(1, -(-len(first) // 2)), 1 + min(2, len(numbers["blocks"]))
    figure = new_figure(4 * n, 0.4 + 2.2 * n_rows)
    key = ", ".join(f"{i} {name}" for i, name in enumerate(numbers["experts"]))
    figure.suptitle(f"The number on a patch is its first expert: {key}")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.87, 0.04, 0.14)
    places = figure.subplots(n_rows, 2 * n, squeeze=False).reshape(-1, n)
    for ax in places.flat:
        ax.set_axis_off()
    for row, e in zip(places, reversed(first), strict=False):
        for ax, gates in zip(row, [None, *e["patches"]], strict=False):
            overlay(ax, e["image"], gates, 1.9)
        words = f"{e['modality']}: {e['question']} “{e['answer']}” (truth: {e['truth']})"
        row[0].set_title(words, loc="left")
    return figure


def draw_figures(numbers: dict, examples: Sequence[dict], folder: Path) -> None:
    """load.png, overlays.png and, where modalities are known, calibration.png."""
    figures = {"load": load_figure(numbers), "overlays": overlay_figure(numbers, examples)}
    if numbers["calibration"]["n"]:
        figures["calibration"] = reliability_chart(numbers["calibration"])[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(png(figure, 200))
        print(folder / f"{name}.png")


@cli.user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = cli.parse(ReportConfig, argv, "python -m lab.report")
    cli.at_least(flags, images=1, limit=1, max_new=1, batch_size=1, max_missing=0)
    cli.check_outputs((flags.out, flags.json), ())
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is needed: pip install -r requirements-lab.txt") from error
    device, dtype = choose_device(flags.device, flags.dtype)
    model, text, meta = load_model(
        Path(flags.checkpoint), device, dtype, flags.router, flags.router_level
    )
    if flags.png and model.config.moe is None:
        raise UserError(f"--png {flags.png}: the checkpoint is dense, no routing to draw")
    predictor = Predictor(model, text, device, dtype, flags.batch_size or 64, flags.max_new)
    numbers, examples = measure(predictor, flags, meta)
    with matplotlib.rc_context(SETTINGS):
        page = render(numbers, examples, model, meta)
        cli.write_text(Path(flags.out), page, "--out")
        print(f"{flags.out}  {len(page.encode()) / 1000:,.0f} kB, {numbers['n']:,} questions")
        if flags.png:
            draw_figures(numbers, examples, Path(flags.png))
    if flags.json:
        cli.write_json(Path(flags.json), numbers)
    return numbers


if __name__ == "__main__":
    main()
