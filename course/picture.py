"""The picture of a score, course.score --picture FILE.png: the load by step and by modality.

One line of panels for each router: first, for each sparse layer, the load of every expert at the
steps of training; then, for each layer, the share of a modality's tokens that goes to each expert.
Of the first seed alone. A dashed line marks an even load.
"""

from pathlib import Path

from PIL import Image

from config import UserError


def empty_figure(width: float, height: float):
    """A figure of this size in inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "--picture needs matplotlib: pip install -r requirements-lab.txt"
        raise UserError(message) from error
    return Figure((width, height), layout="constrained")


def check(name: str) -> None:
    """Before long work: raise UserError where the picture could not be drawn."""
    empty_figure(1, 1)
    if not name.endswith(".png"):
        raise UserError(f"--picture {name}: must be a FILE.png")


def draw(rows: list[dict], file: Path) -> None:
    """rows: of course.score, the first is the one that is scored."""
    rows = [row for row in rows if row.get("first_seed")]  # older rows lack it
    n_layers = len(rows[0]["first_seed"]["load_by_step"][0])
    figure = empty_figure(3.1 * 2 * n_layers, 2.3 * len(rows))
    grid = figure.subplots(len(rows), 2 * n_layers, squeeze=False)
    for row, axes in zip(rows, grid, strict=True):
        found = row["first_seed"]
        for layer in range(n_layers):
            lines = [load[layer] for load in found["load_by_step"]]  # (steps, E)
            draw_load(axes[layer], lines, row["top_k"])
            axes[layer].set_xlabel("percent of training", fontsize=8)
            shares = {name: each[layer] for name, each in found["load_by_modality"].items()}
            draw_shares(axes[n_layers + layer], shares)
        axes[0].set_ylabel(row["router"].rpartition(":")[2], fontsize=10, weight="bold")
    for layer, ax in enumerate(figure.axes[: 2 * n_layers]):
        what = "load by step" if layer < n_layers else "experts by modality"
        ax.set_title(f"{what}, sparse layer {layer % n_layers + 1}", fontsize=9)
    figure.axes[0].legend(title="expert", fontsize=7, title_fontsize=7, ncols=2, frameon=False)
    figure.savefig(file, dpi=100)
    with Image.open(file) as image:  # a quarter of the size
        image.convert("RGB").quantize(method=Image.Quantize.FASTOCTREE).save(file, optimize=True)
    print(f"picture: {file}")


def draw_load(ax, load: list[list[float]], top_k: int) -> None:
    """load (steps, E): tokens of each expert / real tokens."""
    at = [100 * i / max(1, len(load) - 1) for i in range(len(load))]
    for e, line in enumerate(zip(*load, strict=True)):
        ax.plot(at, line, label=str(e), lw=4.5 / (e + 1.5))  # equal loads are drawn on each other
    ax.axhline(top_k / len(load[0]), color="0.6", ls="--", lw=0.8)
    ax.set_ylim(-0.04, 1.04)
    ax.tick_params(labelsize=7)


def draw_shares(ax, shares: dict[str, list[float]]) -> None:
    """shares: modality -> its tokens' share at each expert."""
    ax.imshow(list(shares.values()), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, values in enumerate(shares.values()):
        for x, value in enumerate(values):
            color = "white" if value > 0.6 else "black"
            ax.text(x, y, f"{value:.0%}", ha="center", va="center", color=color, fontsize=7)
    n_experts = len(next(iter(shares.values())))
    ax.set_xticks(range(n_experts), [f"expert {e}" for e in range(n_experts)], fontsize=7)
    ax.set_yticks(range(len(shares)), shares, fontsize=7)
