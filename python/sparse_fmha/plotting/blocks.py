"""A picture of the lists of a mask."""

from __future__ import annotations

from os import fspath
from pathlib import Path

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from sparse_fmha.plotting.pictures import ACCENT

COLORS = {"not listed": "white", "full": "#1f77b4", "partial": ACCENT}


def draw(path: str | Path, place: tuple[int, int], kinds: Tensor, column: str, row: str) -> None:
    """Writes a PNG: the lists of one head, and a histogram of their lengths over all heads.

    Args:
        path: PNG file to write.
        place: the batch entry and the head.
        kinds: int `[B|1, H|1, rows, columns]`: 0 not listed, 1 full, 2 partial.
        column, row: what these are.

    Raises:
        IndexError: there is no such batch entry or head.
        ValueError: path does not end in .png.
    """
    batch, head = place
    for name, value, size in zip(("batch", "head"), place, kinds.shape[:2], strict=True):
        if not 0 <= value < size:
            raise IndexError(f"{name} is {value}; the mask has lists for {size}")
    if not fspath(path).endswith(".png"):
        raise ValueError(f"path is {fspath(path)}; it must end in .png")
    listed = kinds > 0
    own = kinds[batch, head].cpu()
    figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if own.numel():  # without tokens there is no picture
        left.imshow(
            own.numpy(),
            cmap=ListedColormap(list(COLORS.values())),
            vmin=0,
            vmax=2,
            aspect="auto",
            interpolation="nearest",
        )
    share = own.count_nonzero().item() / max(1, own.numel())
    left.set_title(f"batch {batch}, head {head}: {share:.1%} listed")
    left.set_xlabel(column)
    left.set_ylabel(row)
    left.legend(
        handles=[Patch(facecolor=c, edgecolor="gray", label=name) for name, c in COLORS.items()],
        fontsize=7,
        loc="upper right",
    )
    per_row = listed.sum(-1).flatten().cpu()
    bins = [n - 0.5 for n in range(max(per_row.tolist(), default=0) + 2)]
    right.hist(per_row.numpy(), bins=bins if len(bins) < 100 else 50, color=COLORS["full"])
    right.set_title("all heads")
    right.set_xlabel(f"{column.split()[0]}s of a {row.split()[0]}")
    right.set_ylabel("rows of lists")
    figure.savefig(path)
