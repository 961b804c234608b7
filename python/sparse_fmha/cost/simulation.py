"""The tile simulator: counts tiles to predict the cost of a neighborhood; see docs/simulator.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_fmha.cost.model import makespan
from sparse_fmha.cost.tile_problem import Coord, Problem, Triple, check_problem, check_tile, joined

if TYPE_CHECKING:
    from sparse_fmha._C import _Tiles
    from sparse_fmha.plotting.views import TileView


class Tiles(NamedTuple):
    """Key tiles per query tile."""

    mean: float
    worst: int  # the maximum


@dataclass(frozen=True)
class Simulation:
    """Result of `simulate`.

    Tiles are counted for one head, FLOPs and time for all heads and the whole batch. Extra tokens
    have separate tiles, which every query tile visits.
    """

    grid: Coord
    window: Coord
    stride: Coord
    dilation: Coord
    causal: tuple[bool, ...]
    heads: int
    batch: int
    head_dim: int
    extra: int
    key_tiling: str
    tile_q: Coord  # tokens per axis; three entries if a tile extends beyond the grid's axes
    tile_k: Coord
    query_tiles: int
    visited: Tiles  # key tiles that a query tile visits
    full: Tiles  # visited tiles without a mask
    partial: Tiles  # visited tiles with a mask
    distribution: dict[int, int]  # key tiles visited: number of query tiles
    useful_flops: int  # both products over the visible pairs; a multiply-add counts two
    executed_flops: int  # both products over whole tiles, head dim padded to the kernel's
    dense_flops: int  # both products if every query sees every key
    speedup_bound: float  # tiles of dense attention / tiles visited
    speedup_bound_worst: float  # the same if all query tiles visited as many as the worst
    perfect_bound: float  # dense / useful FLOPs: the bound of perfect block sparsity
    predicted_ms: float  # on an H100, by the cost model of csrc/planning/tiling.cpp

    def __str__(self) -> str:
        causal = f", causal {joined(map(int, self.causal))}" if any(self.causal) else ""
        dilation = f", dilation {joined(self.dilation)}" if max(self.dilation) > 1 else ""
        extra = f", {self.extra} extra tokens" if self.extra else ""
        counts = [
            f"{name:<19}{tiles.mean:>10.2f}{tiles.worst:>8}"
            for name, tiles in (
                ("key tiles visited", self.visited),
                ("  full", self.full),
                ("  partial", self.partial),
            )
        ]
        executed = self.executed_flops / self.useful_flops
        flops = (self.useful_flops, self.executed_flops, self.dense_flops)
        useful, all_executed, dense = (f"{n / 1e12:.4g}" for n in flops)
        return "\n".join(
            [
                f"grid {joined(self.grid)}, window {joined(self.window)}, "
                f"stride {joined(self.stride)}{dilation}{causal}{extra}",
                f"batch {self.batch}, heads {self.heads}, head dim {self.head_dim}",
                f"query tiles {joined(self.tile_q)}: {self.query_tiles} a head; "
                f"key tiles {joined(self.tile_k)}, {self.key_tiling}",
                "",
                f"{'for each query tile':<19}{'mean':>10}{'worst':>8}",
                *counts,
                "",
                f"TFLOP              {useful} useful, {all_executed} executed ({executed:.3f}x), "
                f"{dense} dense",
                f"speedup bound      {self.speedup_bound:.2f}x, "
                f"{self.speedup_bound_worst:.2f}x by the worst query tile, "
                f"{self.perfect_bound:.2f}x with perfect block sparsity",
                f"predicted          {self.predicted_ms:.4g} ms on an H100, "
                f"{self.useful_flops / self.predicted_ms / 1e9:.0f} useful TFLOP/s",
            ]
        )

    def plot(self, path: str | PathLike[str], query: Sequence[int] | None = None) -> None:
        """Writes a PNG: the keys one query sees, the tiles visited for it, and the distribution.

        Args:
            path: PNG file to write; must end in .png.
            query: token coordinates; default: the center of the grid.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError, TypeError: path or query is not allowed.
            OSError: the file cannot be written.
        """
        from sparse_fmha.plotting.tiles import draw

        draw(self._view(query), path)

    def _view(self, query: Sequence[int] | None = None) -> TileView:
        # Imported here, because only these need numpy.
        from sparse_fmha.cost.tile_lines import check_query, lines
        from sparse_fmha.plotting.views import TileView

        query = check_query(self.grid, query)
        walk = (self.grid, self.window, self.stride, self.dilation, self.causal)
        of_query = lines(walk, (self.tile_q, self.tile_k), self.key_tiling == "static", query)
        options = "".join(
            f", {name} {joined(map(int, values))}"
            for name, values, usual in (
                ("stride", self.stride, 1),
                ("dilation", self.dilation, 1),
                ("causal", self.causal, False),
            )
            if any(value != usual for value in values)
        )
        title = (
            f"grid {joined(self.grid)}, window {joined(self.window)}{options}\n"
            f"query tiles {joined(self.tile_q)}, key tiles {joined(self.tile_k)}, "
            f"{self.key_tiling}; the query at {joined(query)}"
        )
        return TileView(title, self.grid, of_query, self.distribution, *self.visited)


def simulate(
    grid: int | Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    heads: int = 1,
    batch: int = 1,
    head_dim: int = 128,
    tile_q: int | Sequence[int] | None = None,
    tile_k: int | Sequence[int] | None = None,
    key_tiling: str = "dynamic",
    extra: int = 0,
) -> Simulation:
    """Counts the tiles that `neighborhood_attention` visits, and derives bounds and a time.

    The counts use the Hopper kernel's walk, so they are exact; the time is a prediction. With
    `key_tiling="static"` and the worst query tile, the bounds are those of Hassani et al.,
    "Generalized Neighborhood Attention", arXiv 2504.16922, appendix B.1.

    Args:
        grid: tokens on each of one to three axes.
        window, stride, dilation, causal: as in `neighborhood_attention`; one value serves all axes.
        heads: query heads.
        batch: batch entries.
        head_dim: a multiple of 8 up to 256.
        tile_q: queries per tile on each axis; default: the cheapest box that the kernel supports,
            of 128 tokens with powers of two as sides.
        tile_k: keys per tile on each axis; default: 128 tokens, 64 for head dims over 128.
        key_tiling: "dynamic", key tiles that start at the edge of the window, as in the kernel; or
            "static", key tiles on a grid that all query tiles share.
        extra: tokens that every query sees besides its window.

    Raises:
        ValueError, TypeError: an argument is not allowed, as in `neighborhood_attention`.
        ImportError: the extension `_C` is not available for this Python.
    """
    problem = check_problem(
        grid, window, stride, dilation, causal, heads, batch, head_dim, key_tiling, extra
    )
    return _with_tiles(problem, *_choose(problem, tile_q, tile_k))


def ranking(
    count: int, *, tile_q: object = None, tile_k: object = None, **options: Any
) -> list[Simulation]:
    """Returns the best `count` tile pairs, cheapest first; arguments as in `simulate`."""
    problem = check_problem(**options)
    return [_with_tiles(problem, *pair) for pair in _rank(problem, tile_q, tile_k)[:count]]


def _choose(problem: Problem, tile_q: object, tile_k: object) -> tuple[Triple, Triple]:
    if tile_q is None and tile_k is None and not problem.static:
        tiles = tile_simulator()
        head_dim, rows_q, rows_k = problem.row
        costs = tiles.costs(head_dim)
        return tiles.choose(problem.walk, rows_q, rows_k, _max_extent(problem), costs)
    return _rank(problem, tile_q, tile_k)[0]


def _max_extent(problem: Problem) -> Triple:
    """Returns the largest box that TMA supports."""
    grid, _, _, dilation, _ = problem.walk
    return tile_simulator().one_launch_box(grid, dilation)


def _rank(problem: Problem, tile_q: object, tile_k: object) -> list[tuple[Triple, Triple]]:
    """Returns tile pairs, with the given tiles if any, cheapest first."""
    given_q, given_k = (
        check_tile(name, value, problem.axes)
        for name, value in (("tile_q", tile_q), ("tile_k", tile_k))
    )
    if given_q and given_k:
        return [(given_q, given_k)]
    tiles = tile_simulator()
    head_dim, rows_q, rows_k = problem.row
    costs = tiles.costs(head_dim)
    limits = _max_extent(problem)
    ranked = tiles.rank(problem.walk, rows_q, rows_k, limits, costs, problem.static)
    if not given_q and not given_k:
        return [(q, k) for q, k, *_ in ranked]
    # One tile is given and need not be a box that the kernel supports.
    pairs = {(given_q or q, given_k or k): None for q, k, *_ in ranked}

    def cost(pair: tuple[Triple, Triple]) -> float:
        return sum(count * us for count, _, us in _timed_groups(problem, *pair))

    return sorted(pairs, key=cost)


def _timed_groups(
    problem: Problem, q: Triple, k: Triple
) -> list[tuple[int, tuple[int, int], float]]:
    """Returns groups: (query tiles, (visited, full) of each, microseconds of each)."""
    tiles = tile_simulator()
    head_dim, rows_q, rows_k = problem.row
    full_us, partial_us, query_us = tiles.costs(head_dim)
    # The costs are for the kernel's tiles; other tiles are assumed to cost in proportion to size.
    of_queries = math.prod(q) / rows_q
    area = of_queries * math.prod(k) / rows_k
    extra_tiles = -(-problem.extra // math.prod(k))
    extra_full = problem.extra // math.prod(k)
    groups = []
    for count, visited, full in tiles.groups(problem.walk, (q, k), problem.static):
        visited, full = visited + extra_tiles, full + extra_full
        microseconds = query_us * of_queries + area * (
            full * full_us + (visited - full) * partial_us
        )
        groups.append((count, (visited, full), microseconds))
    return groups


def _with_tiles(problem: Problem, q: Triple, k: Triple) -> Simulation:
    tokens = math.prod(problem.walk[0])
    heads = problem.batch * problem.heads
    groups = _timed_groups(problem, q, k)
    query_tiles = sum(count for count, *_ in groups)
    distribution: dict[int, int] = {}
    for count, (tiles, _), _ in groups:
        distribution[tiles] = distribution.get(tiles, 0) + count

    def spread(number: Callable[[int, int], int]) -> Tiles:
        numbers = [(count, number(*of)) for count, of, _ in groups]
        return Tiles(sum(c * n for c, n in numbers) / query_tiles, max(n for _, n in numbers))

    visited = spread(lambda visited, full: visited)
    total = sum(count * tiles for tiles, count in distribution.items())
    dense_keys = -(-(tokens + problem.extra) // math.prod(k))
    dense_queries = -(-tokens // math.prod(q))
    # With tiles of one token, the tiles visited are the visible pairs.
    _, on_grid, *_ = tile_simulator().count(problem.walk, ((1, 1, 1), (1, 1, 1)))
    pairs = on_grid + tokens * problem.extra
    flops = 4 * heads * problem.head_dim
    useful, dense = flops * pairs, flops * tokens * (tokens + problem.extra)
    first = 3 - problem.axes  # the grid's first axis
    grid, window, stride, dilation, causal = (values[first:] for values in problem.walk)
    return Simulation(
        grid=grid,
        window=window,
        stride=stride,
        dilation=dilation,
        causal=tuple(map(bool, causal)),
        heads=problem.heads,
        batch=problem.batch,
        head_dim=problem.head_dim,
        extra=problem.extra,
        key_tiling=problem.key_tiling,
        tile_q=_shown(q, problem.axes),
        tile_k=_shown(k, problem.axes),
        query_tiles=query_tiles,
        visited=visited,
        full=spread(lambda visited, full: full),
        partial=spread(lambda visited, full: visited - full),
        distribution=dict(sorted(distribution.items())),
        useful_flops=useful,
        executed_flops=4 * heads * problem.row[0] * total * math.prod(q) * math.prod(k),
        dense_flops=dense,
        speedup_bound=dense_queries * dense_keys / total,
        speedup_bound_worst=dense_keys / visited.worst,
        perfect_bound=dense / useful,
        predicted_ms=makespan((count * heads, us) for count, _, us in groups) / 1e3,
    )


def _shown(tile: Triple, axes: int) -> Coord:
    beyond = 3 - axes
    return tile[beyond:] if all(extent == 1 for extent in tile[:beyond]) else tile


def tile_simulator() -> _Tiles:
    from sparse_fmha._extension import _C

    return _C.tiles
