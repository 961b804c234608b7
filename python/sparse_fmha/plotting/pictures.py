"""Pictures side by side, with the attention window drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ACCENT = "#ff7f0e"
COLUMN = 2.35  # inches


class Panel(NamedTuple):
    title: str
    picture: torch.Tensor  # [C, Y, X] in 0..1, C is 1 or 3
    has_window: bool = True


def comparison(
    path: Path, panels: Sequence[Panel], window: int, query: tuple[int, int] | None = None
) -> None:
    """Writes the pictures in a row and, below them, a zoom on one query.

    Args:
        path: PNG file to write.
        panels: pictures of equal shape.
        window: side of the attention window in pixels, at most that of the pictures.
        query: (row, column) of the query; default: the center.
    """
    _, height, width = panels[0].picture.shape
    row, column = query or (height // 2, width // 2)
    zoom = min(4 * window, height, width)

    def around(at: int, side: int, extent: int) -> int:
        return min(max(at - side // 2, 0), extent - side)

    top, left = around(row, zoom, height), around(column, zoom, width)
    seen = around(row, window, height), around(column, window, width)

    aspect = min(max(height / width, 0.3), 2.0)
    size = COLUMN * len(panels), COLUMN * (aspect + 1) + 0.5
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    whole, enlarged = figure.subplots(2, len(panels), height_ratios=(aspect, 1))
    for panel, axes, detail in zip(panels, whole, enlarged, strict=True):
        axes.set_title(panel.title, fontsize=9)
        draw(axes, panel.picture, "antialiased")
        frame(axes, top, left, zoom, "white")
        draw(detail, panel.picture[:, top : top + zoom, left : left + zoom], "nearest")
        if panel.has_window:
            frame(axes, *seen, window, ACCENT)
            frame(detail, seen[0] - top, seen[1] - left, window, ACCENT)
            detail.plot(column - left, row - top, "s", color=ACCENT, markersize=3)
    figure.savefig(path, pil_kwargs={"optimize": True})


def draw(axes: Axes, picture: torch.Tensor, interpolation: str) -> None:
    pixels = picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    axes.imshow(pixels, interpolation=interpolation)
    axes.set_axis_off()


def frame(axes: Axes, top: int, left: int, side: int, color: str) -> None:
    # Pixel centers have integer coordinates.
    box = Rectangle((left - 0.5, top - 0.5), side, side, fill=False, color=color, linewidth=1.2)
    axes.add_patch(box)
