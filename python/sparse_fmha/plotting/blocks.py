"""Plots of the lists of a mask."""

from __future__ import annotations

from numbers import Integral
from os import fspath
from pathlib import Path
from typing import NamedTuple

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sparse_fmha.plotting.pictures import ACCENT

NONE, FULL, PARTIAL = "white", "#1f77b4", ACCENT
PIXELS = 400  # at most, along one axis of the picture; longer axes are downsampled
LEAST_RANGE = 10  # of a histogram, so that a single value is not a bar as wide as the plot


class Words(NamedTuple):
    """The texts of a picture."""

    title: str
    column: str  # axis label
    row: str
    listed: str  # plural name of the entries of lists
    rows: str  # plural name of the rows, which have lists
    kinds: tuple[str, ...]  # names of 0, 1, ... for the legend


def draw(
    path: str | Path, place: tuple[int, int], kinds: Tensor, words: Words, reachable: int | None
) -> None:
    """Writes `figure` as a PNG.

    Raises:
        IndexError: the mask has no such batch entry or head.
        TypeError: batch or head is no int.
        ValueError: path does not end in .png.
    """
    for name, value, size in zip(("batch", "head"), place, kinds.shape[:2], strict=True):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if not 0 <= value < size:
            raise IndexError(
                f"{name} must be less than the {size} that the mask has lists for, got {value}"
            )
    if not fspath(path).endswith(".png"):
        raise ValueError(f"path must end in .png, got {fspath(path)}")
    figure(place, kinds, words, reachable).savefig(path)


def figure(place: tuple[int, int], kinds: Tensor, words: Words, reachable: int | None) -> Figure:
    """Draws the lists of one head, and a histogram of list lengths over all heads.

    Args:
        place: batch entry and head.
        kinds: int `[B|1, H|1, rows, columns]`: 0 not listed, 1 full, 2 partial.
        reachable: entries of one head that causality leaves; None if it hides none.
    """
    batch, head = place
    own = kinds[batch, head].cpu()
    picture = Figure(figsize=(9, 4.6), dpi=100, layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    colors = (NONE, FULL, PARTIAL)[: len(words.kinds)]
    if own.numel():  # without tokens there is no picture
        left.imshow(
            _joined(_joined(own, 0), 1).numpy(),
            cmap=ListedColormap(list(colors)),
            vmin=0,
            vmax=len(colors) - 1,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, own.shape[1] - 0.5, own.shape[0] - 0.5, -0.5),
        )
    listed = own.count_nonzero().item()
    share = f"{listed / max(1, own.numel()):.1%} of {words.listed} listed"
    if reachable is not None:
        share += f"\n({listed / max(1, reachable):.1%} of those that causality leaves)"
    left.set_title(f"batch {batch}, head {head}: {share}", fontsize=10)
    left.set_xlabel(words.column)
    left.set_ylabel(words.row)
    picture.legend(
        handles=[
            Patch(facecolor=color, edgecolor="gray", label=name)
            for color, name in zip(colors, words.kinds, strict=True)
        ],
        fontsize=8,
        loc="outside lower left",
        ncols=len(colors),
    )
    _histogram(right, kinds, words)
    picture.suptitle(words.title, fontsize=11)
    return picture


def _joined(kinds: Tensor, axis: int) -> Tensor:
    """Downsamples an axis to at most PIXELS entries by the maximum."""
    length = kinds.shape[axis]
    size = -(-length // PIXELS)
    if size == 1:
        return kinds
    # A pixel covers the entries that fall into it when the axis is scaled to the picture.
    pixels = -(-length // size)
    owner = torch.arange(length, device=kinds.device) * pixels // length
    shape = (pixels, kinds.shape[1]) if axis == 0 else (kinds.shape[0], pixels)
    index = owner[:, None] if axis == 0 else owner[None]
    joined = torch.zeros(shape, dtype=kinds.dtype, device=kinds.device)
    return joined.scatter_reduce(axis, index.expand(kinds.shape), kinds, "amax")


def _histogram(axes: Axes, kinds: Tensor, words: Words) -> None:
    lengths = (kinds > 0).sum(-1).flatten().cpu()
    most = int(lengths.max()) if lengths.numel() else 0
    bins = [n - 0.5 for n in range(most + 2)]
    axes.hist(lengths.numpy(), bins=bins if len(bins) < 100 else 50, color=FULL)
    axes.set_xlim(-0.5, max(most, LEAST_RANGE) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("lengths of the lists of all heads", fontsize=10)
    axes.set_xlabel(f"{words.listed} listed")
    axes.set_ylabel(words.rows)
