"""Attention of some queries only: their rows are gathered, and the outputs scattered."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha import _checks
from sparse_fmha._checks import check_flag, check_integers, plain_ints
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention.block_sparse import block_sparse_attention
from sparse_fmha.attention.dense import attention
from sparse_fmha.attention.stripe import stripe_attention
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask

BLOCK_Q, BLOCK_KV = 64, 128
# Causality of gathered rows is a threshold of biases: -UNIT * position. They are exact up to
# MOST_KEYS, and change no score by more than 2^-36.
UNIT = 2.0**-60
MOST_KEYS = 1 << 24


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
    own = take_rows(q, rows.clamp(min=0)) if q.shape[1] else q
    bias, limit = _positions(rows, q.shape[1], k.shape[1]) if causal else (None, None)
    if mask is None and causal:
        mask = _up_to_own(rows, q.shape[1], k.shape[1])
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
    out = put_rows(out, rows, q.shape[1], 0)
    if not return_lse:
        return out
    return out, put_rows(lse[..., None], rows, q.shape[1], -torch.inf)[..., 0]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Returns rows of each head, `[B, n, H, D]`: whole ones, where `gather` takes single elements.

    Args:
        x: `[B, L, Hx, D]`, L at least 1. rows: int64 `[B, H, n]`, from 0 to L - 1; H is a multiple
            of Hx, whose heads serve as many of them each.
    """
    return _select(x, _numbers(rows, x.shape[1], x.shape[2]).transpose(1, 2))


def take_rows_by_head(x: Tensor, rows: Tensor) -> Tensor:
    """`take_rows`, but `[B, H, n, D]`."""
    return _select(x, _numbers(rows, x.shape[1], x.shape[2]))


def put_rows(x: Tensor, rows: Tensor, length: int, empty: float) -> Tensor:
    """The inverse of `take_rows`: `[B, length, H, D]` with x `[B, n, H, D]` at rows, else `empty`.

    Args:
        rows: int64 `[B, H, n]`; those that are not from 0 to length - 1 are left out.
    """
    batch, _, heads, dim = x.shape
    return _put(x, rows, x.new_full((batch * length * heads + 1, dim), empty))


def replace_rows(out: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Returns `out` `[B, L, H, D]` with x `[B, n, H, D]` at rows, as in `put_rows`."""
    flat = out.reshape(-1, out.shape[3])
    return _put(x, rows, torch.cat([flat, flat.new_zeros(1, out.shape[3])]))


def _numbers(rows: Tensor, length: int, heads: int) -> Tensor:
    """Returns which row of `[B * length * heads, D]` each entry of rows, `[B, H, n]`, is."""
    batch, users, _ = rows.shape
    entry = torch.arange(batch, device=rows.device)[:, None, None] * length
    head = torch.arange(users, device=rows.device) // max(1, users // max(1, heads))
    return (entry + rows) * heads + head[:, None]


def _select(x: Tensor, numbers: Tensor) -> Tensor:
    taken = x.reshape(-1, x.shape[3]).index_select(0, numbers.flatten())
    return taken.view(*numbers.shape, x.shape[3])


def _put(x: Tensor, rows: Tensor, flat: Tensor) -> Tensor:
    """Writes rows to `flat`, `[B * L * H + 1, D]`; the last one takes those that are absent."""
    batch, _, heads, dim = x.shape
    last = flat.shape[0] - 1
    length = last // max(1, batch * heads)
    index = _numbers(rows, length, heads).masked_fill((rows < 0) | (rows >= length), last)
    flat.index_copy_(0, index.transpose(1, 2).flatten(), x.reshape(-1, dim))
    return flat[:-1].view(batch, length, heads, dim)


def _positions(rows: Tensor, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    """Returns a bias and thresholds by which row i sees keys up to `rows[i] + kv_len - q_len`."""
    key = torch.arange(kv_len, dtype=torch.float32, device=rows.device) * -UNIT
    last = (rows + (kv_len - q_len)).float() * -UNIT
    # -0.0 is the bias of key 0, so what is before it has a threshold above 0.
    limit = last.masked_fill((rows < 0) | (last > 0), torch.inf)
    return key.expand(1, 1, -1), limit


def _up_to_own(rows: Tensor, q_len: int, kv_len: int) -> BlockMask:
    """Returns the mask of the blocks up to the last key that any row of a block may see."""
    n, columns = rows.shape[2], ceil_div(kv_len, BLOCK_KV)
    blocks = ceil_div(n, BLOCK_Q)
    ends = torch.where(rows < 0, 0, rows + 1 + kv_len - q_len).clamp(0, kv_len)
    ends = pad(ends, (0, blocks * BLOCK_Q - n)).unflatten(-1, (blocks, BLOCK_Q)).amax(-1)
    counts = ceil_div(ends, BLOCK_KV).int()
    indices = torch.arange(columns, dtype=torch.int32, device=rows.device)
    return BlockMask(
        counts, indices.expand(*counts.shape, -1), n, kv_len, BLOCK_Q, BLOCK_KV, causal=False
    )


def _checked_rows(query_rows: Tensor, counts: Tensor | None, q: Tensor) -> Tensor:
    """Returns the rows, int64 `[B, Hq, n]`, -1 for those that are absent."""
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
    return torch.where(absent, -1, rows).expand(batch, heads, -1)


def _check_mask(mask: BlockMask | StripeMask | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, BlockMask | StripeMask):
        raise TypeError(f"mask must be a BlockMask or a StripeMask, got {type(mask).__name__}")
    if mask.causal:
        raise ValueError(
            "mask.causal must be False, as it counts listed queries; use the argument causal"
        )
