"""Sequence parallel attention by all-to-all: tokens are sharded outside, heads inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.distributed import (
    _additions,
    _attend,
    _collectives,
    _groups,
    _head_order,
    _masks,
    _slices,
)
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
    head_order: Sequence[int] | None = None,
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
    head_order: Sequence[int] | None = None,
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
    head_order: Sequence[int] | None = None,
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
    head_order: Sequence[int] | None = None,
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
            that of one piece bit by bit, but for dense attention on Hopper, where fewer heads may
            take another kernel. It divides Hq / world, and a piece has whole groups of
            query heads that share a key head, or a part of one group. A mask function is called
            for each piece, with the heads of the piece.
        head_order: all query heads, those that rank 0 computes first, to balance heads that differ
            in work: `balanced_heads(head_weights(mask), Hkv, world)`. Heads of one key head stay
            together, as that function has them. Default: their own order. Results are in q's order
            in any case; lists for the heads of a rank are in this order.
        return_lse: also return the log-sum-exp.
        validate: compare the ranks' shapes first, which waits for the device. Without it, different
            shapes, also other numbers of tokens, are undefined behavior and may deadlock.
        options: passed to the function, such as `causal`, `scale` or `window`. `extra_k` and
            `extra_v` `[B, N, Hkv, D]` and `sink` `[Hq]` are whole and equal on every rank; so are
            their gradients. `key_bias` `[B or 1, Hq or 1, keys of this rank]` is sharded like k and
            `row_threshold` like q; both are gathered.

    Returns:
        `out`, `[B, tokens of this rank, Hq, D]`, contiguous; with `return_lse` also `lse`,
        `[B, tokens of this rank, Hq]` in fp32, as returned by the function. The backward pass sends
        gradients back along the same paths.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: heads that do not divide, a `head_order` that is none, ranks that do not agree,
            a mask or a grid of another length, a mesh of several dimensions, a group without this
            process, or `return_stats`.
        TypeError: a DTensor, or a mask, group or tensor of the wrong type.
        NotImplementedError: an input with a forward-mode tangent, or `slices` above 1 together
            with `extra_k`, or inside torch.compile.
    """
    group, rank, world = _groups.resolve(group)
    _groups.check_options(options, "ulysses")
    q, k, v = cast_where_enabled(q, k, v)
    flags = _additions.sizes(options)
    flags["head_order"] = hash(tuple(head_order)) if head_order is not None and validate else 0
    lengths = _groups.check_inputs(q, k, v, mask, flags, group, world, validate, any_lengths=True)
    _additions.check(options, q, k)
    order = _head_order.checked(head_order, q.shape[2], k.shape[2], world)
    own, own_keys = order.of_rank(rank, world)
    if isinstance(mask, _masks.MASKS):
        mask = _masks.heads(mask, own, q.shape[2])
    whole = sum(tokens for tokens, _ in lengths)
    if grid is not None and math.prod(grid) != whole:
        raise ValueError(
            f"grid must have the {whole} tokens that the ranks have together, got "
            f"{math.prod(grid)} in {list(grid)}"
        )
    for name in ("extra_k", "extra_v"):
        if options.get(name) is not None:
            extra = _collectives.shared(options[name], group, f"ulysses: {name}")
            options[name] = _head_order.taken(extra, own_keys, 2)

    _slices.check_slices(slices)
    if slices > 1 and options.get("extra_k") is not None:
        raise NotImplementedError("slices must be 1 with extra_k, got more")
    q = _head_order.taken(q, order.queries, 2)
    k, v = (_head_order.taken(x, order.keys, 2) for x in (k, v))
    parts = [tokens for tokens, _ in lengths], [keys for _, keys in lengths]
    for name, part in ((_additions.KEYS, parts[1]), (_additions.ROWS, parts[0])):
        if options.get(name) is not None:
            options[name] = _additions.gathered(options[name], part, group, f"ulysses: {name}")
    if options.get(_additions.SINK) is not None:
        options[_additions.SINK] = _collectives.shared(options["sink"], group, "ulysses: sink")

    def call(q: Tensor, k: Tensor, v: Tensor, number: int) -> Sequence[Tensor]:
        lists, size = mask, q.shape[2]
        some = slice(number * size, (number + 1) * size)
        added = _additions.of_heads(options, own[some])
        if isinstance(lists, _masks.MASKS):
            lists = _masks.some_heads(lists, some, size * slices)
        elif callable(lists):
            lists = _masks.made(lists, q, k)
        if grid is not None:
            q, k, v = (x.unflatten(1, tuple(grid)) for x in (q, k, v))
        result = _attend.attend(attention, q, k, v, lists, return_lse=return_lse, **added)
        outs: Sequence[Tensor] = result if return_lse else (result,)
        return outs if grid is None else [x.flatten(1, len(grid)) for x in outs]

    exchange = HeadExchange(group, rank, world, under_compute=slices > 1)
    together = parts[0] == parts[1]
    uneven = _uneven(parts[0]), _uneven(parts[1])
    outs = _slices.ulysses(q, k, v, call, exchange, uneven, together, slices)
    out, *lse = (_head_order.taken(x, order.back, 2) for x in outs)
    return (out, lse[0]) if return_lse else out


def _uneven(lengths: Sequence[int]) -> Lengths:
    return None if all(length == lengths[0] for length in lengths) else tuple(lengths)
