"""Methods that replace self-attention over a token grid and text tokens.

The same rules hold for every method: image queries see image tokens according to the method, and
all text tokens; text queries see everything; no query sees text tokens that are padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.attention import attention, block_sparse_attention, neighborhood_attention
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.merge import merge


@dataclass(frozen=True)
class Layout:
    """The tokens of one self-attention: the grid in row-major order, before or after the text."""

    grid: tuple[int, ...]
    text: int = 0
    text_first: bool = False

    @property
    def image(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.image + self.text

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns views of `[B, tokens, ...]`: image tokens, text tokens."""
        if self.text_first:
            return x[:, self.text :], x[:, : self.text]
        return x[:, : self.image], x[:, self.image :]

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """The inverse of `split`."""
        if not text.shape[1]:
            return image
        return torch.cat([text, image] if self.text_first else [image, text], 1)

    def seen(self, x: Tensor, length: int) -> Tensor:
        """Returns `[B, tokens, ...]` with only the first `length` text tokens."""
        if length == self.text:
            return x
        if not self.text_first:
            return x[:, : self.image + length]  # a view: nothing is copied for right padding
        image, text = self.split(x)
        return self.join(image, text[:, :length])

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"the grid {grid} has {self.image} tokens, with {self.text} of text {self.tokens}"


def by_length(lengths: Sequence[int], compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Calls `compute(length, *tensors)` for the batch, or per entry if text lengths differ."""
    if len(set(lengths)) == 1:
        return compute(lengths[0], *tensors)
    rows = [compute(n, *(x[i : i + 1] for x in tensors)) for i, n in enumerate(lengths)]
    return torch.cat(rows)


@dataclass(frozen=True)
class Dense:
    """Dense attention over all tokens, by `sparse_fmha.attention`."""

    def check(self, layout: Layout) -> None:
        pass

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        yield from ()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        lengths: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        """q, k, v `[B, tokens, H, D]` to out like q; `lengths`: text length of each batch entry."""

        def dense(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, layout.seen(k, n), layout.seen(v, n), scale=scale)

        return by_length(lengths, dense, q, k, v)


class Sparse:
    """Base of sparse methods: text queries are dense; `image` computes the grid's queries."""

    def check(self, layout: Layout) -> None:
        """Raises for an invalid layout, before the model computes anything."""

    def without_effect(self, layout: Layout) -> Iterator[tuple[str, str]]:
        """Options that have no effect in a call that passes `check`, with their messages."""
        yield from ()

    def image(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        lengths: Sequence[int],
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
        lengths: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        """See `Dense`."""
        image = self.image(q, k, v, layout, lengths, scale)
        if not layout.text:
            return image
        text = Dense()(layout.split(q)[1], k, v, layout, lengths, scale)
        return layout.join(image, text)


@dataclass(frozen=True)
class Neighborhood(Sparse):
    """A window of the grid around each query, by `neighborhood_attention`."""

    window: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1

    def axes(self, grid: Sequence[int]) -> tuple[list[int], dict[str, list[int]]]:
        """The grid and options without axes of one token, where a window has no effect."""
        options = {}
        for name in ("window", "stride", "dilation"):
            given = getattr(self, name)
            options[name] = _checks.per_axis(name, given, len(grid))
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
        lengths: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        grid, options = self.axes(layout.grid)
        image_q = layout.split(q)[0]

        def attend(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (k, extra_k), (v, extra_v) = layout.split(k), layout.split(v)
            q, k, v = (x.unflatten(1, grid) for x in (q, k, v))
            out = neighborhood_attention(
                q,
                k,
                v,
                options["window"],
                stride=options["stride"],
                dilation=options["dilation"],
                scale=scale,
                extra_k=extra_k[:, :n] if n else None,
                extra_v=extra_v[:, :n] if n else None,
            )
            return out.flatten(1, -3)

        return by_length(lengths, attend, image_q, k, v)


@dataclass(frozen=True)
class BlockSparse(Sparse):
    """The blocks of the grid's tokens that a mask lists, by `block_sparse_attention`."""

    mask: BlockMask | Callable[[Tensor, Tensor], BlockMask]
    on: dict[torch.device, BlockMask] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # copies of the mask

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
        lengths: Sequence[int],
        scale: float | None,
    ) -> Tensor:
        (q, _), (k, text_k), (v, text_v) = map(layout.split, (q, k, v))
        mask = self.mask
        if isinstance(mask, BlockMask):
            if mask.device != q.device:  # the model moved to another device
                if q.device not in self.on:
                    self.on[q.device] = mask.to(q.device)
                mask = self.on[q.device]
        else:
            mask = mask(q, k)
            if not isinstance(mask, BlockMask):
                raise TypeError(f"mask(q, k) must return a BlockMask, got {type(mask).__name__}")
        if not layout.text:
            return block_sparse_attention(q, k, v, mask, scale=scale)
        out, lse = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)

        # A mask of the grid works for any number of text tokens; merging them is exact.
        def with_text(n: int, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not n:
                return out
            text = attention(q, k[:, :n], v[:, :n], scale=scale, return_lse=True)
            return merge(*zip((out, lse), text, strict=True))[0]

        return by_length(lengths, with_text, out, lse, q, text_k, text_v)


METHODS: dict[str, type[Neighborhood] | type[BlockSparse] | type[Dense]] = {
    "neighborhood": Neighborhood,
    "block_sparse": BlockSparse,
    "dense": Dense,
}


def make(method: str, options: Mapping[str, Any]) -> Dense | Sparse:
    """Makes the method of a name; checks its options as far as possible without a grid."""
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {list(METHODS)}, got {type(method).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    kind = METHODS[method]
    allowed = [option.name for option in fields(kind) if option.init]
    for name in options:
        if name not in allowed:
            raise TypeError(f"options of method {method!r} must be among {allowed}, got {name!r}")
    if kind is Neighborhood:
        if "window" not in options:
            raise TypeError(
                "window must be given for method 'neighborhood', in tokens per axis of the grid"
            )
        for name, value in options.items():
            axes = len(value) if isinstance(value, Sequence) else 1
            _checks.per_axis(name, value, axes)
    if kind is BlockSparse:
        mask = options.get("mask")
        if not isinstance(mask, BlockMask) and not callable(mask):
            raise TypeError(
                "mask must be a BlockMask or a function (q, k) -> BlockMask, got "
                f"{type(mask).__name__}"
            )
    return kind(**options)
