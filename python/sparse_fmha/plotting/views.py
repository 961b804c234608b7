"""The data that plots of a simulation are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """One axis: what the query sees, its query tile, and the key tiles that the tile visits."""

    length: int
    query: int
    seen: np.ndarray  # per token
    dilation: int
    residue: int
    origin: int  # position of the first key tile
    step: int  # positions per key tile
    count: int
    full: range  # tiles that are full on this axis
    query_tile: tuple[int, int]  # first and last token of the query tile

    def tile_of_tokens(self, first: int, last: int) -> np.ndarray:
        """Returns the key tile of each token from first to last, -1 if it is in none."""
        tokens = np.arange(first, last + 1)
        tile = (tokens // self.dilation - self.origin) // self.step
        inside = (tokens % self.dilation == self.residue) & (tile >= 0) & (tile < self.count)
        return np.where(inside, tile, -1)

    def span(self, tile: int) -> tuple[int, int]:
        """Returns the first and last token of a key tile; it may extend past the grid."""
        first = self.origin + tile * self.step
        last = first + self.step - 1
        return first * self.dilation + self.residue, last * self.dilation + self.residue


@dataclass(frozen=True)
class TileView:
    """The tiles visited for one query, and how many all query tiles visit."""

    title: str
    grid: tuple[int, ...]
    lines: tuple[Line, Line, Line]  # the axes T, Y, X; missing axes have one token
    distribution: dict[int, int]  # key tiles visited: number of query tiles
    mean: float
    worst: int
