"""A small cost model of the Hopper kernels on an H100: costs per stage and per query tile.

Each multiprocessor processes one query tile at a time. A tile takes a fixed time, plus a time for
each stage of keys. The costs are fitted to files of benchmarks/results (docs/lab/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ARCH = "sm90"  # architecture of the modeled kernels
MULTIPROCESSORS = 132


class DenseCosts(NamedTuple):
    head_dim: int  # the largest head dim of the kernel
    tile_q: int
    tile_k: int
    stage_us: float
    tile_us: float


# Fitted to dense and causal attention at 4k to 32k tokens. The power limit shifts cases by 15%.
DENSE = (
    DenseCosts(64, 192, 128, 1.425, 1.50),
    DenseCosts(96, 192, 80, 1.100, 2.60),
    DenseCosts(128, 192, 80, 1.240, 2.20),
    DenseCosts(256, 128, 80, 1.680, 5.20),
)
# Relative cost of a stage cut by the causal diagonal: only some consumers compute it.
CUT_STAGE = 0.85


class TileTime(NamedTuple):
    """What a row with query tiles of this size would take; several rows may serve a call."""

    tile_q: int
    waves: float  # query tiles over those that run at a time
    us: float  # on an H200, without the launch

    def __str__(self) -> str:
        return f"tiles of {self.tile_q} queries: {self.waves:.2f} waves, {self.us:.1f} us"


def tile_times(
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    causal: bool,
    multiprocessors: int = MULTIPROCESSORS,
) -> tuple[TileTime, ...]:
    """Predicts the time of each row among which `attention` chooses; none if there is no choice."""
    from sparse_fmha._extension import _C

    times = _C.row_times(causal, head_dim, batch * heads, q_len, kv_len, multiprocessors)
    return tuple(TileTime(*of) for of in times) if len(times) > 1 else ()


def dense_us(batch: int, heads: int, q_len: int, kv_len: int, head_dim: int, causal: bool) -> float:
    """Predicts the microseconds of `attention`."""
    costs = next(row for row in DENSE if row.head_dim >= head_dim)
    times = []
    for first in range(0, q_len, costs.tile_q):
        last = min(first + costs.tile_q, q_len) - 1
        sees_first, sees_last = kv_len, kv_len
        if causal:
            sees_first, sees_last = (
                min(max(q + 1 + kv_len - q_len, 0), kv_len) for q in (first, last)
            )
        full = sees_first // costs.tile_k
        cut = -(-sees_last // costs.tile_k) - full
        times.append(costs.tile_us + costs.stage_us * (full + CUT_STAGE * cut))
    us = makespan((batch * heads, us) for us in times)
    others = tile_times(batch, heads, q_len, kv_len, head_dim, causal)
    return min([us, *(tile.us for tile in others if tile.tile_q != costs.tile_q)])


def makespan(groups: Iterable[tuple[int, float]]) -> float:
    """Returns a lower bound of the time for (number, duration) of jobs on all multiprocessors.

    The time is at least the total divided by the multiprocessors. It is also at least the time of
    the multiprocessor that gets the most of the n longest jobs, for any n. Scheduling the heaviest
    jobs first, as the kernels do, comes close to the larger of the two.
    """
    total, number, longest = 0.0, 0, 0.0
    for count, duration in sorted(groups, key=lambda group: -group[1]):
        total += count * duration
        number += count
        longest = max(longest, -(-number // MULTIPROCESSORS) * duration)
    return max(total / MULTIPROCESSORS, longest)
