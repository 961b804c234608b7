"""Which tokens of a self-attention are on the grid, and which others a query sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]  # from and to, of the tokens that are visible
# What each batch entry sees of the plain tokens; in a compiled graph bool [B, plain tokens]. Floats
# of that shape are biases of their scores.
Seen = Sequence[Runs] | Tensor


@dataclass(frozen=True)
class Layout:
    """The tokens of one self-attention: the grid in row-major order, amid plain tokens (text,
    references)."""

    grid: tuple[int, ...]
    before: int = 0  # plain tokens before the grid
    after: int = 0
    cached: int = 0  # of those before it, the last ones that are keys alone

    @property
    def queries(self) -> Layout:
        """Of the queries, where this is that of the keys."""
        return Layout(self.grid, self.before - self.cached, self.after) if self.cached else self

    @property
    def image(self) -> int:
        return math.prod(self.grid)

    @property
    def plain(self) -> int:
        return self.before + self.after

    @property
    def tokens(self) -> int:
        return self.image + self.plain

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits `[B, tokens, ...]` into those of the grid and the plain ones; views of x, unless
        there are plain ones on both sides."""
        end = self.before + self.image
        first, image, last = x[:, : self.before], x[:, self.before : end], x[:, end:]
        if not self.before or not self.after:
            return image, last if self.after else first
        return image, torch.cat([first, last], 1)

    def join(self, image: Tensor, plain: Tensor) -> Tensor:
        """The inverse of `split`."""
        parts = [plain[:, : self.before], image, plain[:, self.before :]]
        return torch.cat([part for part in parts if part.shape[1]], 1)

    def image_of(self, x: Tensor) -> Tensor:
        """The tokens of the grid, a view of `[B, tokens, ...]`."""
        return x[:, self.before : self.before + self.image]

    def write_plain(self, x: Tensor, plain: Tensor) -> None:
        """Writes the plain tokens into `[B, tokens, ...]`."""
        x[:, : self.before] = plain[:, : self.before]
        x[:, self.before + self.image :] = plain[:, self.before :]

    def visible(self, plain: Tensor, runs: Runs) -> Tensor:
        """The plain tokens of some runs, at least one, in `[B, plain, ...]`."""
        parts = [plain[:, start:stop] for start, stop in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def seen(self, x: Tensor, runs: Runs) -> Tensor:
        """Returns `[B, tokens, ...]` without plain tokens that are not in `runs`, in any order."""
        if runs == self.all_runs():
            return x
        if not self.before and len(runs) == 1 and runs[0][0] == 0:
            return x[:, : self.image + runs[0][1]]  # a view: nothing is copied for right padding
        image, plain = self.split(x)
        return torch.cat([image, self.visible(plain, runs)], 1) if runs else image

    def all_runs(self) -> Runs:
        """Of all plain tokens."""
        return ((0, self.plain),) if self.plain else ()

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return (
            f"the grid {grid} has {self.image} tokens, with {self.plain} of text and references "
            f"{self.tokens}"
        )


def runs_of(visible: list[bool]) -> Runs:
    """The runs of True."""
    edges = [i for i, x in enumerate(visible) if i == 0 or x != visible[i - 1]]
    ends = [*edges[1:], len(visible)]
    return tuple((a, b) for a, b in zip(edges, ends, strict=True) if visible[a])
