"""Plots of a simulation: the tiles visited for one query, and the distribution over all."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

import numpy as np

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from sparse_fmha.plotting.views import Line, TileView

FULL, PARTIAL, QUERY = "#2ca02c", "#ff7f0e", "#1f77b4"
# Colors of keys by their relation to the query, with the names in the legend.
KEYS = {
    "partial tile: other keys": ("#ffe5cc", PARTIAL),
    "partial tile: keys the query sees": ("#ffb570", PARTIAL),
    "full tile: the query sees every key": ("#95d095", FULL),
}
UNSEEN, SEEN, WHOLE = range(3)
PANELS = 12  # at most; slices of time
COLUMNS = 4
LEAST_RANGE = 10  # of the distribution, so that a single value is not a bar as wide as the plot


def draw(view: TileView, path: str | PathLike[str]) -> None:
    """Writes `figure` as a PNG; see `Simulation.plot`."""
    if not fspath(path).endswith(".png"):
        raise ValueError(f"path must end in .png, got {fspath(path)}")
    figure(view).savefig(path, pil_kwargs={"optimize": True})


def figure(view: TileView) -> Figure:
    """Draws a panel for each slab of key tiles, and the distribution below.

    Slabs are along the first of three axes; with fewer axes there is one panel.
    """
    axes = len(view.grid)
    t, y, x = view.lines
    slabs = np.unique(np.linspace(0, t.count - 1, min(t.count, PANELS)).round().astype(int))
    columns = min(len(slabs), COLUMNS)
    rows = -(-len(slabs) // columns)

    aspect = 0.2 if axes == 1 else min(max(view.grid[-2] / view.grid[-1], 0.3), 1.5)
    width = 10 if axes == 1 else max(6, 2.5 * columns)  # inches
    heights = rows * (0.9 * width / columns * aspect + 0.5) + 1.4, 2.4
    picture = Figure(figsize=(width, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(picture)
    above, below = picture.subfigures(2, 1, height_ratios=heights)
    above.suptitle(view.title, fontsize=10)
    panels = list(above.subplots(rows, columns, squeeze=False).flat)
    for panel, slab in zip(panels, slabs, strict=False):
        tiles(panel, t, y, x, slab)
        first, last = t.span(slab)
        if axes == 3:
            panel.set_title(f"T {first}" + (f" to {last}" if last > first else ""), fontsize=9)
    for panel in panels[len(slabs) :]:
        panel.remove()
    above.legend(
        handles=legend(), loc="outside lower center", ncols=2 if width < 9 else 5, fontsize=8
    )
    histogram(below.subplots(), view)
    return picture


def legend() -> list[Artist]:
    keys = [
        Patch(facecolor=face, edgecolor=edge, label=name) for name, (face, edge) in KEYS.items()
    ]
    return [
        *reversed(keys),
        Patch(facecolor="none", edgecolor=QUERY, linewidth=1.5, label="query tile"),
        Line2D([], [], color=QUERY, marker="s", markersize=4, linestyle="", label="query"),
    ]


def tiles(panel: Axes, t: Line, y: Line, x: Line, slab: int) -> None:
    """Draws the key tiles of one slab along T, with the keys the query sees at any time in it."""
    keys(panel, t, y, x, slab)
    boxes: dict[str, list[Rectangle]] = {FULL: [], PARTIAL: []}
    for row in range(y.count):
        for column in range(x.count):
            is_full = slab in t.full and row in y.full and column in x.full
            boxes[FULL if is_full else PARTIAL].append(box(x.span(column), y.span(row)))
    for color, rectangles in boxes.items():
        panel.add_collection(
            PatchCollection(rectangles, facecolor="none", edgecolor=color, linewidth=0.8)
        )
    first, last = t.span(slab)
    if first <= t.query_tile[1] and t.query_tile[0] <= last:
        panel.add_patch(
            box(x.query_tile, y.query_tile, fill=False, edgecolor=QUERY, linewidth=1.5, zorder=3)
        )
    if first <= t.query <= last:
        panel.plot(x.query, y.query, "s", color=QUERY, markersize=4, zorder=4)

    # Show the whole grid; for a sequence, only the part around the tiles.
    one_axis = y.length == 1
    ends = x.span(0)[0], x.span(x.count - 1)[1]
    margin = (ends[1] - ends[0]) // 4 if one_axis else x.length
    low, high = max(min(ends[0], x.query) - margin, 0), min(ends[1] + margin, x.length - 1)
    high = max(high, ends[1], x.query_tile[1])
    panel.set_xlim(low - 0.5, high + 0.5)
    panel.set_ylim(max(y.length - 1, y.span(y.count - 1)[1]) + 0.5, -0.5)
    panel.add_patch(
        box((0, x.length - 1), (0, y.length - 1), fill=False, edgecolor="black", linewidth=0.8)
    )
    panel.set_aspect("auto" if one_axis else "equal")
    panel.tick_params(labelsize=7)
    panel.set_xlabel("token" if one_axis else "X", fontsize=8)
    if one_axis:
        panel.set_yticks([])
    else:
        panel.set_ylabel("Y", fontsize=8)


def keys(panel: Axes, t: Line, y: Line, x: Line, slab: int) -> None:
    """Colors each token of the tiles by its relation to the query."""
    first, last = t.span(slab)
    # Tokens are at integer coordinates. Only the part with tiles, as grids can be long.
    ends = [
        (line.span(0)[0], min(line.span(line.count - 1)[1], line.length - 1)) for line in (y, x)
    ]
    (top, bottom), (left, right) = ends
    of_axes = [line.tile_of_tokens(*end) for line, end in zip((y, x), ends, strict=True)]
    in_full = [np.isin(of, line.full) for line, of in zip((y, x), of_axes, strict=True)]
    in_tile = np.outer(*(of >= 0 for of in of_axes))
    seen = np.outer(y.seen[top : bottom + 1], x.seen[left : right + 1])
    seen &= t.seen[first : last + 1].any()
    kinds = np.where(seen, SEEN, UNSEEN)
    if slab in t.full:
        kinds[np.outer(*in_full)] = WHOLE
    panel.imshow(
        np.ma.masked_array(kinds, ~in_tile),
        cmap=ListedColormap([face for face, _ in KEYS.values()]),
        vmin=UNSEEN,
        vmax=WHOLE,
        extent=(left - 0.5, right + 0.5, bottom + 0.5, top - 0.5),
        interpolation="nearest",
    )


def box(x: tuple[int, int], y: tuple[int, int], **style: Any) -> Rectangle:
    """Returns a rectangle around the first to last token of each axis."""
    (left, right), (top, bottom) = x, y
    return Rectangle((left - 0.5, top - 0.5), right - left + 1, bottom - top + 1, **style)


def histogram(axes: Axes, view: TileView) -> None:
    visited = np.array(list(view.distribution))
    width = max(0.8, np.ptp(visited) / 100)
    axes.bar(visited, list(view.distribution.values()), width=width, color=QUERY)
    mean, worst = view.mean, view.worst
    axes.axvline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.1f}")
    axes.axvline(worst, color="black", linestyle=":", linewidth=1, label=f"worst {worst}")
    middle = (visited.min() + visited.max()) / 2
    reach = max(np.ptp(visited) / 2 + width, LEAST_RANGE / 2)
    left = max(middle - reach, -0.5)
    axes.set_xlim(left, left + 2 * reach)
    axes.set_title("how many key tiles the query tiles of a head visit", fontsize=9)
    axes.set_xlabel("key tiles visited", fontsize=9)
    axes.set_ylabel("query tiles", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)
