"""FastVideo's sliding tile attention as a peer: the Hopper kernel in the package fastvideo-kernel.

Its windows are whole tiles of 6x8x8 tokens around the query's tile, shifted at the borders. That is
neighborhood attention with a stride of one tile wherever the window is an odd number of tiles on
each axis and tiles divide the grid (tests/benchmarks/test_benchmarks.py compares the masks).
"""

from __future__ import annotations

import importlib.util

import torch

from benchmarks.cases import grids
from benchmarks.cases.case import Case
from benchmarks.harness.names import UnavailableError

TILE = (6, 8, 8)
GRID = (18, 48, 80)  # the grid without text tokens that neighborhood cases can have
GRID_FLAG = 3  # what the kernel calls this grid
# In tiles: the odd ones of those compiled into 0.3.2. Another one only prints a message.
WINDOWS = {(3, 3, 3), (3, 3, 5), (3, 5, 5), (3, 5, 7), (3, 5, 9), (1, 5, 7), (1, 5, 9)}


def sta(case: Case, q, k, v):
    """The whole op from and to the layout of the others: its copies into tiles and back count."""
    window = window_in_tiles(case)
    forward = load()
    q, k, v = (x.view(x.shape[0], *case.grid, *x.shape[2:]) for x in (q, k, v))

    def op():
        tiles = [grids.to_tiles(x, TILE) for x in (q, k, v)]
        out = torch.empty_like(tiles[0])
        forward(*tiles, out, *window, 0, False, False, GRID_FLAG)  # no text tokens
        return grids.from_tiles(out, GRID, TILE)

    return op


def window_in_tiles(case: Case) -> tuple[int, ...]:
    """UnavailableError where the kernel does not compute the case."""
    if case.grid != GRID or case.stride != TILE:
        raise UnavailableError("takes a grid of 18x48x80 and a stride of 6x8x8")
    if case.dtype != "bfloat16" or case.head_dim != 128:
        raise UnavailableError("takes bfloat16 and head dim 128")
    if any(case.causal) or set(case.dilation) != {1}:
        raise UnavailableError("is neither causal nor dilated")
    window = tuple(w / side for w, side in zip(case.window, TILE, strict=True))
    if window not in WINDOWS:  # a fraction of a tile is in none of them
        raise UnavailableError("has no kernel for this window")
    return tuple(map(int, window))


def load():
    """The kernel; UnavailableError says why there is none."""
    if importlib.util.find_spec("fastvideo_kernel") is None:
        raise UnavailableError("the package fastvideo-kernel is not installed")
    try:
        from fastvideo_kernel.ops import sta_fwd
    except (ImportError, OSError) as problem:
        raise UnavailableError(f"fastvideo-kernel does not load: {problem}") from problem
    if sta_fwd is None:  # the package takes a Triton kernel instead, which is not what is asked for
        raise UnavailableError("fastvideo-kernel has no compiled kernel for this Python and torch")
    return sta_fwd
