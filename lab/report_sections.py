"""The sections of a report: numbers -> markup. Every one says so where there is nothing to show."""

import base64
import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from lab import svg
from lab.report_numbers import Example
from lab.report_page import Html, facts, heat, note, percent, section, table, tag

Part = tuple[str, str, Html]
LARGEST = 224  # pixels a side of an embedded picture
MOST_LAYERS = 4  # layers whose patches are drawn
NO_ROUTER = "This checkpoint is dense: it has no router and no experts."


def interval(ci95: Sequence[float]) -> str:
    return f"[{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def load_section(load: dict, names: Sequence[str], blocks: Sequence[int]) -> Part:
    """Where the tokens go: by modality of the picture, and by kind of token."""
    if not names:
        return section("load", "Expert load", note(NO_ROUTER))
    words = "What share of the visits each expert had in each sparse block. A row adds up to 100 %."
    parts = [tag("p", f"{words} The stronger the tint, the larger the share.")]
    titles = {"modality": "by modality of the picture", "kind": "by kind of token"}
    for group, title in titles.items():
        parts.append(load_table(f"Share of visits {title}", load[group], names, blocks))
    return section("load", "Expert load", *parts)


def load_table(caption: str, tables: dict, names: Sequence[str], blocks: Sequence[int]) -> Html:
    rows = []
    for layer, block in enumerate(blocks):
        for i, (name, found) in enumerate(tables.items()):
            cells = [tag("th", name, scope="row"), *map(heat, found["shares"][layer])]
            cells.append(f"{found['visits'][layer]:,}")
            first = tag("th", f"block {block}", scope="rowgroup", rowspan=len(tables))
            rows.append(cells if i else [first, *cells])
    experts = [n if n.startswith("expert ") else f"{n} expert" for n in names]
    head = ["block", "tokens of", *experts, "visits"]
    return table(caption, head, rows, "second")


def embed(picture: Tensor) -> str:
    """(3, S, S) uint8 -> a PNG as a data URI, at most LARGEST pixels a side."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def named(expert: int, names: Sequence[str]) -> str:
    return names[expert] if names[expert].startswith("expert ") else f"{expert} {names[expert]}"


def tell_patches(cells: Sequence[tuple[int, float]], names: Sequence[str]) -> str:
    """What an overlay shows, in words."""
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
    """The picture, then its patches as each sparse layer sends them out."""
    if e.picture is None:
        return note("This question has no picture.")
    name, side = f"picture-{number}", LARGEST
    image = (f'<image id="{name}" width="{side}" height="{side}" href="{embed(e.picture)}" '
             f'preserveAspectRatio="none"/>')  # fmt: skip
    what = f"{e.sample.modality or 'Medical'} picture of example {number}"
    plain = svg.picture(image, what, f"The picture that is asked about: {e.sample.turns[0][0]}",
                        side, side, "overlay")  # fmt: skip
    figures = [tag("figure", Html(plain), tag("figcaption", "as given"))]
    for layer in shown_layers(blocks):
        gates, first = e.patches[layer].max(dim=-1)  # (P,) both
        cells = [(int(expert) if gate > 0 else -1, float(gate))
                 for gate, expert in zip(gates, first, strict=True)]  # fmt: skip
        title = f"Example {number}, first expert of each patch in block {blocks[layer]}"
        use = f'<use href="#{name}"/>'
        drawn = svg.patches(use, side, cells, title, tell_patches(cells, names))
        figures.append(tag("figure", Html(drawn), tag("figcaption", f"block {blocks[layer]}")))
    return tag("div", *figures, class_="views")


def visited(gates: Tensor, names: Sequence[str]) -> str:
    """gates (E,) -> its experts, the largest gate first."""
    experts = [int(i) for i in gates.argsort(descending=True) if gates[i] > 0]
    shown = [f"{gates[i]:.2f}" if gates[i] >= 0.005 else "<0.01" for i in experts]
    said = [f"{named(i, names)} {gate}" for i, gate in zip(experts, shown, strict=True)]
    return " + ".join(said) or "none"


def token_table(e: Example, number: int, names: Sequence[str], blocks: Sequence[int]) -> Html:
    rows = []
    for token, gates in zip(e.tokens, e.gates, strict=True):
        cells = ["not read"] * len(blocks) if gates is None else [visited(g, names) for g in gates]
        rows.append([tag("code", token), *cells])
    if not rows:
        return note("The model said nothing: the first token was the end.")
    head = ["token", *(f"block {block}" for block in blocks)]
    return table(f"Example {number}, its answer token by token: experts and gates", head, rows,
                 "words")  # fmt: skip


def example(e: Example, number: int, names: Sequence[str], blocks: Sequence[int]) -> Html:
    mark = tag("span", "✓ right", class_="good") if e.is_right else tag("span", "✗ wrong",
                                                                        class_="bad")  # fmt: skip
    title = e.sample.modality or "modality unknown"
    return tag(
        "article", tag("h3", f"{number}. {title}: ", mark, id=f"example-{number}"),
        facts([("question", e.sample.turns[0][0]), ("answer", e.answer or "(nothing)"),
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
    intro = ("Right and wrong ones of each modality, chosen to show both: their share here says "
             "nothing about how often the model is right.")  # fmt: skip
    more = ["The number on a patch is the expert with its largest gate, "
            + ", ".join(f"{i} {name}" for i, name in enumerate(names))
            + ": the tint is stronger for a larger gate. A token's experts are those it visits "
              "when it is read, to say the next one."] if names else [NO_ROUTER]  # fmt: skip
    if level == "sequence":
        more.append("This router decides once a sample: all patches and tokens go the same way.")
    if len(blocks) > MOST_LAYERS:
        more.append(f"Of {len(blocks)} sparse blocks {MOST_LAYERS} are drawn; the tables have all.")
    cards = [example(e, i, names, blocks) for i, e in enumerate(found, 1)]
    return section("examples", "Examples", tag("p", intro), *map(note, more),
                   tag("ul", *links, class_="examples"), *cards)  # fmt: skip


def router_section(report: dict | None, calibrated: dict | None, is_named: bool) -> Part:
    """Does the router name the modality, and is it as sure as it is right?"""
    title = "Router and modality"
    if report is None:
        return section("router", title, note(NO_ROUTER))
    if not report["n"]:
        return section("router", title, note("The data does not say which modality its pictures "
                                             "are, so nothing can be counted here."))  # fmt: skip
    parts = [facts([
        ("pictures", f"{report['n']:,}"),
        ("named rightly", f"{percent(report['accuracy'])} {interval(report['ci95'])}, "
                          "95 % interval by Wilson"),
        ("calibration error (ECE)", f"{calibrated['ece']:.3f}"),
    ])]  # fmt: skip
    if not is_named:
        parts.insert(0, note(
            "Nobody taught this router that expert 0 is CT, 1 MRI, and so on: what follows says "
            "only whether it came out so. A low number here is no fault."))  # fmt: skip
    rows = []
    for name, row in zip(report["labels"], report["confusion"], strict=True):
        total, f1 = sum(row), report["f1"][name]
        cells = [heat(n / total if total else 0.0, f"{n:,}") for n in row]
        rows.append([name, *cells, "-" if f1 is None else f"{f1:.3f}"])
    head = ["true modality", *(f"said {name}" for name in report["labels"]), "F1"]
    parts += [
        table("Confusion: rows are the truth, columns the likeliest expert; pictures", head, rows),
        tag("h3", "Calibration"),
        tag("p", "Of the pictures where the router is so sure, how many it names rightly. The "
                 "softmax is of the logits' mean over a picture's prompts and sparse blocks."),
        calibration_chart(calibrated),
        calibration_table(calibrated),
    ]  # fmt: skip
    return section("router", title, *parts)


def calibration_chart(found: dict) -> Html:
    told = (f"Reliability diagram of {found['n']} pictures, expected calibration error "
            f"{found['ece']:.3f}; the table below has its numbers.")  # fmt: skip
    return Html(svg.reliability(found["bins"], "Calibration of the router", told))


def calibration_table(found: dict) -> Html:
    rows = [
        [f"{b['low']:.1f} to {b['high']:.1f}", f"{b['n']:,}", f"{b['confidence']:.3f}",
         f"{b['accuracy']:.3f}"] for b in found["bins"]
    ]  # fmt: skip
    head = ["confidence", "pictures", "mean confidence", "share right"]
    return table("Calibration by bins of confidence; empty ones left out", head, rows)
