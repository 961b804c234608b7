"""Sequence parallel attention by all-gather: each rank keeps its queries and gathers all keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, overload

import torch
from torch import Tensor

import sparse_fmha
from sparse_fmha import _checks
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.distributed import (
    _additions,
    _attend,
    _collectives,
    _groups,
    _masks,
    _slices,
    _transfers,
    _zigzag,
)


@overload
def all_gather_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    causal: bool = False,
    zigzag: bool = False,
    slices: int = 1,
    group: _groups.Group = None,
    return_lse: Literal[False] = False,
    validate: bool = True,
    **options: Any,
) -> Tensor: ...


@overload
def all_gather_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    causal: bool = False,
    zigzag: bool = False,
    slices: int = 1,
    group: _groups.Group = None,
    return_lse: Literal[True],
    validate: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def all_gather_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    causal: bool = False,
    zigzag: bool = False,
    slices: int = 1,
    group: _groups.Group = None,
    return_lse: bool,
    validate: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...


def all_gather_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    causal: bool = False,
    zigzag: bool = False,
    slices: int = 1,
    group: _groups.Group = None,
    return_lse: bool = False,
    validate: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a sequence sharded over ranks; each rank computes its own queries.

    Keys and values are gathered on every rank, as in the context parallelism of Llama 3 (Dubey et
    al. 2024, arXiv:2407.21783, section 3.3.2). The result equals that of the function on the whole
    sequence. Any number of heads is allowed.

    Args:
        q: `[B, tokens of this rank, Hq, D]`. Rank after rank has its tokens of the sequence, as
            many as it has in q, also none. With `zigzag` each has as many, chunks r and 2 * world -
            1 - r of 2 * world, as made by `zigzag_shard`. For dtypes, strides and D see
            `sparse_fmha.attention`.
        k: `[B, keys of this rank, Hkv, D]`, in the same order.
        v: like k.
        attention: the function to run on parts of the queries and the keys that they may see,
            called as `attention(q, k, v, **options)`, or `attention(q, k, v, mask, **options)` with
            a mask. The default depends on the mask: `attention`, `block_sparse_attention` or
            `stripe_attention` of sparse_fmha.
        mask: a mask of the whole sequence, the same on every rank; its rows are sliced here. The
            parts (the chunks, with `zigzag`) must start at multiples of its block_q. Or a function
            that makes a mask from a part of the queries and the keys, for selection by scores. It
            is called for each part, with the keys that `causal` lets the part see.
        causal: query i sees key j only if `j <= i + (Lkv - Lq)`. A mask has its own flag; a mask
            made by a function must have the same value.
        zigzag: tokens are in the order that balances causal work over the ranks.
        slices: pieces that the key heads are cut into, a divisor of Hkv. The keys of a piece are
            gathered while the piece before it is computed, and their gradients are added up
            likewise. The result is that of one piece bit by bit, but for dense attention on Hopper,
            where fewer heads may take another kernel. A rank holds the gathered keys of two pieces
            instead of all. A mask function is called for each piece, with the heads
            of the piece.
        group: process group or one-dimensional mesh; default all ranks.
        return_lse: also return the log-sum-exp.
        validate: compare the ranks' shapes first, which waits for the device. Without it, different
            shapes are undefined behavior and may deadlock.
        options: passed to the function, such as `scale`. `key_bias` `[B or 1, Hq or 1, keys of this
            rank]` is sharded like k, and gathered; `row_threshold` is that of this rank's queries.
            `sink` `[Hq]` is whole and equal on every rank, and so is its gradient.

    Returns:
        `out`, `[B, tokens of this rank, Hq, D]`, contiguous, in q's order; with `return_lse` also
        `lse`, `[B, tokens of this rank, Hq]` in fp32, as returned by the function. In the backward
        pass each rank computes gradients of all keys and values, which a reduce-scatter adds in
        fp32.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: ranks that do not agree, a mask of another length or with blocks that are split,
            an odd number of tokens with `zigzag`, `causal` together with a mask, a mesh of several
            dimensions, a group without this process, `neighborhood_attention` (use `ulysses`), or
            `return_stats`.
        TypeError: a DTensor, or a mask, group or tensor of the wrong type.
        NotImplementedError: an input with a forward-mode tangent, or `slices` above 1 inside
            torch.compile.
    """
    group, rank, world = _groups.resolve(group)
    _groups.check_options(options, "all_gather_kv")
    if attention is sparse_fmha.neighborhood_attention:
        raise ValueError(
            "all_gather_kv does not support neighborhood_attention, which needs q and k on one "
            "grid; use ulysses"
        )
    for name, flag in (("causal", causal), ("zigzag", zigzag)):
        _checks.check_flag(name, flag)
    if causal and isinstance(mask, _masks.MASKS):
        raise ValueError("causal must not be given with a mask, which has its own causal")
    flags = {"causal": int(causal), "zigzag": int(zigzag)} | _additions.sizes(options)
    q, k, v = cast_where_enabled(q, k, v)
    lengths = _groups.check_inputs(
        q, k, v, mask, flags, group, world, validate, any_lengths=not zigzag
    )
    _additions.check(options, q, k)
    if zigzag:
        _zigzag.check_even("q", q.shape[1])
        _zigzag.check_even("k", k.shape[1])
    options["return_lse"] = return_lse

    of_queries, of_keys = ([row[place] for row in lengths] for place in (0, 1))
    # Key order matters only for a causal mask or for lists, which refer to keys by position.
    ordered = zigzag and (causal or mask is not None)
    parts: Sequence[Tensor] = (q,)
    numbers = [rank]
    if ordered:
        parts, numbers = q.chunk(2, 1), [rank, 2 * world - 1 - rank]
        of_queries = [parts[0].shape[1]] * (2 * world)
    edges = [0, *accumulate(of_queries)]
    spans = [(edges[n], edges[n + 1]) for n in numbers]
    masks = [mask for _ in spans]
    if isinstance(mask, _masks.MASKS):
        _masks.check_starts(mask, of_queries)
        masks = [_masks.query_rows(mask, *span) for span in spans]

    if options.get("key_bias") is not None:
        options["key_bias"] = _additions.gathered(
            options["key_bias"], of_keys, group, "all_gather_kv: key_bias", ordered
        )
    if options.get("sink") is not None:
        options["sink"] = _collectives.shared(options["sink"], group, "all_gather_kv: sink")

    spread = _Spread(parts, spans, masks, sum(of_queries), sum(of_keys), causal)
    _slices.check_slices(slices)
    if k.shape[2] % slices:
        raise ValueError(f"slices must divide the {k.shape[2]} heads of k, got {slices}")

    def in_order(whole: Tensor) -> Tensor:
        if ordered:
            return _zigzag.in_order(whole, world)
        return _collectives.trimmed(whole, of_keys)

    if slices == 1:
        # k and v in one message.
        part = _collectives.padded(torch.cat([k, v], 2).movedim(1, 0), of_keys)
        whole = _collectives.all_gather(part, group, world, "all_gather_kv: keys")
        k, v = in_order(whole).movedim(0, 1).chunk(2, 2)
        results = [spread.attend(k, v, slice(None), 1, attention, options)]
    else:
        heads, heads_kv = q.shape[2] // slices, k.shape[2] // slices
        # [tokens, B, 2, Hkv, D]
        both = _collectives.padded(torch.stack([k, v], 2).movedim(1, 0), of_keys)

        def start(piece: int) -> _transfers.Transfer:
            part = both[:, :, :, piece * heads_kv : (piece + 1) * heads_kv]
            return _transfers.all_gather(part, group, world, f"all_gather_kv: keys of {piece=}")

        results = []
        coming = start(0)
        for piece in range(slices):
            arrived, coming = coming, start(piece + 1) if piece + 1 < slices else coming
            whole = in_order(arrived.wait())
            seen_k, seen_v = whole.movedim(0, 1).unbind(2)
            chosen = slice(piece * heads, (piece + 1) * heads)
            results.append(spread.attend(seen_k, seen_v, chosen, slices, attention, options))
            del whole, seen_k, seen_v, arrived
    outs, lses = (list(x) for x in zip(*results, strict=True))
    out = torch.cat(outs, 2) if slices > 1 else outs[0]
    if not return_lse:
        return out
    return out, torch.cat(lses, 2) if slices > 1 else lses[0]


@dataclass(frozen=True)
class _Spread:
    """What a rank computes: parts of the queries, and the masks of their rows."""

    parts: Sequence[Tensor]
    spans: Sequence[tuple[int, int]]
    masks: Sequence[_masks.MaskOrFunction]
    tokens: int
    tokens_kv: int
    causal: bool

    def attend(
        self,
        k: Tensor,
        v: Tensor,
        heads: slice,
        slices: int,
        attention: Callable[..., Any] | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the function on some heads, given all of their keys; lse only if requested."""
        results: list[Any] = []
        whole = slices * self.parts[0][:, :, heads].shape[2]
        options = _additions.of_heads(options, range(whole)[heads])
        first = 0
        for part, span, rows in zip(self.parts, self.spans, self.masks, strict=True):
            part = part[:, :, heads]
            own, first = slice(first, first + part.shape[1]), first + part.shape[1]
            keys = self.tokens_kv
            if self.causal:
                keys = _masks.visible_keys(span[1], self.tokens, self.tokens_kv)
            elif isinstance(rows, _masks.MASKS):
                keys = rows.kv_len
            seen_k, seen_v = k[:, :keys], v[:, :keys]
            if isinstance(rows, _masks.MASKS):
                if slices > 1:
                    rows = _masks.some_heads(rows, heads, whole)
            elif callable(rows):
                rows = _masks.made(rows, part, seen_k)
                if rows.causal != self.causal:
                    raise ValueError(
                        f"mask(q, k) must return a mask with causal = {self.causal}, by which the "
                        f"keys are gathered, got {rows.causal}"
                    )
            given = _additions.of_part(options, keys, own)
            if rows is None and self.causal:
                given["causal"] = True
            results.append(_attend.attend(attention, part, seen_k, seen_v, rows, **given))
        if not options["return_lse"]:
            return torch.cat(results, 1) if len(results) > 1 else results[0], None
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 1)
