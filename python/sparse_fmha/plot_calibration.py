"""A picture of a calibration."""

from __future__ import annotations

from os import fspath
from pathlib import Path

import numpy as np

from sparse_fmha._versions import require

require("matplotlib", by=__name__, extra="demo")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparse_fmha.calibration import Calibration
from sparse_fmha.plotting.pictures import ACCENT


def plot(calibration: Calibration, path: str | Path, phase: str = "prefill") -> None:
    """Writes a PNG: the sparsity by lambda * L, the points of each length and the paper's law.

    Args:
        calibration: with points enough for a fit of the phase.
        path: PNG file to write.
        phase: "prefill" or "decode".

    Raises:
        ValueError: path does not end in .png, or as `Calibration.fit`.
        TypeError: calibration is no Calibration.
        ImportError: matplotlib is not there.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration is a {type(calibration).__name__}; a Calibration is needed")
    if not fspath(path).lower().endswith(".png"):
        raise ValueError(f"path is {fspath(path)}; a name that ends in .png is needed")
    fit = calibration.fit(phase)
    figure = Figure(figsize=(5.2, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [point for point in calibration.points if point.phase == phase]
    for length in sorted({point.length for point in points}):
        of_length = [point for point in points if point.length == length]
        x = [point.threshold * length for point in of_length]
        axes.plot(x, [point.sparsity for point in of_length], ".", label=f"{length} keys")
    sparsity = np.linspace(0, 1, 50)
    label = f"$\\lambda L = {fit.alpha:.3g}\\,e^{{{fit.beta:.3g} S}}$"
    law = fit.alpha * np.exp(fit.beta * sparsity)
    axes.plot(law, sparsity, color=ACCENT, label=label)
    axes.set(xscale="log", xlabel="$\\lambda L$", ylabel="share of tiles skipped", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.savefig(path, pil_kwargs={"optimize": True})
