"""What pictures of a simulation are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """One axis: what the query sees there, its query tile and the key tiles that this visits."""

    length: int
    query: int
    seen: np.ndarray  # per token
    dilation: int
    residue: int
    origin: int  # position of the first key tile
    step: int  # positions of a tile
    count: int
    full: range  # tiles that are full as far as this axis goes
    query_tile: tuple[int, int]  # first and last token of the query tile

    def tile_of_tokens(self, first: int, last: int) -> np.ndarray:
        """The key tile of each of the tokens first to last, -1 where it is in none."""
        tokens = np.arange(first, last + 1)
        tile = (tokens // self.dilation - self.origin) // self.step
        inside = (tokens % self.dilation == self.residue) & (tile >= 0) & (tile < self.count)
        return np.where(inside, tile, -1)

    def span(self, tile: int) -> tuple[int, int]:
        """First and last token of a key tile, which may lie behind the last of the grid."""
        first = self.origin + tile * self.step
        last = first + self.step - 1
        return first * self.dilation + self.residue, last * self.dilation + self.residue


@dataclass(frozen=True)
class TileView:
    """The tiles visited for one query, and how many all query tiles visit."""

    title: str
    grid: tuple[int, ...]
    lines: tuple[Line, Line, Line]  # the axes T, Y, X; those that the grid lacks have one token
    distribution: dict[int, int]  # key tiles visited: how many query tiles visit that many
    mean: float
    worst: int
