"""Attention of some queries only: their rows are gathered, and the outputs scattered."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import check_flag, check_integers, plain_ints
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention.block_sparse import block_sparse_attention
from sparse_fmha.attention.dense import attention
from sparse_fmha.attention.row_copies import put_indexed, row_index, take_indexed
from sparse_fmha.attention.stripe import stripe_attention
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.merge import merge_into_first

BLOCK = 128  # the tile of kernels over lists
# Causality of gathered rows is a threshold of biases: -UNIT * position. They are exact up to
# MOST_KEYS, and change no score by more than 2^-36.
UNIT = 2.0**-60
MOST_KEYS = 1 << 24
ABSENT = -(1 << 40)  # a row that sees no key, however many more keys than queries there are


@overload
def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rows: Tensor,
    counts: Tensor | None = None,
    *,
    mask: BlockMask | StripeMask | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rows: Tensor,
    counts: Tensor | None = None,
    *,
    mask: BlockMask | StripeMask | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rows: Tensor,
    counts: Tensor | None = None,
    *,
    mask: BlockMask | StripeMask | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


@plain_ints
def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_rows: Tensor,
    counts: Tensor | None = None,
    *,
    mask: BlockMask | StripeMask | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the queries that are listed for each head; the others get 0.

    Rows may be in any order, so a permutation of all queries is a list, too: a mask is then over
    the new order, and results are in the old one. Costs copies of the listed rows of q and of their
    outputs besides the attention of n queries.

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`; dtypes and strides as in `attention`.
        query_rows: int32 or int64 `[B|1, Hq|1, n]`, each query at most once, which is not checked.
            Entries that are no query, such as -1, count as absent.
        counts: int32 or int64 `[B|1, Hq|1]`: entries from there on are absent. Default: n.
        mask: which keys the listed queries see: of n queries, query i being the one that
            `query_rows` has at i, and Lkv keys. Its own `causal` must be False. Default: all keys.
        causal: the query at position p sees key j only if `j <= p + Lkv - Lq`, wherever it is
            listed; also under a mask. On CUDA it runs where `row_threshold` does. Lkv is at most
            2^24.
        scale: of q.k; default `D**-0.5`.
        return_lse: also return the log-sum-exp.

    Returns:
        `[B, Lq, Hq, Dv]` in q's dtype; with `return_lse` also `[B, Lq, Hq]` fp32, natural log.
        Queries that are not listed, or see no key, have out 0, lse -inf and gradients 0. Does not
        wait for the device.

    Raises:
        ValueError, TypeError, RuntimeError: as in `block_sparse_attention`; `query_rows`, counts or
            the mask have another shape, dtype or device.
    """
    _checks.check_qkv(q, k, v, axes=(1,))
    check_flag("causal", causal)
    check_flag("return_lse", return_lse)
    rows = _checked_rows(query_rows, counts, q)
    _check_mask(mask)
    if causal and k.shape[1] > MOST_KEYS:
        raise ValueError(f"k must have at most {MOST_KEYS} tokens with causal, got {k.shape[1]}")
    q, k, v = cast_where_enabled(q, k, v)
    batch, q_len, heads, _ = q.shape
    if causal and mask is None:
        rows = rows.sort(-1).values  # rows of a block end near each other, absent ones come first
    every = rows.expand(batch, heads, -1)
    read, write = row_index(every, every < 0, q_len)
    own = take_indexed(q, read)
    bias = limit = first = None
    if causal:
        ends = (rows + (1 + k.shape[1] - q_len)).clamp(0, k.shape[1])
        bias, limit = _positions(ends, k.shape[1])
        if mask is None:
            far, mask = _up_to_own(ends, k.shape[1])
            first = block_sparse_attention(own, k, v, far, scale=scale, return_lse=True)
    if mask is None:
        out, lse = attention(own, k, v, scale=scale, return_lse=True)
    elif isinstance(mask, BlockMask):
        out, lse = block_sparse_attention(
            own, k, v, mask, scale=scale, key_bias=bias, row_threshold=limit, return_lse=True
        )
    else:
        out, lse = stripe_attention(
            own, k, v, mask, scale=scale, key_bias=bias, row_threshold=limit, return_lse=True
        )
    if first is not None:
        out, lse = merge_into_first((out, first[0]), (lse, first[1]))
    out = put_indexed(out, write, q_len, 0)
    if not return_lse:
        return out
    return out, put_indexed(lse[..., None], write, q_len, -torch.inf)[..., 0]


def _positions(ends: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """Returns a bias and thresholds by which a row sees the keys before its end."""
    key = torch.arange(kv_len, dtype=torch.float32, device=ends.device) * -UNIT
    # Key 0 has the bias -0.0, so an end of 0 has a threshold that hides all.
    return key.expand(1, 1, -1), (1 - ends).float() * UNIT


def _up_to_own(ends: Tensor, kv_len: int) -> tuple[BlockMask, BlockMask]:
    """Returns two masks of rows that see the keys before their ends, which ascend.

    Key blocks that all rows of a block see need no thresholds, so they take the kernels without a
    bias, which are faster. The others, from a block's first end to its last, do.
    """
    n = ends.shape[2]
    lasts = ends[..., BLOCK - 1 :: BLOCK]
    if n % BLOCK:
        lasts = torch.cat([lasts, ends[..., -1:]], -1)
    whole = (ends[..., ::BLOCK] // BLOCK).int()
    cut = ((lasts + (BLOCK - 1)) // BLOCK).int() - whole
    block = torch.arange(ceil_div(kv_len, BLOCK), dtype=torch.int32, device=ends.device)
    sizes = (n, kv_len, BLOCK, BLOCK)
    far = BlockMask(whole, block.expand(*whole.shape, -1), *sizes)
    return far, BlockMask(cut, whole[..., None] + block, *sizes)


def _checked_rows(query_rows: Tensor, counts: Tensor | None, q: Tensor) -> Tensor:
    """Returns the rows, int64 `[B|1, Hq|1, n]`, `ABSENT` for those that are."""
    batch, q_len, heads, _ = q.shape
    shapes = {"query_rows": (query_rows, 3), "counts": (counts, 2)}
    for name, (tensor, axes) in shapes.items():
        if tensor is None:
            continue
        check_integers(name, tensor)
        given = tensor.shape
        if len(given) != axes or given[0] not in (1, batch) or given[1] not in (1, heads):
            tail = ", n" if axes == 3 else ""
            raise ValueError(
                f"{name} must have shape [{batch} or 1, {heads} or 1{tail}], got {list(given)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
    rows = query_rows.long()
    absent = (rows < 0) | (rows >= q_len)
    if counts is not None:
        slot = torch.arange(rows.shape[2], device=rows.device)
        absent = absent | (slot >= counts[..., None])
    return torch.where(absent, rows.new_full((), ABSENT), rows)


def _check_mask(mask: BlockMask | StripeMask | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, BlockMask | StripeMask):
        raise TypeError(f"mask must be a BlockMask or a StripeMask, got {type(mask).__name__}")
    if mask.causal:
        raise ValueError(
            "mask.causal must be False, as it counts listed queries; use the argument causal"
        )
