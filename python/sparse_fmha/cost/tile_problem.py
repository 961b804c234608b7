"""Checked arguments of the tile simulator, and the tile sizes of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div

KEY_TILINGS = ("dynamic", "static")
MAX_TOKENS = 2**30
MAX_TILE_TOKENS = 2**16

# (largest head dim, tokens of a query tile, of a key tile) of csrc/kernels/sm90_forward.def.
ROWS = ((64, 128, 128), (96, 128, 128), (128, 128, 128), (256, 128, 64))

Coord = tuple[int, ...]
Triple = tuple[int, int, int]
Walk = tuple[Triple, Triple, Triple, Triple, Triple]  # grid, window, stride, dilation, causal


@dataclass(frozen=True)
class Problem:
    """Checked arguments; missing axes are 1, as in Neighborhood::Params."""

    axes: int
    walk: Walk
    heads: int
    batch: int
    head_dim: int
    key_tiling: str
    extra: int

    @property
    def static(self) -> bool:
        return self.key_tiling == "static"

    @property
    def row(self) -> tuple[int, int, int]:
        return next(row for row in ROWS if row[0] >= self.head_dim)


def check_problem(
    grid: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    heads: int = 1,
    batch: int = 1,
    head_dim: int = 128,
    key_tiling: str = "dynamic",
    extra: int = 0,
) -> Problem:
    axes = len(grid) if isinstance(grid, Sequence) else 1
    if not 1 <= axes <= 3:
        raise ValueError(f"grid must have one to three axes, got {grid!r}")
    grid = _checks.per_axis("grid", grid, axes)
    if min(grid) < 1 or math.prod(grid) > MAX_TOKENS:
        raise ValueError(
            f"grid must have at least 1 token on every axis and at most {MAX_TOKENS} in all, got "
            f"{joined(grid)}"
        )
    windows = _checks.per_axis("window", window, axes)
    strides = _checks.per_axis("stride", stride, axes)
    dilations = _checks.per_axis("dilation", dilation, axes)
    causals = _checks.per_axis("causal", causal, axes, bool)
    _checks.check_neighborhood(grid, windows, strides, dilations, causals)
    # As in the op: a causal window is clamped to the sequence, and with a window of 1 the dilation
    # has no effect.
    windows = [
        min(w, ceil_div(length, d)) if ends else w
        for length, w, d, ends in zip(grid, windows, dilations, causals, strict=True)
    ]
    strides = [min(s, w) for s, w in zip(strides, windows, strict=True)]
    dilations = [1 if w == 1 else d for w, d in zip(windows, dilations, strict=True)]
    for name, value, least in (("heads", heads, 1), ("batch", batch, 1), ("extra", extra, 0)):
        _check_int(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    _check_int("head_dim", head_dim)
    _checks.check_head_dim("head_dim", head_dim)
    if key_tiling not in KEY_TILINGS:
        raise ValueError(f"key_tiling must be {_checks.one_of(KEY_TILINGS)}, got {key_tiling!r}")
    walk = walk_of(grid, windows, strides, dilations, causals)
    return Problem(axes, walk, heads, batch, head_dim, key_tiling, extra)


def triple(values: Sequence[int], fill: int = 1) -> Triple:
    """Pads the values of the last axes to three axes with `fill`."""
    t, y, x = (*[fill] * (3 - len(values)), *values)
    return t, y, x


def walk_of(
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[int],
) -> Walk:
    """Returns the arguments on three axes."""
    return triple(grid), triple(window), triple(stride), triple(dilation), triple(causal, 0)


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_tile(name: str, value: object, axes: int) -> Triple | None:
    """Checks a tile given for the grid's axes, or for all three."""
    if value is None:
        return None
    if isinstance(value, Sequence) and len(value) == 3:
        axes = 3
    tile = triple(_checks.per_axis(name, value, axes))
    if min(tile) < 1 or math.prod(tile) > MAX_TILE_TOKENS:
        raise ValueError(
            f"{name} must have at least 1 token on every axis and at most {MAX_TILE_TOKENS} in "
            f"all, got {value!r}"
        )
    return tile


def joined(values: Iterable[int]) -> str:
    return "x".join(map(str, values))
