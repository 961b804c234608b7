"""What pictures of a simulation are drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """One axis: what the query sees there, and the key tiles that its query tile visits."""

    length: int
    query: int
    seen: np.ndarray  # per token
    dilation: int
    residue: int
    origin: int  # position of the first key tile
    step: int  # positions of a tile
    count: int
    full: range  # tiles that are full as far as this axis goes

    def span(self, tile: int) -> tuple[int, int]:
        """First and last token of a key tile, which may lie behind the last of the grid."""
        first = self.origin + tile * self.step
        return tuple(
            position * self.dilation + self.residue for position in (first, first + self.step - 1)
        )


@dataclass(frozen=True)
class TileView:
    """The tiles visited for one query, and how many all query tiles visit."""

    grid: tuple[int, ...]
    lines: tuple[Line, Line, Line]  # the axes T, Y, X; those that the grid lacks have one token
    distribution: dict[int, int]  # key tiles visited: how many query tiles visit that many
    mean: float
    worst: int
