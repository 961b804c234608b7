"""Gives weights out to ranks."""

from __future__ import annotations

from collections.abc import Sequence


def dealt(weights: Sequence[float], ranks: int, each: int) -> list[list[int]]:
    """Which weights each rank has: `each` of them, with about the same sum.

    From the heaviest on, each goes to the rank with the least weight so far that still takes one
    (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = min((r for r in range(ranks) if len(found[r]) < each), key=lambda r: (load[r], r))
        found[rank].append(i)
        load[rank] += weights[i]
    return [sorted(own) for own in found]
