"""Sliding tile attention, as a neighborhood."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_fmha._checks import check_collection, check_int, plain_ints


@plain_ints
def sliding_tile(
    grid: Sequence[int], tile: Sequence[int], window: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the window and stride with which `neighborhood_attention` is sliding tile attention.

    The grid is cut into tiles. All queries of a tile see the same box of `window` tiles, around
    their own; at borders the box shifts and keeps its size. That is a neighborhood of
    `window * tile` tokens with the tile as its stride:

        window, stride = sliding_tile((30, 48, 80), (6, 8, 8), (3, 3, 3))
        out = neighborhood_attention(q, k, v, window, stride=stride)  # q, k, v: [B, *grid, H, D]

    Text that all queries see goes into `extra_k` and `extra_v`; queries of text are a call of
    `attention` over all keys.

    Source: Zhang et al. 2025, "Fast Video Generation with Sliding Tile Attention",
    arXiv:2502.04507; for HunyuanVideo at 30 x 48 x 80 (720p) tiles of 6 x 8 x 8, where a window of
    3 x 3 x 3 sees 9%, 15 of 50 steps are dense, and windows are searched for each head. A call has
    one window for all heads; heads with other windows are calls of their own.

    Args:
        grid: one to three lengths. tile: as many, which divide them.
        window: tiles on each axis: odd, or all of the axis.

    Raises:
        ValueError: a length is not allowed.
        TypeError: a length is not an int.
    """
    check_collection("grid", grid)
    check_collection("tile", tile)
    check_collection("window", window)
    if not 1 <= len(grid) <= 3 or not len(grid) == len(tile) == len(window):
        raise ValueError(
            "grid, tile and window must have one to three entries, as many in each, got "
            f"{list(grid)}, {list(tile)} and {list(window)}"
        )
    windows, strides = [], []
    for n, (length, size, tiles) in enumerate(zip(grid, tile, window, strict=True)):
        check_int(f"grid[{n}]", length, 1)
        check_int(f"window[{n}]", tiles, 1)
        if length % check_int(f"tile[{n}]", size, 1):
            raise ValueError(f"tile[{n}] must divide grid[{n}] = {length}, got {size}")
        if tiles * size > length:
            raise ValueError(
                f"window[{n}] must be at most the {length // size} tiles of that axis, got {tiles}"
            )
        if not tiles % 2 and tiles * size < length:
            raise ValueError(f"window[{n}] must be odd or all {length // size} tiles, got {tiles}")
        windows.append(tiles * size)
        strides.append(size)
    return tuple(windows), tuple(strides)
