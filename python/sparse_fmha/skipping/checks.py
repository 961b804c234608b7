"""Checks of calibrations. Messages name the argument, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real

from sparse_fmha._checks import LARGEST_FLOAT, check_choice, check_int, check_number
from sparse_fmha.skipping.law import Point

PHASES = ("prefill", "decode")


def check_thresholds(thresholds: Iterable[float]) -> tuple[float, ...]:
    """Checks that thresholds are numbers in [0, 1)."""
    if not isinstance(thresholds, Iterable):
        raise TypeError(f"thresholds must be a sequence of numbers, got {thresholds!r}")
    thresholds = tuple(thresholds)
    for i, threshold in enumerate(thresholds):
        if not isinstance(threshold, Real) or isinstance(threshold, bool):
            raise TypeError(f"thresholds[{i}] must be a number, got {threshold!r}")
        if not 0 <= threshold < 1:
            raise ValueError(f"thresholds[{i}] must be at least 0 and less than 1, got {threshold}")
    return tuple(float(threshold) for threshold in thresholds)


def check_fitted_thresholds(thresholds: Iterable[float]) -> tuple[float, ...]:
    """Like `check_thresholds`; at least one must be above 0, which skips nothing."""
    checked = check_thresholds(thresholds)
    if not any(checked):
        raise ValueError(f"thresholds must have at least one above 0, got {list(checked)}")
    return checked


def check_phase(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"phase must be {' or '.join(PHASES)}, got {phase!r}")


def check_gamma(gamma: float | None) -> None:
    if gamma is not None:
        check_number("gamma", gamma, 0, LARGEST_FLOAT)


def check_point(name: str, point: Point) -> None:
    check_choice(f"{name}.phase", point.phase, PHASES)
    check_int(f"{name}.length", point.length, 0)
    check_number(f"{name}.threshold", point.threshold, 0, LARGEST_FLOAT)
    check_number(f"{name}.sparsity", point.sparsity, -LARGEST_FLOAT, LARGEST_FLOAT)
    check_int(f"{name}.tiles", point.tiles, 0)
    if point.tiles and not point.length:
        raise ValueError(
            f"{name} must have tiles of at least 1 key, got {point.tiles} tiles of 0 keys"
        )
