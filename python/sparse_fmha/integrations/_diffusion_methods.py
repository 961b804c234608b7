"""Methods that replace self-attention over a token grid and the other tokens of a model.

The same rules hold for every method: image queries see image tokens according to the method, and
all other tokens (text, references); the others see everything; none sees tokens that are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import head_parts
from sparse_fmha.attention import attention, neighborhood_attention
from sparse_fmha.integrations._diffusion_beside import beside, by_runs, under_mask
from sparse_fmha.integrations._diffusion_layout import Layout, Runs, Seen
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.merge import is_plain

WHOLE = -1


@dataclass(frozen=True)
class Dense:
    """Dense attention over all tokens, by `sparse_fmha.attention`."""

    in_graph: ClassVar[bool] = True  # takes `seen` as a tensor

    def check(self, layout: Layout) -> None:
        pass

    def prepared(self, layout: Layout, device: torch.device) -> Dense:
        """See `Sparse`."""
        return self

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from ()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        """q, k, v `[B, tokens, H, D]` to out like q, which has no cached tokens.

        Args:
            seen: what each batch entry sees of the tokens that are not on the grid.
        """

        if isinstance(seen, Tensor):
            (k, plain_k), (v, plain_v) = layout.split(k), layout.split(v)
            out, lse = attention(q, k, v, scale=scale, return_lse=True)
            return beside(out, lse, q, plain_k, plain_v, layout, seen, scale)

        def dense(runs: Runs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, layout.seen(k, runs), layout.seen(v, runs), scale=scale)

        return by_runs(seen, dense, q, k, v)


class Sparse:
    """Base of sparse methods: `image` computes the grid's queries; the others are dense.

    Classes are dataclasses; their fields are the options, which they check when they are made.
    """

    video: ClassVar[bool] = False  # only for grids of frames, height and width
    in_graph: ClassVar[bool] = True

    def check(self, layout: Layout) -> None:
        """Raises for an invalid layout, before the model computes anything."""

    def prepared(self, layout: Layout, device: torch.device) -> Sparse:
        """The method with what it makes once for a grid, which compiled graphs then read."""
        return self

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        """Options that have no effect in a call that passes `check`, with their messages."""
        yield from ()

    def in_parts(self, layout: Layout) -> bool:
        """Whether large calls are computed for some heads at a time, because what is made beside
        the output is as large as that or larger."""
        return False

    def of_heads(self, heads: slice) -> Sparse:
        """The method for some of the heads of q."""
        return self

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        """The output rows of the grid's tokens."""
        raise NotImplementedError

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        seen: Seen,
        scale: float | None,
    ) -> Tensor:
        """See `Dense`."""
        own = layout.queries
        parts = head_parts(q, k) if self.in_parts(layout) and is_plain(q, k, v) else []
        if len(parts) < 2:
            image = self.image(q, k, v, layout, seen, scale)
            if not own.plain:
                return image
            return own.join(image, Dense()(own.split(q)[1], k, v, layout, seen, scale))
        out: Tensor | None = None
        for heads, heads_kv in parts:
            some = q[:, :, heads], k[:, :, heads_kv], v[:, :, heads_kv]
            image = self.of_heads(heads).image(*some, layout, seen, scale)
            if out is None:
                out = image.new_empty(q.shape)
            own.image_of(out)[:, :, heads] = image
            del image
        assert out is not None
        if own.plain:
            own.write_plain(out, Dense()(own.split(q)[1], k, v, layout, seen, scale))
        return out


@dataclass(frozen=True)
class Neighborhood(Sparse):
    """A window of the grid around each query, by `neighborhood_attention`; -1 is a whole axis."""

    window: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            _checks.per_axis(name, value, len(value) if isinstance(value, Sequence) else 1)

    def axes(self, grid: Sequence[int]) -> tuple[list[int], dict[str, list[int]]]:
        """The grid and options without axes of one token, where a window has no effect."""
        options = {}
        for name in ("window", "stride", "dilation"):
            given = getattr(self, name)
            options[name] = _checks.per_axis(name, given, len(grid))
            if name == "window":
                sizes = zip(options[name], grid, strict=True)
                options[name] = [n if size == WHOLE else size for size, n in sizes]
            for axis, length in enumerate(grid):
                if length == 1 and isinstance(given, Sequence) and options[name][axis] != 1:
                    raise ValueError(
                        f"{name}[{axis}] must be 1 on the grid {tuple(grid)}, which has one token "
                        f"on that axis, got {given!r}"
                    )
        kept = [axis for axis, length in enumerate(grid) if length > 1]
        return [grid[a] for a in kept], {n: [o[a] for a in kept] for n, o in options.items()}

    def check(self, layout: Layout) -> None:
        grid, options = self.axes(layout.grid)
        if not grid:
            raise ValueError(
                f"grid must have more than one token for neighborhoods, got {layout.grid}"
            )
        try:
            _checks.check_neighborhood(grid, **options, causal=[False] * len(grid))
        except ValueError as error:
            raise ValueError(f"{error} on the grid {layout.grid} of tokens") from None

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        grid, options = self.axes(layout.grid)
        covered = [w == n for w, n in zip(options["window"], grid, strict=True)]
        if all(covered):
            yield (
                "window",
                f"window = {self.window!r} has no effect: it covers the whole grid {layout.grid}",
            )
        elif any(c and s > 1 for c, s in zip(covered, options["stride"], strict=True)):
            yield (
                "stride",
                f"stride = {self.stride!r} has no effect where window = {self.window!r} covers an "
                f"axis of the grid {layout.grid}",
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
        grid, options = self.axes(layout.grid)
        image_q = layout.queries.split(q)[0]

        def attend(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            extra: tuple[Tensor | None, Tensor | None] = (None, None),
        ) -> tuple[Tensor, Tensor]:
            q, k, v = (x.unflatten(1, grid) for x in (q, k, v))
            out, lse = neighborhood_attention(
                q,
                k,
                v,
                options["window"],
                stride=options["stride"],
                dilation=options["dilation"],
                scale=scale,
                extra_k=extra[0],
                extra_v=extra[1],
                return_lse=True,
            )
            return out.flatten(1, -3), lse.flatten(1, -2)

        if isinstance(seen, Tensor):
            (k, plain_k), (v, plain_v) = layout.split(k), layout.split(v)
            out, lse = attend(image_q, k, v)
            return beside(out, lse, image_q, plain_k, plain_v, layout, seen, scale)

        def with_runs(runs: Runs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (k, extra_k), (v, extra_v) = layout.split(k), layout.split(v)
            if not runs:
                return attend(q, k, v)[0]
            extra = layout.visible(extra_k, runs), layout.visible(extra_v, runs)
            return attend(q, k, v, extra)[0]

        return by_runs(seen, with_runs, image_q, k, v)


@dataclass(frozen=True)
class BlockSparse(Sparse):
    """The blocks of the grid's tokens that a mask lists, by `block_sparse_attention`."""

    mask: BlockMask | Callable[[Tensor, Tensor], BlockMask]
    on: dict[torch.device, BlockMask] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # copies of the mask

    def __post_init__(self) -> None:
        if not isinstance(self.mask, BlockMask) and not callable(self.mask):
            raise TypeError(
                "mask must be a BlockMask or a function (q, k) -> BlockMask, got "
                f"{type(self.mask).__name__}"
            )

    def check(self, layout: Layout) -> None:
        if isinstance(self.mask, BlockMask):
            for name, length in (("queries", self.mask.q_len), ("keys", self.mask.kv_len)):
                if length != layout.image:
                    raise ValueError(
                        f"mask must be for the tokens of the grid: {layout}, got one for {length} "
                        f"{name}"
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
        return under_mask(self.of, q, k, v, layout, seen, scale)

    def of(self, q: Tensor, k: Tensor) -> BlockMask:
        mask = self.mask
        if isinstance(mask, BlockMask):
            if mask.device != q.device:  # the model moved to another device
                if q.device not in self.on:
                    self.on[q.device] = mask.to(q.device)
                mask = self.on[q.device]
            return mask
        mask = mask(q, k)
        if not isinstance(mask, BlockMask):
            raise TypeError(f"mask(q, k) must return a BlockMask, got {type(mask).__name__}")
        return mask
