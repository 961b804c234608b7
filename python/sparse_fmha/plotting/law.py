"""Plots measured sparsities and the fitted law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(
    path: str | Path,
    measured: Mapping[int, Sequence[tuple[float, float]]],
    alpha: float,
    beta: float,
    title: str,
) -> None:
    """Writes a PNG: the share of tiles skipped by lambda * L.

    Args:
        path: PNG file to write.
        measured: for each number of keys L, pairs of lambda * L and a share.
        alpha, beta: the law is `lambda * L = alpha * exp(beta * share)`.
        title: title of the picture.
    """
    figure = Figure(figsize=(5.2, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for length, points in measured.items():
        axes.plot(*zip(*points, strict=True), ".", label=f"{length} keys")
    sparsity = np.linspace(0, 1, 50)
    label = f"$\\lambda L = {alpha:.3g}\\,e^{{{beta:.3g} S}}$"
    axes.plot(alpha * np.exp(beta * sparsity), sparsity, color="black", linewidth=1, label=label)
    axes.set(xscale="log", xlabel="$\\lambda L$", ylabel="share of tiles skipped", ylim=(0, 1))
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, pil_kwargs={"optimize": True})
