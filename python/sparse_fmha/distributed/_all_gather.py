"""Sequence parallel attention by all-gather: each rank keeps its queries and gathers all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

import sparse_fmha
from sparse_fmha import _checks
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.distributed import _groups, _masks, _ulysses, _zigzag


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
        q: `[B, Lq / world, Hq, D]`, the same number of tokens on each rank. Rank r has the Lq /
            world tokens from r * Lq / world; with `zigzag` it has chunks r and 2 * world - 1 - r of
            2 * world, as made by `zigzag_shard`. For dtypes, strides and D see
            `sparse_fmha.attention`.
        k: `[B, Lkv / world, Hkv, D]`, in the same order.
        v: like k.
        attention: the function to run on parts of the queries and the keys that they may see,
            called as `attention(q, k, v, **options)`, or `attention(q, k, v, mask, **options)` with
            a mask. The default depends on the mask: `attention`, `block_sparse_attention` or
            `stripe_attention` of sparse_fmha.
        mask: a mask of the whole sequence, the same on every rank; its rows are sliced here. The
            parts (the chunks, with `zigzag`) must be multiples of its block_q. Or a function that
            makes a mask from a part of the queries and the keys, for selection by scores. It is
            called for each part, with the keys that `causal` lets the part see.
        causal: query i sees key j only if `j <= i + (Lkv - Lq)`. A mask has its own flag; a mask
            made by a function must have the same value.
        zigzag: tokens are in the order that balances causal work over the ranks.
        group: process group or one-dimensional mesh; default all ranks.
        return_lse: also return the log-sum-exp.
        validate: compare the ranks' shapes first, which waits for the device. Without it, different
            shapes are undefined behavior and may deadlock.
        options: passed to the function, such as `scale`.

    Returns:
        `out`, `[B, Lq / world, Hq, D]`, contiguous, in q's order; with `return_lse` also `lse`,
        `[B, Lq / world, Hq]` in fp32, as returned by the function. In the backward pass each rank
        computes gradients of all keys and values, which a reduce-scatter adds in fp32.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: ranks that do not agree, a mask of another length or with blocks that are split,
            an odd number of tokens with `zigzag`, `causal` together with a mask, a mesh of several
            dimensions, a group without this process, `neighborhood_attention` (use `ulysses`), or
            `return_stats`.
        TypeError: a DTensor, or a mask, group or tensor of the wrong type.
        NotImplementedError: an input with a forward-mode tangent.
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
    flags = {"causal": int(causal), "zigzag": int(zigzag)}
    q, k, v = cast_where_enabled(q, k, v)
    _groups.check_inputs(q, k, v, mask, flags, group, world, validate)
    if zigzag:
        _zigzag.check_even("q", q.shape[1])
        _zigzag.check_even("k", k.shape[1])
    options["return_lse"] = return_lse

    tokens, tokens_kv = q.shape[1] * world, k.shape[1] * world
    # Key order matters only for a causal mask or for lists, which refer to keys by position.
    ordered = zigzag and (causal or mask is not None)
    parts = q.chunk(2, 1) if ordered else (q,)
    length = parts[0].shape[1]
    numbers = (rank, 2 * world - 1 - rank) if ordered else (rank,)
    spans = [(n * length, (n + 1) * length) for n in numbers]
    masks = [mask for _ in spans]
    if isinstance(mask, _masks.MASKS):
        _masks.check_rows(mask, length)
        masks = [_masks.query_rows(mask, *span) for span in spans]

    # k and v in one message.
    k, v = _zigzag.gather(torch.cat([k, v], 2), 1, group, world, ordered).chunk(2, 2)
    results: list[Any] = []
    for part, span, rows in zip(parts, spans, masks, strict=True):
        keys = tokens_kv
        if causal:
            keys = _masks.visible_keys(span[1], tokens, tokens_kv)
        elif isinstance(rows, _masks.MASKS):
            keys = rows.kv_len
        seen_k, seen_v = k[:, :keys], v[:, :keys]
        if callable(rows):
            rows = _masks.made(rows, part, seen_k)
            if rows.causal != causal:
                raise ValueError(
                    f"mask(q, k) must return a mask with causal = {causal}, by which the keys are "
                    f"gathered, got {rows.causal}"
                )
        if rows is None and causal:
            options["causal"] = True
        results.append(_ulysses.attend(attention, part, seen_k, seen_v, rows, **options))
    if not return_lse:
        outs: list[Tensor] = results
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    pairs: list[tuple[Tensor, Tensor]] = results
    return torch.cat([out for out, _ in pairs], 1), torch.cat([lse for _, lse in pairs], 1)
