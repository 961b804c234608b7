"""The key tiles visited for one query, axis by axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparse_fmha import _checks
from sparse_fmha._extension import _C
from sparse_fmha.cost.tile_problem import Coord, triple, walk_of
from sparse_fmha.plotting.views import Line


def check_query(grid: Coord, query: Sequence[int] | None) -> list[int]:
    """Returns token coordinates on the grid, checked; default: the center of the grid."""
    if query is None:
        query = [length // 2 for length in grid]
    query = _checks.per_axis("query", query, len(grid))
    for axis, (token, length) in enumerate(zip(query, grid, strict=True)):
        if not 0 <= token < length:
            raise ValueError(f"query[{axis}] must be from 0 to {length - 1}, got {token}")
    return query


def lines(
    walk: tuple[Coord, Coord, Coord, Coord, tuple[bool, ...]],
    tiles: tuple[Coord, Coord],
    static: bool,
    query: list[int],
) -> tuple[Line, Line, Line]:
    """Returns three axes; axes that the grid does not have get one token.

    Args:
        walk: grid, window, stride, dilation, causal, on the grid's axes.
        tiles: tokens of a query tile and of a key tile, on these axes or on all three.
        static: key tiles are on a grid that all query tiles share.
        query: token coordinates.
    """
    simulator = _C.tiles
    problem = walk_of(*walk)
    tile_q, tile_k = (triple(tile) for tile in tiles)
    one = (1, 1, 1)
    result = []
    for axis, token in enumerate(triple(query, 0)):
        dilation = problem[3][axis]
        position, residue = divmod(token, dilation)
        where = axis, residue
        begin, size, *_ = simulator.axis(problem, *where, (one, one), False, position)
        first = position - position % tile_q[axis]
        origin, count, full_first, full = simulator.axis(
            problem, *where, (tile_q, tile_k), static, first
        )
        length = problem[0][axis]
        seen = np.zeros(length, bool)
        seen[begin * dilation + residue : (begin + size) * dilation : dilation] = True
        full_tiles = range(full_first, full_first + max(full, 0))
        of_class = length // dilation + (residue < length % dilation)
        last = min(first + tile_q[axis], of_class) - 1
        query_tile = first * dilation + residue, last * dilation + residue
        tiles_of_axis = origin, tile_k[axis], count, full_tiles, query_tile
        result.append(Line(length, token, seen, dilation, residue, *tiles_of_axis))
    t, y, x = result
    return t, y, x
