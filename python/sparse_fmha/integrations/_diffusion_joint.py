"""Published methods that compute all tokens together: those of the grid, then the other ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_fmha import patterns
from sparse_fmha._checks import check_int, check_number
from sparse_fmha.integrations._diffusion_beside import beside, by_runs
from sparse_fmha.integrations._diffusion_layout import Layout, Runs, Seen
from sparse_fmha.integrations._diffusion_masks import ONE, no_choice
from sparse_fmha.integrations._diffusion_methods import Sparse
from sparse_fmha.integrations._kept import kept
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.psa import LEVELS, SHARES
from sparse_fmha.patterns.sol import with_lse as sol_with_lse


class Joint(Sparse):
    """Base of these methods, in which the plain tokens that are seen are text after the grid."""

    in_graph: ClassVar[bool] = False  # their number is part of shapes

    def __post_init__(self) -> None:
        one = torch.zeros(ONE, device="cpu")
        self.attend(one, one, one, Layout((1, 1, 1)), 0, None)

    def check(self, layout: Layout) -> None:
        if layout.cached:
            raise NotImplementedError(
                "keys without queries (cached references of Flux 2, text of Cosmos 3) are not "
                f"supported by {type(self).__name__}, which computes queries and keys of the same "
                "tokens"
            )

    def in_parts(self, layout: Layout) -> bool:
        return True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text: int, scale: float | None
    ) -> Tensor:
        """The output of the grid's tokens and `text` tokens after them."""
        raise NotImplementedError

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        def joined(x: Tensor, runs: Runs) -> Tensor:
            if not layout.before or not runs:
                return layout.seen(x, runs)
            image, plain = layout.split(x)
            return torch.cat([image, layout.visible(plain, runs)], 1)

        def joint(runs: Runs, *tensors: Tensor) -> Tensor:
            q, k, v = (joined(x, runs) for x in tensors)
            text = q.shape[1] - layout.image
            return self.attend(q, k, v, layout, text, scale)[:, : layout.image]

        return by_runs(seen, joint, q, k, v)


@dataclass(frozen=True)
class Sol(Joint):
    """`patterns.sol_attention`; blocks with text are exact. Where some text is padding in a
    compiled graph, where queries are fewer than keys, and where keys have biases, the text is
    beside the grid's tokens."""

    tau: float = 1.0
    rest: str = "token"
    block: int = 64
    extra_tokens: int = 0
    in_graph: ClassVar[bool] = True

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self, layout: Layout) -> None:
        pass

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        whole = not isinstance(seen, Tensor) and not layout.cached
        if not whole or any(runs != layout.all_runs() for runs in seen):
            return super().__call__(q, k, v, layout, seen, scale)
        # All tokens in the order of the model: their blocks of text see all, and nothing is copied.
        return self.attend(q, k, v, layout, layout.plain, scale, layout.before)

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        if not isinstance(seen, Tensor) and not layout.cached:
            return super().image(q, k, v, layout, seen, scale)
        q = layout.queries.split(q)[0]
        (k, plain_k), (v, plain_v) = layout.split(k), layout.split(v)
        out, lse = sol_with_lse(q, k, v, scale=scale, **self.options)
        return beside(out, lse, q, plain_k, plain_v, layout, seen, scale)

    def in_parts(self, layout: Layout) -> bool:
        return layout.plain > 0  # without other tokens the pattern itself does that

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        text: int,
        scale: float | None,
        before: int = 0,
    ) -> Tensor:
        """As `Joint.attend`; `before` tokens of the text are before the grid."""
        grid = BlockGrid.of(q, k, self.block, self.block)
        forced = grid.tokens(0, before) if before else None
        if after := text - before:
            behind = grid.tokens(-after)
            forced = behind if forced is None else forced.logical_or_(behind)
        return patterns.sol_attention(q, k, v, forced=forced, scale=scale, **self.options)


@dataclass(frozen=True)
class Rectified(Joint):
    """`patterns.rectified_attention`."""

    keep: float = 0.2
    theta: float = 0.3
    block: int = 128

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from no_choice("keep", self.keep, "blocks")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text: int, scale: float | None
    ) -> Tensor:
        return patterns.rectified_attention(
            q, k, v, text=text, keep=self.keep, theta=self.theta, block=self.block, scale=scale
        )


@dataclass(frozen=True)
class PSA(Joint):
    """`patterns.psa_levels` and `patterns.psa_attention`."""

    shares: Mapping[int, float] = field(default_factory=lambda: dict(SHARES))
    by: str = "rank"
    least: float = 0.06
    similarity: Mapping[int, float] | None = None
    every: int = 4

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text: int, scale: float | None
    ) -> Tensor:
        levels = patterns.psa_levels(
            q,
            k,
            self.shares,
            by=self.by,
            least=self.least,
            similarity=self.similarity,
            text=text,
            every=self.every,
            scale=scale,
        )
        pools = sorted({1, *self.shares}) if self.similarity is None else LEVELS
        return patterns.psa_attention(q, k, v, levels, pools=pools, scale=scale)


@dataclass(frozen=True)
class SVG(Joint):
    """`patterns.svg_attention`; heads are spatial or temporal anew in each call."""

    keep: float = 0.25
    first_frame: bool = False
    rows: int = 64
    block: int = 128
    video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("keep", self.keep, 0, 1)
        check_int("rows", self.rows, 1)
        # A smaller share of so few tokens would be no block.
        patterns.svg_mask(1, 128, keep=1.0, first_frame=self.first_frame, block=self.block)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text: int, scale: float | None
    ) -> Tensor:
        sizes = layout.grid[0], math.prod(layout.grid[1:])
        mask: BlockMask = kept(
            patterns.svg_mask,
            *sizes,
            text=text,
            keep=self.keep,
            first_frame=self.first_frame,
            block=self.block,
            device=q.device,
        )
        temporal = patterns.svg_heads(q, k, v, mask, *sizes, rows=self.rows, scale=scale)
        return patterns.svg_attention(q, k, v, mask, *sizes, temporal, scale=scale)
