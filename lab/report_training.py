"""The sections of a report on training, router saturation and ablations."""

from collections.abc import Sequence

from lab import svg
from lab.report_history import N_FOLLOWED, balance
from lab.report_page import Html, note, percent, section, table, tag
from lab.report_sections import NO_ROUTER, Part

MOST_POINTS = 200  # of a curve


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of them: means of equally many neighbours."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def curves(named: dict[str, list[float]], steps: Sequence[int], title: str, y: str) -> Html:
    """A chart of values over the steps; its text has their first, last, least and largest."""
    parts = [f"{name} from {v[0]:.3f} to {v[-1]:.3f}, between {min(v):.3f} and {max(v):.3f}"
             for name, v in named.items()]  # fmt: skip
    series = [svg.Series(n, thin(list(zip(steps, v, strict=True)))) for n, v in named.items()]
    words = f"{title} over steps {steps[0]} to {steps[-1]}: {'; '.join(parts)}."
    return Html(svg.lines(series, title, words, "step", y))


def load_history(records: Sequence[dict], names: Sequence[str]) -> dict:
    """Records with a load -> steps, each expert's mean share over the layers, CV and MaxVio."""
    kept = [r for r in records if is_load(r.get("load"), len(names))]
    load: dict = {"steps": [r["step"] for r in kept], "shares": {n: [] for n in names}}
    for r in kept:
        layers = [[v / (sum(row) or 1) for v in row] for row in r["load"]]
        for e, name in enumerate(names):
            load["shares"][name].append(sum(row[e] for row in layers) / len(layers))
    balances = [balance(r["load"]) for r in kept]
    return load | {key: [b[key] for b in balances] for key in ("cv", "max_vio")}


def is_load(value: object, n_experts: int) -> bool:
    """Whether it is a non-empty (L, E) list of numbers."""
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(
        isinstance(row, list) and len(row) == n_experts
        and all(isinstance(v, int | float) for v in row) for row in rows
    )  # fmt: skip


def training_section(records: Sequence[dict], names: Sequence[str], phase: int) -> Part:
    """Loss, and where the log has them load and balance."""
    title = "Training"
    if not records:
        return section("training", title, note(
            f"No log.jsonl with steps of phase {phase} lies beside this checkpoint."))  # fmt: skip
    steps, loss = [r["step"] for r in records], [r["loss"] for r in records]
    smooth = [sum(w) / len(w) for w in (loss[max(0, i - 9) : i + 1] for i in range(len(loss)))]
    both = {"loss": loss, "mean of the last 10 steps": smooth}
    parts = [
        tag("h3", "Loss"),
        curves(both, steps, "Training loss", "loss"),
    ]
    if not names:
        return section("training", title, *parts)
    load = load_history(records, names)
    if not load["steps"]:
        parts.append(note("This run's log has no load: it is of an older version."))
        return section("training", title, *parts)
    parts += [
        tag("h3", "Load"),
        tag("p", "Each expert's share of the routed tokens, a mean over the sparse blocks."),
        curves(load["shares"], load["steps"], "Load in training", "share of routed tokens"),
        tag("h3", "Balance"),
        tag("p", "CV is the standard deviation of the experts' loads over their mean; MaxVio is "
                 "the largest load over the mean, minus 1. Both are 0 when balanced."),
        curves({"CV": load["cv"], "MaxVio": load["max_vio"]}, load["steps"],
               "Balance in training", "CV, MaxVio"),
    ]  # fmt: skip
    return section("training", title, *parts)


def saturation_section(points: Sequence[dict], blocks: Sequence[int], last: int | None) -> Part:
    """How early in training the routing is the final one."""
    title = "Router saturation"
    if not blocks:
        return section("saturation", title, note(NO_ROUTER))
    if not points:
        return section("saturation", title, note(
            "No earlier point to compare with: no step checkpoints of phase 3 lie in the run's "
            "folder (a finished run deletes them), and its start cannot be made from phase 2, "
            "which is missing, or the router was trained after it."))  # fmt: skip
    n = points[0]["tokens"]
    intro = (f"Share of {n:,} prompt positions (of at most {N_FOLLOWED} held-out questions) whose "
             "first expert at an earlier point is the final one.")  # fmt: skip
    rows = [[f"step {p['step']}", *map(percent, p["same"])] for p in points]
    parts = [tag("p", intro), table("First expert the same as at the end",
                                    ["point", *(f"block {b}" for b in blocks)], rows)]  # fmt: skip
    if not any(p["step"] for p in points):
        parts.append(note(
            "Step 0 is phase 2's model with this router. No step checkpoints of phase 3 lie in "
            "the run's folder: a finished run deletes them."))  # fmt: skip
    elif last:
        ends = [*points, {"step": last, "same": [1.0] * len(blocks)}]
        named = {f"block {b}": [p["same"][i] for p in ends] for i, b in enumerate(blocks)}
        parts.append(curves(named, [p["step"] for p in ends], "Tokens that keep their first expert",
                            "share the same"))  # fmt: skip
    return section("saturation", title, *parts)


def ablation_cell(found: dict) -> str:
    spread = "" if found["sd"] is None else f" ± {100 * found['sd']:.1f}"
    return f"{100 * found['mean']:.1f}{spread}"


def ablation_table(found: dict) -> Html:
    rows = []
    for row in found["rows"]:
        against = row["against"]
        difference = "-"
        if against:
            low, high = (100 * end for end in against["ci95"])
            difference = f"{100 * against['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            difference += f" against {against['row']}"
        counts = row["parameters"]
        rows.append([row["title"], *(ablation_cell(row[p]) for p in ("together", "closed", "open")),
                     difference, row["n_seeds"], f"{counts['total']:,}",
                     f"{counts['activated']:,}"])  # fmt: skip
    head = ["what", "together, %", "closed, %", "open, %", "difference, points [95 %]", "seeds",
            "parameters", "activated"]  # fmt: skip
    return table(f"Ablations, {found['name']}: mean and standard deviation over seeds", head, rows)


def ablation_section(tables: Sequence[dict]) -> Part:
    title = "Ablations"
    if not tables:
        return section("ablations", title, note("There are no tables of ablations yet."))
    parts: list = []
    for found in tables:
        rows = [svg.Bar(row["title"], 100 * row["against"]["difference"],
                        *(100 * end for end in row["against"]["ci95"]))
                for row in found["rows"] if row["against"]]  # fmt: skip
        seeds = ", ".join(map(str, found["seeds"]))
        parts += [tag("h3", found["name"]),
                  tag("p", tag("code", found["command"]), f", seeds {seeds}"),
                  ablation_table(found)]  # fmt: skip
        if rows:
            ends = [v for bar in rows for v in (bar.value, bar.low, bar.high)]
            text = "; ".join(f"{b.name} {b.value:+.1f} [{b.low:+.1f}, {b.high:+.1f}]" for b in rows)
            parts.append(Html(svg.bars(rows, f"Differences, {found['name']}",
                                       f"In points, with 95 % intervals: {text}.",
                                       (min(0.0, *ends), max(0.0, *ends)))))  # fmt: skip
    return section("ablations", title, *parts)
