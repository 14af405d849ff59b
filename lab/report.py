"""One page on a checkpoint: where its tokens are routed, and whether that makes sense.

    python -m lab.report runs/tiny/phase3 --out report.html
    python -m lab.report runs/tiny/phase3 --png figures

A single HTML file that needs no server, no network and no script: expert load, examples token by
token, the router's confusion and calibration, training, router saturation, tables of ablations.
--json writes its numbers, --png its main figures (with an installed Chromium). The questions are
the checkpoint's own held-out ones, or those of --data. Not a medical device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoint import load_model
from config import MODALITIES, Common, TrainConfig, UserError, argument, flag
from engine.cli import (
    at_least,
    check_writable,
    command_line,
    parse,
    user_errors,
    write_json,
    write_text,
)
from eval import Predictor, load_questions
from lab.report_history import read_ablations, read_steps, saturation
from lab.report_numbers import (
    Example,
    calibration,
    choose,
    explain,
    follow,
    load_tables,
    router_confidence,
)
from lab.report_page import Html, document, facts, join, percent, tag
from lab.report_png import draw_figures, find_chromium
from lab.report_sections import examples_section, interval, load_section, router_section
from lab.report_training import ablation_section, saturation_section, training_section
from metrics import score
from model import MedMoE, choose_device, count_parameters, sparse_layers
from scoring.router import judge_router
from sources.load import how_read

ROOT = Path(__file__).parent.parent
WARNING = ("Teaching material, not a medical device. Nothing here may be used to diagnose or "
           "treat anyone.")  # fmt: skip


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
    ablations: str = flag(str(ROOT / "results" / "ablations"), "DIR of tables of ablations")
    png: str | None = flag(None, "also draw the main figures into this DIR, with Chromium")


def expert_names(model: MedMoE) -> list[str]:
    """A modality where the router is trained on modalities, else the number; [] if dense."""
    moe = model.config.moe
    if moe is None:
        return []
    is_named = moe.router in ("modality", "oracle") and moe.n_experts <= len(MODALITIES)
    return [MODALITIES[e] if is_named else f"expert {e}" for e in range(moe.n_experts)]


def measure(predictor: Predictor, flags: ReportConfig, meta: dict) -> tuple[dict, list[Example]]:
    """Every number of the page, as --json has them, and the examples."""
    checkpoint, model = Path(flags.checkpoint), predictor.model
    flags, samples = load_questions(flags, how_read(meta["flags"], checkpoint))
    traces = follow(predictor, samples)
    found = [trace.prediction for trace in traces]
    answers = [p.answer for p in found]
    moe = model.config.moe
    blocks = list(sparse_layers(model.config, moe)) if moe else []
    numbers: dict[str, Any] = {
        "checkpoint": flags.checkpoint, "data": list(flags.data), "split": flags.split,
        "n": len(samples), "scores": score(samples, answers),
        "parameters": count_parameters(model), "experts": expert_names(model), "blocks": blocks,
        "router": None, "calibration": None, "load": None,
    }  # fmt: skip
    if moe:
        numbers["load"] = load_tables(samples, traces)
        numbers["router"] = judge_router(samples, found)
        numbers["calibration"] = calibration(*router_confidence(samples, found, len(blocks)))
    numbers["saturation"] = saturation(checkpoint, meta, predictor, samples)
    numbers["steps"] = read_steps(checkpoint, meta["phase"])
    numbers["ablations"] = read_ablations(Path(flags.ablations))
    chosen = choose(samples, answers, flags.images)
    return numbers, [explain(predictor, samples[i]) for i in chosen]


def header(numbers: dict, model: MedMoE, meta: dict) -> Html:
    """What the checkpoint is."""
    moe, counts, scores = model.config.moe, numbers["parameters"], numbers["scores"]
    trained = (f"converted from {meta['from']}" if "from" in meta
               else command_line(TrainConfig, meta["flags"], "train.py"))  # fmt: skip
    router = "none: the model is dense"
    if moe:
        kind = "token" if moe.level == "token" else "sample"
        router = (f"{moe.router}, {moe.n_experts} experts, {moe.top_k} per {kind}, "
                  f"in blocks {', '.join(map(str, numbers['blocks']))}")  # fmt: skip
    share = counts["activated"] / counts["total"]
    results = ", ".join(
        f"{name} {percent(scores[key])} {interval(scores['ci95'][key])}"
        for name, key, n in (("closed", "closed_accuracy", scores["n_closed"]),
                             ("open (recall)", "open_recall", scores["n_open"])) if n
    )  # fmt: skip
    return join(
        tag("p", WARNING, class_="warning"),
        facts([
            ("checkpoint", numbers["checkpoint"]),
            ("preset, phase", f"{meta['flags']['preset']}, {meta['phase']}"),
            ("decoder", f"{model.config.decoder.family}, {model.config.decoder.n_layers} blocks"),
            ("trained with", tag("code", trained)),
            ("router", router),
            ("parameters", f"{counts['total']:,} in all, {counts['activated']:,} activated per "
                           f"token ({percent(share)})"),
            ("evaluated on", f"{numbers['n']:,} questions of {' '.join(numbers['data'])}, "
                          f"{numbers['split']} split"),
            ("scores", results),
        ]),
    )  # fmt: skip


def render(numbers: dict, examples: Sequence[Example], model: MedMoE, meta: dict) -> str:
    names, blocks, moe = numbers["experts"], numbers["blocks"], model.config.moe
    level = model.decoder.blocks[blocks[0]].mlp.router.level if moe and blocks else "token"
    steps = numbers["steps"]
    last = steps[-1]["step"] + 1 if steps else None
    is_named = moe is not None and moe.router in ("modality", "oracle")
    parts = [
        load_section(numbers["load"], names, blocks),
        examples_section(examples, names, blocks, level),
        router_section(numbers["router"], numbers["calibration"], is_named),
        training_section(steps, names, meta["phase"]),
        saturation_section(numbers["saturation"], blocks, last),
        ablation_section(numbers["ablations"]),
    ]
    where = "/".join(Path(numbers["checkpoint"]).parts[-2:])
    title = f"Routing report: {where}"
    return document(title, header(numbers, model, meta), parts, WARNING)


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(ReportConfig, argv, "python -m lab.report")
    at_least(flags, images=1, limit=1, max_new=1, batch_size=1, max_missing=0)
    for file in filter(None, (flags.out, flags.json)):
        check_writable(Path(file))
    if flags.json and Path(flags.json).absolute() == Path(flags.out).absolute():
        raise UserError(f"--json {flags.json}: is the page, --out")
    chromium = find_chromium() if flags.png else None  # before the work, not after it
    device, dtype = choose_device(flags.device, flags.dtype)
    wanted = Path(flags.checkpoint), device, dtype, flags.router, flags.router_level
    model, text, meta = load_model(*wanted)
    if flags.png and model.config.moe is None:
        raise UserError(f"--png {flags.png}: the checkpoint is dense, no routing to draw")
    predictor = Predictor(model, text, device, dtype, flags.batch_size or 64, flags.max_new)
    numbers, examples = measure(predictor, flags, meta)
    written = render(numbers, examples, model, meta)
    write_text(Path(flags.out), written, "--out")
    print(f"{flags.out}  {len(written.encode()) / 1000:,.0f} kB, {len(examples)} examples, "
          f"{numbers['n']:,} questions")  # fmt: skip
    if flags.png:
        for file in draw_figures(numbers, examples, Path(flags.png), chromium):
            print(f"{file}  {file.stat().st_size / 1000:.0f} kB")
    if flags.json:
        write_json(Path(flags.json), numbers)
    return numbers


if __name__ == "__main__":
    main()
