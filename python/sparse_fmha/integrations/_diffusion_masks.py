"""Published methods that are masks of the grid; all other tokens are seen exactly beside them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from sparse_fmha import patterns
from sparse_fmha._checks import check_int
from sparse_fmha.integrations._diffusion_beside import under_mask
from sparse_fmha.integrations._diffusion_layout import Layout, Seen
from sparse_fmha.integrations._diffusion_methods import BlockSparse, Neighborhood, Sparse
from sparse_fmha.integrations._kept import kept
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.vsa import kept_cubes

M = TypeVar("M", bound=Sparse)
ONE = (1, 1, 1, 8)  # shape of q and k with one token, to check options with


@dataclass(frozen=True)
class SlidingTile(Sparse):
    """`patterns.sliding_tile`: a neighborhood with the tile as its stride."""

    tile: Sequence[int]
    window: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("tile", "window"):
            _check_axes(name, getattr(self, name))
        if len(self.tile) != len(self.window):
            raise ValueError(
                f"window must have as many entries as tile = {self.tile!r}, got {self.window!r}"
            )
        # On a grid as large as the window any window fits.
        grid = [t * w for t, w in zip(self.tile, self.window, strict=True)]
        patterns.sliding_tile(grid, self.tile, self.window)

    def on(self, layout: Layout) -> Neighborhood:
        window, stride = patterns.sliding_tile(layout.grid, self.tile, self.window)
        return Neighborhood(window, stride)

    def check(self, layout: Layout) -> None:
        self.on(layout).check(layout)

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        window = self.on(layout).window
        if window == layout.grid:
            yield (
                "window",
                f"window = {self.window!r} has no effect: it covers the whole grid {layout.grid}",
            )

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        return self.on(layout).image(q, k, v, layout, seen, scale)


@dataclass(frozen=True)
class Radial(Sparse):
    """`patterns.radial`."""

    decay: float = 1.0
    first_frame: bool = False
    block: int = 128
    video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Not kept, as these may not be hashable.
        patterns.radial(
            1, 1, decay=self.decay, first_frame=self.first_frame, block=self.block, device="cpu"
        )

    def check(self, layout: Layout) -> None:
        tokens = math.prod(layout.grid[1:])
        if 3 * tokens <= self.block:  # a pair of blocks is listed from a third of its queries on
            raise ValueError(
                f"block must be below 3 * {tokens}, the tokens of a frame of the grid "
                f"{layout.grid}, got {self.block}"
            )

    def mask(self, layout: Layout, device: torch.device) -> BlockMask:
        mask: BlockMask = kept(
            patterns.radial,
            layout.grid[0],
            math.prod(layout.grid[1:]),
            decay=self.decay,
            first_frame=self.first_frame,
            block=self.block,
            device=device,
        )
        return mask

    def prepared(self, layout: Layout, device: torch.device) -> Sparse:
        return BlockSparse(self.mask(layout, device))


@dataclass(frozen=True)
class Subblock(Sparse):
    """`patterns.subblock`."""

    keep: float | Sequence[float] = 0.25
    piece: int = 16
    block: int = 64

    def __post_init__(self) -> None:
        one = _one(self.keep)
        self.choose(one, one, None)

    def in_parts(self, layout: Layout) -> bool:
        return True

    def of_heads(self, heads: slice) -> Subblock:
        return kept_of(self, heads)

    def choose(self, q: Tensor, k: Tensor, scale: float | None) -> BlockMask:
        return patterns.subblock(
            q,
            k,
            keep=self.keep,
            piece=self.piece,
            scale=scale,
            block_q=self.block,
            block_kv=self.block,
        )

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from no_choice("keep", self.keep, "blocks")

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        return under_mask(lambda q, k: self.choose(q, k, scale), q, k, v, layout, seen, scale)


class Cubes(Sparse):
    """Base of methods that choose cubes of the grid by means of q and k."""

    cube: Sequence[int] | None  # None: as published, for the number of axes
    published: ClassVar[dict[int, tuple[int, ...]]]  # by number of axes

    def __post_init__(self) -> None:
        if self.cube is not None:
            _check_axes("cube", self.cube)
        axes = max(self.published) if self.cube is None else len(self.cube)
        one = _one(getattr(self, "keep", None))
        self.choose(one, one, self.order(Layout((1,) * axes), one.device), None)

    def order(self, layout: Layout, device: torch.device) -> patterns.CubeOrder:
        cube = self.published[len(layout.grid)] if self.cube is None else tuple(self.cube)
        order: patterns.CubeOrder = kept(patterns.CubeOrder, layout.grid, cube, device=device)
        return order

    def choose(
        self, q: Tensor, k: Tensor, order: patterns.CubeOrder, scale: float | None
    ) -> BlockMask:
        raise NotImplementedError

    def of_heads(self, heads: slice) -> Cubes:
        return kept_of(self, heads)

    def prepared(self, layout: Layout, device: torch.device) -> Sparse:
        return Ordered(self, self.order(layout, device))


@dataclass(frozen=True)
class Ordered(Sparse):
    """A method of cubes on one grid."""

    method: Cubes
    order: patterns.CubeOrder

    def in_parts(self, layout: Layout) -> bool:
        return True

    def of_heads(self, heads: slice) -> Ordered:
        return replace(self, method=self.method.of_heads(heads))

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        order = self.order
        if order.slots.device != q.device:  # a layer on another device than the model's input
            order = self.method.order(layout, q.device)

        def mask_of(q: Tensor, k: Tensor) -> BlockMask:
            return self.method.choose(q, k, order, scale)

        return under_mask(mask_of, q, k, v, layout, seen, scale, order)


@dataclass(frozen=True)
class CubeTopK(Cubes):
    """`patterns.cube_top_k`."""

    keep: float | Sequence[float] = 0.25
    cube: Sequence[int] | None = None
    published: ClassVar[dict[int, tuple[int, ...]]] = {2: (8, 8), 3: (4, 4, 4)}

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from no_choice("keep", self.keep, "cubes")

    def choose(
        self, q: Tensor, k: Tensor, order: patterns.CubeOrder, scale: float | None
    ) -> BlockMask:
        return patterns.cube_top_k(q, k, order, keep=self.keep, scale=scale)


@dataclass(frozen=True)
class VSA(CubeTopK):
    """The fine branch of `patterns.vsa_attention`; the coarse one needs gates of the model."""

    keep: float | Sequence[float] = 0.1

    def choose(
        self, q: Tensor, k: Tensor, order: patterns.CubeOrder, scale: float | None
    ) -> BlockMask:
        cubes = math.prod(order.cubes)

        def rounded(share: float) -> float:
            return kept_cubes(share, cubes) / cubes

        given = self.keep
        keep: float | list[float]
        if isinstance(given, Sequence) and not isinstance(given, str):
            keep = [rounded(x) for x in given]
        else:
            keep = rounded(given)
        return patterns.cube_top_k(q, k, order, keep=keep, scale=scale)


@dataclass(frozen=True)
class Draft(Cubes):
    """`patterns.draft`."""

    keep: float | Sequence[float] = 0.1
    cube: Sequence[int] | None = None
    published: ClassVar[dict[int, tuple[int, ...]]] = {2: (8, 16), 3: (1, 8, 16)}

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from no_choice("keep", self.keep, "pairs of cubes")

    def choose(
        self, q: Tensor, k: Tensor, order: patterns.CubeOrder, scale: float | None
    ) -> BlockMask:
        return patterns.draft(q, k, order, keep=self.keep, scale=scale)


@dataclass(frozen=True)
class Nabla(Cubes):
    """`patterns.nabla`."""

    p: float = 0.9
    window: Sequence[int] | None = (11, 3, 3)
    cube: Sequence[int] | None = None
    published: ClassVar[dict[int, tuple[int, ...]]] = {3: (1, 8, 8)}
    video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window is not None:
            _check_axes("window", self.window)
        super().__post_init__()

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from no_choice("p", self.p, "cubes")

    def choose(
        self, q: Tensor, k: Tensor, order: patterns.CubeOrder, scale: float | None
    ) -> BlockMask:
        return patterns.nabla(q, k, order, p=self.p, window=self.window, scale=scale)


def no_choice(name: str, share: float | Sequence[float], what: str) -> Iterator[tuple[str, str]]:
    """Reports a share of 1, of all heads."""
    if share == 1 or (isinstance(share, Sequence) and set(share) == {1}):
        yield name, f"{name} = 1 has no effect: all {what} are kept"


def kept_of(method: M, heads: slice) -> M:
    """A method with the shares `keep` of some heads, if each has its own."""
    keep = getattr(method, "keep", None)
    if not isinstance(keep, Sequence):
        return method
    made = copy.copy(method)
    object.__setattr__(made, "keep", keep[heads])  # they were checked
    return made


def _one(keep: object) -> Tensor:
    """q or k of one token, with as many heads as there are shares."""
    heads = 1
    if isinstance(keep, Sequence) and not isinstance(keep, (str, bytes)):
        heads = len(keep)
        if not heads:
            raise ValueError(f"keep must have a share for each head, got {keep!r}")
    return torch.zeros(1, 1, heads, 8, device="cpu")


def _check_axes(name: str, value: Sequence[int]) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of ints, one for each axis, got {value!r}")
    for n, entry in enumerate(value):
        check_int(f"{name}[{n}]", entry, 1)
