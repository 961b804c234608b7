"""Methods of the node for ComfyUI that others have not: windows of any grid, and its own ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_fmha import patterns
from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_layout import Layout, Seen
from sparse_fmha.masks.block_grid import BlockGrid

# What conditioning tokens are: keys that all see exactly, that and queries of the whole, or as all.
CONDITIONING = ("exact_kv", "exact_kv_and_rows", "off")
BLOCK = 64


@dataclass(frozen=True)
class Tokens(Layout):
    """The layout of a call in ComfyUI."""

    rows_from: int = 0  # of the tokens before the grid, the first one with "exact_kv_and_rows"


class Windows:
    """Neighborhoods of one size on any grid: an axis that is shorter is whole."""

    def __init__(self, window: tuple[int, int, int]) -> None:
        self.window = window

    def check(self, layout: Layout) -> None:
        self.prepared(layout, None).check(layout)

    def prepared(self, layout: Layout, device: object) -> Any:
        sizes = zip(self.window[-len(layout.grid) :], layout.grid, strict=True)
        window = tuple(min(size or length, length) for size, length in sizes)
        return table.make("neighborhood", {"window": window})


class Routed:
    """`patterns.sol_attention` over all tokens in the model's order, as in ComfyUI's own node.

    Args:
        options: `tau` or `keep`.
        extra_tokens: as in `sol_attention`.
        conditioning: of `CONDITIONING`; which of the tokens beside the grid are exact.
    """

    def __init__(self, options: Mapping[str, float], extra_tokens: int, conditioning: str) -> None:
        self.options, self.extra_tokens, self.conditioning = options, extra_tokens, conditioning

    def check(self, layout: Layout) -> None:
        pass

    def prepared(self, layout: Layout, device: object) -> Routed:
        return self

    def forced(self, q: Tensor, k: Tensor, layout: Layout) -> Tensor | None:
        if not layout.plain or self.conditioning == "off":
            return None
        grid = BlockGrid.of(q, k, BLOCK, BLOCK)
        end = layout.before + layout.image
        found = grid.keys(0, layout.before).logical_or_(grid.keys(end))
        if self.conditioning == "exact_kv_and_rows":
            first = layout.rows_from if isinstance(layout, Tokens) else 0
            found |= grid.queries(first, layout.before) | grid.queries(end)
        return found

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, seen: Seen, scale: float | None
    ) -> Tensor:
        return patterns.sol_attention(
            q,
            k,
            v,
            **self.options,
            forced=self.forced(q, k, layout),
            rest="block",
            extra_tokens=self.extra_tokens,
            scale=scale,
            block=BLOCK,
        )
