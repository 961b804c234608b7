"""Sequence parallel attention by all-to-all: tokens are sharded outside, heads inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.distributed import _attend, _collectives, _groups, _masks, _slices
from sparse_fmha.distributed._head_exchange import HeadExchange, Lengths


@overload
def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: Literal[False] = False,
    validate: bool = True,
    **options: Any,
) -> Tensor: ...


@overload
def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: Literal[True],
    validate: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: bool,
    validate: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: bool = False,
    validate: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a sequence sharded over ranks; each rank computes some of the heads.

    An all-to-all gives every rank the whole sequence of Hq / world heads, the function runs on
    them, and a second all-to-all shards its result like q (DeepSpeed-Ulysses, Jacobs et al. 2023,
    arXiv:2309.14509). The result equals that of the function on the whole sequence.

    Args:
        q: `[B, tokens of this rank, Hq, D]`. Rank after rank has its tokens of the sequence, as
            many as it has in q, also none. Hq is a multiple of world. For dtypes, strides and D see
            `sparse_fmha.attention`.
        k: `[B, keys of this rank, Hkv, D]`, likewise. Hkv is a multiple or a divisor of world. If
            it is a divisor, world / Hkv ranks share a key head, which is sent to each of them.
        v: like k.
        attention: the function to run, called as `attention(q, k, v, **options)`, or
            `attention(q, k, v, mask, **options)` with a mask. The default depends on the mask:
            `attention`, `block_sparse_attention` or `stripe_attention` of sparse_fmha.
        mask: a mask of the whole sequence on every rank, with lists for 1 head, all Hq heads, or
            the Hq / world heads of the rank. Or a function that makes a mask of this rank's heads
            from q and k of the whole sequence, `[B, Lq, Hq / world, D]` and `[B, Lkv, heads of this
            rank, D]`, for selection by scores.
        group: process group or one-dimensional mesh; default all ranks.
        grid: `*L` of `neighborhood_attention`; its product is Lq. Default one axis.
        slices: pieces that the rank's query heads are cut into. A piece is sent while the one
            before it is computed, in both passes, and its result returns meanwhile. The result is
            that of one piece bit by bit. It divides Hq / world, and a piece has whole groups of
            query heads that share a key head, or a part of one group. A mask function is called
            for each piece, with the heads of the piece.
        return_lse: also return the log-sum-exp.
        validate: compare the ranks' shapes first, which waits for the device. Without it, different
            shapes, also other numbers of tokens, are undefined behavior and may deadlock.
        options: passed to the function, such as `causal`, `scale` or `window`. `extra_k` and
            `extra_v` `[B, N, Hkv, D]` are whole and equal on every rank; so are their gradients.

    Returns:
        `out`, `[B, tokens of this rank, Hq, D]`, contiguous; with `return_lse` also `lse`,
        `[B, tokens of this rank, Hq]` in fp32, as returned by the function. The backward pass sends
        gradients back along the same paths.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: heads that do not divide, ranks that do not agree, a mask or a grid of another
            length, a mesh of several dimensions, a group without this process, or `return_stats`.
        TypeError: a DTensor, or a mask, group or tensor of the wrong type.
        NotImplementedError: an input with a forward-mode tangent, or `slices` above 1 together
            with `extra_k`, or inside torch.compile.
    """
    group, rank, world = _groups.resolve(group)
    _groups.check_options(options, "ulysses")
    q, k, v = cast_where_enabled(q, k, v)
    lengths = _groups.check_inputs(q, k, v, mask, {}, group, world, validate, any_lengths=True)
    copies = key_head_copies(q.shape[2], k.shape[2], world)
    heads_kv = k.shape[2] * copies // world
    if isinstance(mask, _masks.MASKS):
        mask = _masks.heads(mask, rank, world, q.shape[2])
    whole = sum(tokens for tokens, _ in lengths)
    if grid is not None and math.prod(grid) != whole:
        raise ValueError(
            f"grid must have the {whole} tokens that the ranks have together, got "
            f"{math.prod(grid)} in {list(grid)}"
        )
    first = rank * k.shape[2] // world
    for name in ("extra_k", "extra_v"):
        if options.get(name) is not None:
            extra = _collectives.shared(options[name], group)
            options[name] = extra[:, :, first : first + heads_kv]

    _slices.check_slices(slices)
    if slices > 1 and options.get("extra_k") is not None:
        raise NotImplementedError("slices must be 1 with extra_k, got more")
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 2) for x in (k, v))

    def call(q: Tensor, k: Tensor, v: Tensor, number: int) -> Sequence[Tensor]:
        lists = mask
        if isinstance(lists, _masks.MASKS):
            size = q.shape[2]
            some = slice(number * size, (number + 1) * size)
            lists = _masks.some_heads(lists, some, size * slices)
        elif callable(lists):
            lists = _masks.made(lists, q, k)
        if grid is not None:
            q, k, v = (x.unflatten(1, tuple(grid)) for x in (q, k, v))
        result = _attend.attend(attention, q, k, v, lists, return_lse=return_lse, **options)
        outs: Sequence[Tensor] = result if return_lse else (result,)
        return outs if grid is None else [x.flatten(1, len(grid)) for x in outs]

    exchange = HeadExchange(group, rank, world, under_compute=slices > 1)
    parts = _lengths(tokens for tokens, _ in lengths), _lengths(keys for _, keys in lengths)
    together = all(tokens == keys for tokens, keys in lengths)
    outs = _slices.ulysses(q, k, v, call, exchange, parts, together, slices)
    return (outs[0], outs[1]) if return_lse else outs[0]


def _lengths(found: Iterable[int]) -> Lengths:
    each = tuple(found)
    return None if all(length == each[0] for length in each) else each


def key_head_copies(heads: int, heads_kv: int, world: int) -> int:
    """How often each key head is sent, so that every rank has the key heads of its query heads."""
    if heads % world:
        raise ValueError(
            f"heads of q must be a multiple of the {world} ranks, which ulysses shards them over, "
            f"got {heads}; all_gather_kv takes any number"
        )
    if heads_kv % world == 0:
        return 1
    if world % heads_kv:
        raise ValueError(
            f"heads of k and v must be a multiple or a divisor of the {world} ranks, got "
            f"{heads_kv}; all_gather_kv takes any number"
        )
    return world // heads_kv
