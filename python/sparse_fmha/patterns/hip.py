"""HiP attention: keys found by a tree search over chunks, for each group of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, check_q_and_k, plain_ints
from sparse_fmha._ops import hip_search
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.patterns.hip_search import check_keys, halvings
from sparse_fmha.patterns.token_top_k import LocalWindow


@plain_ints
def hip(
    q: Tensor,
    k: Tensor,
    *,
    keys: int = 512,
    granule: int = 2,
    local: int = 128,
    first: int = 4,
    sample: int = 2,
    block_q: int = 64,
    range_size: int = 64,
) -> StripeMask:
    """Returns the causal mask of HiP, hierarchically pruned attention, for prefill.

    A group of queries sees the first keys, a local window, and what a search finds between:

        divide the keys between into n = keys / granule chunks of equal length;
        until all have at most `granule` keys: halve each chunk with more, and keep the n halves
        with the largest max over sampled queries i of q_i . (key in the middle of the half).

    Source: Lee et al. 2024, "A Training-free Sub-quadratic Cost Transformer Model Serving Framework
    With Hierarchically Pruned Attention", arXiv:2406.09827; 512 keys, chunks of 2 at the end, a
    window of 128 and every second query as published. The paper has groups of 32 queries; lists of
    the kernels serve 64 or more. It leaves open how lengths are rounded: here the first half has
    the odd key, and chunks that are short enough are scored again but not halved. Ties take the
    first chunk. Each group costs `2 n` products for each halving, so the search is linear in the
    number of queries, up to a logarithm.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        keys: keys found by the search, a multiple of `granule`.
        granule: keys of the smallest chunks, at least 1; 2 to 8 as published.
        local: keys before a group's first query that it always sees, rounded up to whole runs.
        first: first keys that every query sees, besides `keys`.
        sample: use every `sample`-th query of a group.
        block_q, range_size: group and run sizes of the mask.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device
        by one kernel, and without temporaries.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
        RuntimeError: the head dim is not a multiple of 8 up to 256, `block_q` is above 2048, or, on
            CUDA, the dtype is fp64 or `keys / granule` is above 4096.
    """
    check_q_and_k(q, k)
    chunks = check_keys(keys, granule)
    check_int("sample", sample, 1)
    q_len, kv_len = q.shape[1], k.shape[1]
    window = LocalWindow(q_len, kv_len, local, first, block_q, range_size)
    begin, _ = window.begins(q.device)
    most = window.before(window.groups - 1, kv_len)
    dtype = torch.promote_types(q.dtype, k.dtype)
    columns, counts = hip_search.search(
        q.to(dtype),
        k.to(dtype),
        begin.int()[None],
        None,
        block_q=block_q,
        sample=sample,
        chunks=chunks,
        granule=granule,
        first=window.first,
        halvings=halvings(most, chunks, granule),
    )
    return window.mask(columns[..., :kv_len].contiguous(), counts)
