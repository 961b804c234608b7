"""Pictures of a simulation: the tiles visited for one query, and the distribution over all."""

from __future__ import annotations

from os import PathLike, fspath

import numpy as np

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from sparse_fmha.plotting.views import Line, TileView

FULL, PARTIAL, WINDOW, QUERY = "#2ca02c", "#ff7f0e", "#555555", "#1f77b4"
PANELS = 12  # slices of time at most
COLUMNS = 4
AXES = "TYX"


def draw(view: TileView, path: str | PathLike[str]) -> None:
    """Writes `figure` as a PNG; see `Simulation.plot`."""
    if not fspath(path).endswith(".png"):
        raise ValueError(f"path is {fspath(path)}; it must end in .png")
    figure(view).savefig(path, pil_kwargs={"optimize": True})


def figure(view: TileView) -> Figure:
    """One panel for each slab of key tiles along the first of three axes, one for fewer axes, and
    the distribution below.
    """
    axes = len(view.grid)
    t, y, x = view.lines
    slabs = np.unique(np.linspace(0, t.count - 1, min(t.count, PANELS)).round().astype(int))
    columns = min(len(slabs), COLUMNS)
    rows = -(-len(slabs) // columns)

    aspect = 0.2 if axes == 1 else min(max(view.grid[-2] / view.grid[-1], 0.3), 1.5)
    width = 10 if axes == 1 else max(6, 2.5 * columns)  # inches
    heights = rows * (width / columns * aspect + 0.45) + 0.5, 2.4
    picture = Figure(figsize=(width, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(picture)
    above, below = picture.subfigures(2, 1, height_ratios=heights)
    panels = list(above.subplots(rows, columns, squeeze=False).flat)
    for panel, slab in zip(panels, slabs, strict=False):
        tiles(panel, t, y, x, slab)
        first, last = t.span(slab)
        if axes == 3:
            panel.set_title(f"T {first}" + (f" to {last}" if last > first else ""), fontsize=9)
    for panel in panels[len(slabs) :]:
        panel.remove()
    names = {
        FULL: "full tile",
        PARTIAL: "partial tile",
        WINDOW: "seen by the query",
        QUERY: "query",
    }
    above.legend(
        handles=[Patch(color=color, label=name) for color, name in names.items()],
        loc="outside upper center",
        ncols=len(names),
        fontsize=8,
    )
    histogram(below.subplots(), view)
    return picture


def tiles(panel: Axes, t: Line, y: Line, x: Line, slab: int) -> None:
    """The key tiles of one slab along T, over what the query sees at any of its times."""
    first, last = t.span(slab)
    if t.seen[first : last + 1].any():
        # A token at an integer coordinate; only the part with tokens seen, as grids can be long.
        (top, bottom), (left, right) = (np.flatnonzero(line.seen)[[0, -1]] for line in (y, x))
        seen = np.outer(y.seen[top : bottom + 1], x.seen[left : right + 1])
        panel.imshow(
            np.ma.masked_equal(seen, False),
            cmap=ListedColormap([WINDOW]),
            alpha=0.6,
            extent=(left - 0.5, right + 0.5, bottom + 0.5, top - 0.5),
            interpolation="nearest",
        )
    boxes: dict[str, list[Rectangle]] = {FULL: [], PARTIAL: []}
    for row in range(y.count):
        for column in range(x.count):
            is_full = slab in t.full and row in y.full and column in x.full
            (top, bottom), (left, right) = y.span(row), x.span(column)
            boxes[FULL if is_full else PARTIAL].append(
                Rectangle((left - 0.5, top - 0.5), right - left + 1, bottom - top + 1)
            )
    for color, rectangles in boxes.items():
        panel.add_collection(
            PatchCollection(
                rectangles, facecolor=(color, 0.35), edgecolor=color, linewidth=0.8, label=color
            )
        )
    if first <= t.query <= last:
        panel.plot(x.query, y.query, "s", color=QUERY, markersize=4)

    # All of the grid, but of a sequence what is around the tiles.
    one_axis = y.length == 1
    ends = x.span(0)[0], x.span(x.count - 1)[1]
    margin = (ends[1] - ends[0]) // 4 if one_axis else x.length
    low, high = max(min(ends[0], x.query) - margin, 0), min(ends[1] + margin, x.length - 1)
    panel.set_xlim(low - 0.5, max(high, ends[1]) + 0.5)
    panel.set_ylim(max(y.length - 1, y.span(y.count - 1)[1]) + 0.5, -0.5)
    panel.add_patch(
        Rectangle((-0.5, -0.5), x.length, y.length, fill=False, edgecolor="black", linewidth=0.8)
    )
    panel.set_aspect("auto" if one_axis else "equal")
    panel.tick_params(labelsize=7)
    if one_axis:
        panel.set_yticks([])


def histogram(axes: Axes, view: TileView) -> None:
    visited = np.array(list(view.distribution))
    width = max(0.8, np.ptp(visited) / 100)
    axes.bar(visited, list(view.distribution.values()), width=width, color=QUERY)
    mean, worst = view.mean, view.worst
    axes.axvline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.1f}")
    axes.axvline(worst, color="black", linestyle=":", linewidth=1, label=f"worst {worst}")
    axes.set_xlabel("key tiles visited", fontsize=9)
    axes.set_ylabel("query tiles", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
