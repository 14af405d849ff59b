"""The report of lab.router as text, and its reliability table as a figure."""

from pathlib import Path

from config import UserError
from lab.forest import Pen
from lab.router_measures import expert_names
from lab.router_probe import KINDS
from metrics import format_confusion

NO_LABELS = "  not done: no image has a known modality"


def percent(found: tuple | dict | None, key: str = "mean", ends: str = "ci95") -> str:
    """A share and its interval, from an Estimate or a dict that has them; "-" for nothing."""
    if isinstance(found, dict):
        found = None if found[key] is None else (found[key], *found[ends])
    return "-" if found is None else "{:.1%} [{:.1%}, {:.1%}]".format(*found)


def points(found: dict) -> str:
    low, high = found["difference_ci95"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points"


def plain(found: tuple | None) -> str:
    return "-" if found is None else "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def show_naming(found: dict | None) -> None:
    if found is None:
        print(NO_LABELS)
        return
    print(f"  {percent(found, 'accuracy')} of {found['n']} images, "
          f"macro-F1 {plain(found['macro_f1'])}")  # fmt: skip
    print(format_confusion(found))
    print(f"  mean confidence {found['confidence']:.3f}, ECE {plain(found['ece'])}, "
          f"{len(found['bins'])} bins")  # fmt: skip
    for row in found["bins"]:
        if row["n"]:
            print(f"    {row['low']:.2f} to {row['high']:.2f}  n {row['n']:>4}  confidence "
                  f"{row['confidence']:.3f}, accuracy {percent(row, 'accuracy')}")  # fmt: skip


def show_levels(found: list[dict] | None) -> None:
    if found is None:
        print(NO_LABELS)
        return
    for row in found:
        print(f"  block {row['block']:<4}{'pooled over the prompt':<24}{percent(row['pooled'])}")
        for kind in KINDS:
            print(f"            {kind:<24}{percent(row[kind])}")


def show_information(found: list[dict] | None) -> None:
    if found is None:
        print(NO_LABELS)
        return
    for row in found:
        share = "-" if row["normalised"] is None else f"{row['normalised']:.3f}"
        print(f"  block {row['block']:<4}{plain(row['bits'])} bits, {share} of H(modality); labels "
              f"permuted: {row['null_mean']:.3f}, 95 % below {row['null_q95']:.3f}, "
              f"p {row['p']:.3f}")  # fmt: skip


def prediction_cells(row: dict) -> str:
    cells = "".join(f"{share:>11.1%}" for share in row["goes_to"])
    return f"{row['confidence']:10.3f}{row['entropy_bits']:9.3f}{cells}   {plain(row['auroc'])}"


def show_unknown(result: dict) -> None:
    names = "".join(f"{name:>11}" for name in expert_names(result["experts"]))
    head = f"{'n':>5}confidence  entropy{names}   AUROC of confidence".replace("ncon", "n con", 1)
    print(f"  {'image':<12}{head}")
    for name, row in result["unknown"].items():
        print(f"  {name:<12}{row['n']:>5}{prediction_cells(row)}")
    if result["left_out"] is None:
        return
    print("routers retrained without one modality's labels: predictions for its images")
    print(f"  {'left out':<12}{head}   accuracy on the others, confidence")
    for name, row in result["left_out"].items():
        cells = f"{row['n']:>5}{prediction_cells(row)}" if "n" in row else "    -"
        print(f"  {name:<12}{cells}   {percent(row['known'])}, {row['known_confidence']:.3f}")


def show_by_route(found: dict) -> None:
    for name in ("right", "wrong"):
        part = found[name]
        print(f"  modality predicted {name + 'ly':<9}{percent(part)} of {part['n']} questions")
    if found["difference"] is None:
        print("  no difference: one of the two groups is empty")
    else:
        value, low, high = (100 * x for x in found["difference"])
        print(f"  difference {value:+.1f} [{low:+.1f}, {high:+.1f}] points; not the effect of the "
              "routing: some images are harder for both")  # fmt: skip


def show_answers(result: dict) -> None:
    found, names = result["forced_routing"], expert_names(result["experts"])
    if found is None:
        print(f"  not done: {result['refused']}" if result["refused"] else NO_LABELS)
        return
    own = found["own"]
    print(f"  own routing                {percent(own)} of {own['n']} questions about "
          f"{found['n_images']} images")  # fmt: skip
    show_by_route(found["by_route"])
    for name, title in (("true", "true expert first"), ("wrong", "wrong expert first"),
                        ("oracle", "true expert alone")):  # fmt: skip
        if name in found:
            print(f"  {title:<26}{percent(found[name])}, {points(found[name])}")
    print("each expert alone, by modality")
    print(" " * 14 + "".join(f"{name:>24}" for name in names))
    for name, row in found["swap"].items():
        print(f"  {name:<12}" + "".join(f"{percent(cell):>24}" for cell in row))
    print("without an expert: difference in points")
    rows = {"all": found["without"], **found["without_by_modality"]}
    print(" " * 14 + "".join(f"{name:>24}" for name in names))
    for name, row in rows.items():
        cells = (points(cell).removesuffix(" points") for cell in row)
        print(f"  {name:<12}" + "".join(f"{cell:>24}" for cell in cells))


def show(result: dict) -> None:
    kind = "a router retrained on shuffled labels in" if result["broken"] else "the router of"
    print(f"{kind} {result['checkpoint']} on {' '.join(result['data'])} {result['split']}: "
          f"{result['n_questions']} questions about {result['n_images']} images")  # fmt: skip
    print("prediction of the modality: mean logits over prompt and blocks")
    show_naming(result["naming"])
    print("by block, and single positions by kind")
    show_levels(result["levels"])
    print("mutual information of a prompt position's first choice and the modality")
    show_information(result["information"])
    print("unknown images, with the same questions")
    show_unknown(result)
    print("answers: closed right or wrong, open by recall")
    show_answers(result)


def draw_reliability(found: dict | None, file: Path) -> None:
    """Accuracy over confidence, a dot per bin with its interval; the diagonal is calibrated."""
    if found is None:
        raise UserError(f"--png {file}: no image has a known modality, so nothing to draw")
    pen, left, top, side = Pen(500), 300, 40, 400

    def at(x: float, y: float) -> tuple[float, float]:
        return left + side * x, top + side * (1 - y)

    for tick in (0, 0.25, 0.5, 0.75, 1):
        pen.line(*at(tick, 0), *at(tick, 1), "#d0d7de", 1)
        pen.line(*at(0, tick), *at(1, tick), "#d0d7de", 1)
        x, y = at(tick, 0)
        pen.text(x, y + 16, f"{tick:g}", anchor="mm")
        x, y = at(0, tick)
        pen.text(x - 10, y, f"{tick:g}", anchor="rm")
    pen.line(*at(0, 0), *at(1, 1), "#59636e", 1)
    for row in found["bins"]:
        if row["n"]:
            x, (low, high) = row["confidence"], row["ci95"]
            pen.line(*at(x, low), *at(x, high), "#0a58ca", 2)
            pen.dot(*at(x, row["accuracy"]), 5)
    pen.text(
        left, top - 20, f"accuracy over confidence, {found['n']} images, ECE {found['ece'][0]:.3f}"
    )
    pen.text(left + side / 2, top + side + 40, "largest probability, mean of a bin", anchor="mm")
    pen.save(file)
