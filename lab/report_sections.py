"""The sections of a report: numbers -> markup, with a note where there is nothing to show."""

import base64
import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from lab import svg
from lab.report_numbers import Example
from lab.report_page import Html, facts, heat, note, percent, section, table, tag

Part = tuple[str, str, Html]
LARGEST = 224  # pixels a side of an embedded image
MOST_LAYERS = 4  # layers whose patches are shown
NO_ROUTER = "This checkpoint is dense: it has no router and no experts."


def interval(ci95: Sequence[float]) -> str:
    return f"[{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def load_section(load: dict, names: Sequence[str], blocks: Sequence[int]) -> Part:
    """Where tokens are routed: by modality of the image, and by kind of token."""
    if not names:
        return section("load", "Expert load", note(NO_ROUTER))
    words = "Each expert's share of a sparse block's routed tokens. A row adds up to 100 %."
    parts = [tag("p", f"{words} The stronger the tint, the larger the share.")]
    titles = {"modality": "by modality of the image", "kind": "by kind of token"}
    for group, title in titles.items():
        parts.append(load_table(f"Share of routed tokens {title}", load[group], names, blocks))
    return section("load", "Expert load", *parts)


def load_table(caption: str, tables: dict, names: Sequence[str], blocks: Sequence[int]) -> Html:
    rows = []
    for layer, block in enumerate(blocks):
        for i, (name, found) in enumerate(tables.items()):
            cells = [tag("th", name, scope="row"), *map(heat, found["shares"][layer])]
            cells.append(f"{found['routed'][layer]:,}")
            first = tag("th", f"block {block}", scope="rowgroup", rowspan=len(tables))
            rows.append(cells if i else [first, *cells])
    experts = [n if n.startswith("expert ") else f"{n} expert" for n in names]
    head = ["block", "tokens of", *experts, "routed tokens"]
    return table(caption, head, rows, "second")


def embed(image: Tensor) -> str:
    """(3, S, S) uint8 -> a PNG as a data URI, at most LARGEST pixels a side."""
    small = Image.fromarray(image.permute(1, 2, 0).numpy())
    small.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def named(expert: int, names: Sequence[str]) -> str:
    return names[expert] if names[expert].startswith("expert ") else f"{expert} {names[expert]}"


def describe_patches(cells: Sequence[tuple[int, float]], names: Sequence[str]) -> str:
    """The text alternative of an overlay."""
    parts = []
    for expert in sorted({e for e, _ in cells}, key=lambda e: -sum(x == e for x, _ in cells)):
        gates = [gate for e, gate in cells if e == expert]
        where = f"to expert {expert}, {names[expert]}" if expert >= 0 else "to no expert"
        parts.append(f"{len(gates)} {where} (mean gate {sum(gates) / len(gates):.2f})")
    return f"Of {len(cells)} patches, by their first expert: " + "; ".join(parts) + "."


def shown_layers(blocks: Sequence[int]) -> list[int]:
    """All sparse layers, or MOST_LAYERS of them from the first to the last."""
    last = len(blocks) - 1
    if last < MOST_LAYERS:
        return list(range(last + 1))
    return [round(i * last / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)]


def views(e: Example, number: int, names: Sequence[str], blocks: Sequence[int]) -> Html:
    """The image, then its patches with the experts that each sparse layer routes them to."""
    if e.image is None:
        return note("This question has no image.")
    name, side = f"image-{number}", LARGEST
    image = (f'<image id="{name}" width="{side}" height="{side}" href="{embed(e.image)}" '
             f'preserveAspectRatio="none"/>')  # fmt: skip
    what = f"{e.sample.modality or 'Medical'} image of example {number}"
    plain = svg.figure(image, what, f"The image of the question: {e.sample.turns[0][0]}",
                       side, side, "overlay")  # fmt: skip
    figures = [tag("figure", Html(plain), tag("figcaption", "the image"))]
    for layer in shown_layers(blocks):
        gates, first = e.patches[layer].max(dim=-1)  # (P,) both
        cells = [(int(expert) if gate > 0 else -1, float(gate))
                 for gate, expert in zip(gates, first, strict=True)]  # fmt: skip
        title = f"Example {number}, first expert of each patch in block {blocks[layer]}"
        use = f'<use href="#{name}"/>'
        overlay = svg.patches(use, side, cells, title, describe_patches(cells, names))
        figures.append(tag("figure", Html(overlay), tag("figcaption", f"block {blocks[layer]}")))
    return tag("div", *figures, class_="views")


def chosen_experts(gates: Tensor, names: Sequence[str]) -> str:
    """gates (E,) -> its experts, the largest gate first."""
    experts = [int(i) for i in gates.argsort(descending=True) if gates[i] > 0]
    shown = [f"{gates[i]:.2f}" if gates[i] >= 0.005 else "<0.01" for i in experts]
    parts = [f"{named(i, names)} {gate}" for i, gate in zip(experts, shown, strict=True)]
    return " + ".join(parts) or "none"


def token_table(e: Example, number: int, names: Sequence[str], blocks: Sequence[int]) -> Html:
    rows = []
    for token, gates in zip(e.tokens, e.gates, strict=True):
        cells = ["not an input"] * len(blocks)
        if gates is not None:
            cells = [chosen_experts(g, names) for g in gates]
        rows.append([tag("code", token), *cells])
    if not rows:
        return note("The answer is empty: the first token was the end token.")
    head = ["token", *(f"block {block}" for block in blocks)]
    return table(f"Example {number}, its answer token by token: experts and gates", head, rows,
                 "words")  # fmt: skip


def example(e: Example, number: int, names: Sequence[str], blocks: Sequence[int]) -> Html:
    verdict = ("✓ right", "good") if e.is_right else ("✗ wrong", "bad")
    title = e.sample.modality or "modality unknown"
    return tag(
        "article",
        tag("h3", f"{number}. {title}: ", tag("span", verdict[0], class_=verdict[1]),
            id=f"example-{number}"),
        facts([("question", e.sample.turns[0][0]), ("answer", e.answer or "(empty)"),
               ("truth", e.sample.turns[0][1])]),
        views(e, number, names, blocks),
        token_table(e, number, names, blocks) if names else "",
    )  # fmt: skip


def examples_section(found: Sequence[Example], names: Sequence[str], blocks, level: str) -> Part:
    links = [
        tag("li", tag("a", f"{i}. {e.sample.modality or 'unknown'}, "
                           f"{'right' if e.is_right else 'wrong'}", href=f"#example-{i}"))
        for i, e in enumerate(found, 1)
    ]  # fmt: skip
    intro = ("Right and wrong ones of each modality, chosen to show both: their share here is not "
             "the model's accuracy.")  # fmt: skip
    more = ["The number on a patch is the expert with its largest gate, "
            + ", ".join(f"{i} {name}" for i, name in enumerate(names))
            + ": the tint is stronger for a larger gate. A token's experts are those that it is "
              "routed to as the input for the next one."] if names else [NO_ROUTER]  # fmt: skip
    if level == "sequence":
        more.append(
            "This router decides once per sample: all patches and tokens have the same experts."
        )
    if len(blocks) > MOST_LAYERS:
        more.append(f"Of {len(blocks)} sparse blocks {MOST_LAYERS} are shown; the tables have all.")
    cards = [example(e, i, names, blocks) for i, e in enumerate(found, 1)]
    return section("examples", "Examples", tag("p", intro), *map(note, more),
                   tag("ul", *links, class_="examples"), *cards)  # fmt: skip


def router_section(report: dict | None, calibrated: dict | None, is_named: bool) -> Part:
    """Accuracy and calibration of the router as a classifier of the modality."""
    title = "Router and modality"
    if report is None:
        return section("router", title, note(NO_ROUTER))
    if not report["n"]:
        return section("router", title, note("The data has no modality labels, so there is "
                                             "nothing to count here."))  # fmt: skip
    parts = [facts([
        ("images", f"{report['n']:,}"),
        ("accuracy", f"{percent(report['accuracy'])} {interval(report['ci95'])}, "
                          "95 % interval by Wilson"),
        ("calibration error (ECE)", f"{calibrated['ece']:.3f}"),
    ])]  # fmt: skip
    if not is_named:
        parts.insert(0, note(
            "This router was not trained on modality labels (expert 0 for CT, 1 for MRI, and so "
            "on): a low accuracy is no fault."))  # fmt: skip
    rows = []
    for name, row in zip(report["labels"], report["confusion"], strict=True):
        total, f1 = sum(row), report["f1"][name]
        cells = [heat(n / total if total else 0.0, f"{n:,}") for n in row]
        rows.append([name, *cells, "-" if f1 is None else f"{f1:.3f}"])
    head = ["true modality", *(f"predicted {name}" for name in report["labels"]), "F1"]
    parts += [
        table("Confusion: rows are the truth, columns the likeliest expert; images", head, rows),
        tag("h3", "Calibration"),
        tag("p", "Accuracy over confidence, in bins of confidence. Confidence is the largest "
                 "softmax of the logits' mean over an image's prompts and sparse blocks."),
        calibration_chart(calibrated),
        calibration_table(calibrated),
    ]  # fmt: skip
    return section("router", title, *parts)


def calibration_chart(found: dict) -> Html:
    words = (f"Reliability diagram of {found['n']} images, expected calibration error "
             f"{found['ece']:.3f}; the table below has its numbers.")  # fmt: skip
    return Html(svg.reliability(found["bins"], "Calibration of the router", words))


def calibration_table(found: dict) -> Html:
    rows = [
        [f"{b['low']:.1f} to {b['high']:.1f}", f"{b['n']:,}", f"{b['confidence']:.3f}",
         f"{b['accuracy']:.3f}"] for b in found["bins"]
    ]  # fmt: skip
    head = ["confidence", "images", "mean confidence", "accuracy"]
    return table("Calibration by bins of confidence; empty ones left out", head, rows)
