"""The law between threshold and sparsity, fitted to measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Range of sparsities that are fitted; the law does not hold outside it.
LEAST, MOST = 0.1, 0.9


class Point(NamedTuple):
    """One measurement: a threshold and the share of tiles that it skips."""

    phase: str
    length: int  # keys
    threshold: float
    sparsity: float
    tiles: int  # tiles visited: the weight of the point


class Fit(NamedTuple):
    """`lambda * L**gamma = alpha * exp(beta * S)`; gamma is 1 in the paper."""

    alpha: float
    beta: float
    gamma: float
    points: int
    error: float  # root mean squared error in S


def fit(points: Sequence[Point], phase: str, gamma: float | None) -> Fit:
    """See `Calibration.fit`."""
    sums: dict[tuple[int, float], list[float]] = {}
    for point in points:
        if point.phase == phase and point.tiles:
            both = sums.setdefault((point.length, point.threshold), [0.0, 0.0])
            both[0] += point.sparsity * point.tiles
            both[1] += point.tiles
    shares = {at: skipped / tiles for at, (skipped, tiles) in sums.items()}
    used = {at: s for at, s in shares.items() if LEAST <= s <= MOST and at[1] > 0}
    if len(set(used.values())) < 2:
        raise ValueError(
            f"a fit needs at least two different points of {phase} with {LEAST:.0%} to {MOST:.0%} "
            f"of the tiles skipped, got {len(used)}; add longer inputs or other thresholds"
        )
    sparsity = np.array(list(used.values()))
    log_length, log_threshold = np.log(np.array(list(used))).T
    columns = [np.ones_like(sparsity), sparsity]
    known = log_threshold
    if gamma is None:
        if len(set(log_length)) < 2:
            raise ValueError("gamma=None needs points of at least two lengths, got one length")
        columns.append(-log_length)
    else:
        known = log_threshold + gamma * log_length
    (log_alpha, beta, *free), *_ = np.linalg.lstsq(np.stack(columns, 1), known, rcond=None)
    gamma = float(free[0]) if gamma is None else float(gamma)
    with np.errstate(over="ignore"):
        alpha = float(np.exp(log_alpha))
    if not (beta > 0 and 0 < alpha < math.inf):
        raise ValueError(
            f"alpha and beta must be positive, got {alpha:.3g} and {beta:.3g} from the {len(used)} "
            f"points of {phase}; add inputs or other thresholds"
        )
    found = (log_threshold + gamma * log_length - log_alpha) / beta
    error = float(np.sqrt(np.mean((found - sparsity) ** 2)))
    return Fit(alpha, float(beta), gamma, len(used), error)


def threshold_for(fit: Fit, sparsity: float, length: int) -> float:
    """See `Calibration.threshold_for`; requires a sparsity above 0."""
    free = fit.gamma * math.log(length) - math.log(fit.alpha)  # beta * sparsity at threshold 1
    with np.errstate(over="ignore"):
        threshold = float(np.exp(fit.beta * sparsity - free))
    if threshold >= 1:
        most = free / fit.beta
        raise ValueError(
            f"sparsity must be at most {max(0.0, most):.0%} at {length} keys, got {sparsity:.0%}; "
            f"its threshold would be {threshold:.3g}, which is not below 1"
        )
    return threshold
