"""Plots a calibration."""

from __future__ import annotations

from os import fspath
from pathlib import Path

from sparse_fmha.calibration import Calibration
from sparse_fmha.plotting.law import draw


def plot(calibration: Calibration, path: str | Path, phase: str = "prefill") -> None:
    """Writes a PNG of sparsity over lambda * L: the points of each length and the paper's law.

    Args:
        calibration: a calibration with enough points to fit the phase.
        path: PNG file to write.
        phase: "prefill" or "decode".

    Raises:
        ValueError: path does not end in .png, or an error of `Calibration.fit`.
        TypeError: calibration is not a Calibration.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must be a Calibration, got {type(calibration).__name__}")
    if not fspath(path).lower().endswith(".png"):
        raise ValueError(f"path must end in .png, got {fspath(path)}")
    fit = calibration.fit(phase)
    measured: dict[int, list[tuple[float, float]]] = {}
    for point in sorted(calibration.points, key=lambda point: point.length):
        if point.phase == phase:
            of_length = measured.setdefault(point.length, [])
            of_length.append((point.threshold * point.length, point.sparsity))
    draw(path, measured, fit.alpha, fit.beta, f"skipped key tiles, {phase}")
