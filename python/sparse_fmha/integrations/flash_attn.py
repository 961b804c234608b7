"""The interfaces of the package flash_attn to packed sequences and caches, on this library.

from sparse_fmha.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.decode import decode_attention
from sparse_fmha.integrations import _packed

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]

BATCH_INVARIANT_SPLIT = 1024


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`varlen_attention` with the signature of `flash_attn.flash_attn_varlen_func` (version 2).

    Differences: it also runs on the CPU, in fp32 and fp64 too; lse has a gradient; a query that
    sees no key has lse -inf, not inf.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal: q,
            k, v, cu_q, cu_k, max_q, max_k, scale and causal of `varlen_attention`.
        window_size: (left, right): query i of Lq sees key j of Lk only if
            `-left <= j - i - (Lk - Lq) <= right`; -1: no bound. With causal, right is 0. Windows
            shrink at the ends of a sequence. With a bound other than causality,
            `block_sparse_attention` runs.
        deterministic: without effect; results are deterministic.
        return_attn_probs: also return lse and an empty tensor, as flash_attn does without dropout.
        block_table: page_table of `varlen_attention`.
        softcap: see `attention`.
        dropout_p: 0. alibi_slopes: None.

    Returns:
        The output, `[Tq, Hq, D]`; with `return_attn_probs` also lse, `[Hq, Tq]`, and an empty
        tensor.

    Raises:
        ValueError: dropout_p or alibi_slopes is given, or as in `varlen_attention`.
        TypeError, RuntimeError, NotImplementedError: see `varlen_attention`.
    """
    if dropout_p:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}")
    if alibi_slopes is not None:
        raise ValueError(f"alibi_slopes must be None, got {type(alibi_slopes).__name__}")
    if causal:
        window_size = (window_size[0], 0)
    out, lse = _packed.attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        window_size,
        softmax_scale,
        page_table=block_table,
        softcap=softcap,
    )
    return (out, lse.mT, q.new_empty(0)) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`decode_attention` with the signature of `flash_attn.flash_attn_with_kvcache` (version 2).

    Differences: it also runs on the CPU, in fp32 and fp64 too; pages have any size; a query that
    sees no key has out 0 and lse -inf.

    Args:
        q: `[B, Lq, Hq, D]`.
        k_cache, v_cache: `[B, rows, Hkv, D]`, or with block_table `[pages, page, Hkv, D]`.
        k, v: `[B, new, Hkv, D]`, written into the caches, behind `cache_seqlens` keys, before the
            attention. There must be rows for them: a page -1 is an error of the write, which a GPU
            reports later.
        cache_seqlens: int32 `[B]`, or a number: the keys in the caches without k. None: all rows.
        cache_batch_idx: int32 `[B]`, the entry of the caches of each request; without block_table.
        cache_leftpad: int32 `[B]`, keys at the beginning that are not seen.
        block_table: page_table of `decode_attention`.
        softmax_scale: default `D**-0.5`.
        causal: as in `decode_attention`.
        window_size: (left, right): query i sees key j of N only if
            `-left <= j - i - (N - Lq) <= right`; -1: no bound. right is -1 or 0.
        num_splits: 0, or 1 for results that do not depend on the other requests.
        return_softmax_lse: also return lse, `[B, Hq, Lq]`.
        softcap: see `attention`.
        rotary_cos, rotary_sin, alibi_slopes: None. rotary_interleaved: without effect.

    Raises:
        ValueError: an argument that is not supported, by its name, or as in `decode_attention`.
        TypeError, NotImplementedError: see `decode_attention`.
    """
    refused = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "alibi_slopes": alibi_slopes}
    for name, given in refused.items():
        if given is not None:
            raise ValueError(f"{name} must be None, got {type(given).__name__}")
    if num_splits not in (0, 1):
        raise ValueError(f"num_splits must be 0 or 1, got {num_splits}")
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx must be None with block_table")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v")
    left, right = (_checks.check_int("window_size", bound, -1) for bound in window_size)
    if right > 0 and not causal:
        raise ValueError(f"window_size must have a right bound of -1 or 0, got {window_size}")
    # Entries of a contiguous cache are pages as long as a request can be.
    table = block_table if cache_batch_idx is None else cache_batch_idx[:, None]
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((len(q),), cache_seqlens, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        rows = _new_rows(cache_seqlens, k.shape[1], k_cache, table)
        k_cache[rows], v_cache[rows] = k, v
        cache_seqlens = cache_seqlens + k.shape[1]
    starts = lengths = None
    if cache_leftpad is not None:
        shape = (len(q), k_cache.shape[2])
        starts = cache_leftpad[:, None].expand(shape)
        lengths = (cache_seqlens - cache_leftpad)[:, None].expand(shape)
    out, lse = decode_attention(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        page_table=table,
        head_starts=starts,
        head_lengths=lengths,
        causal=causal or right == 0,
        window=None if left < 0 else left + 1,
        scale=softmax_scale,
        softcap=softcap,
        split_tokens=BATCH_INVARIANT_SPLIT if num_splits == 1 else None,
        return_lse=True,
    )
    return (out, lse.mT) if return_softmax_lse else out


def _new_rows(
    lengths: Tensor, count: int, cache: Tensor, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The first two indices into a cache of the keys that are appended, int64 `[B, count]`."""
    at = lengths.long()[:, None] + torch.arange(count, device=lengths.device)
    if table is None:
        return torch.arange(len(at), device=at.device)[:, None].expand_as(at), at
    page = cache.shape[1]
    pages = table.long().gather(1, at // page)
    # Below 0 an index would count from the end.
    return pages.masked_fill(pages < 0, cache.shape[0]), at % page
